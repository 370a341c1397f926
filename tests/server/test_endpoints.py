"""Every endpoint and field, with the current `openai` package as the client."""

import json

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx2", reason="the openai package brings it")

from running import Server  # noqa: E402

from llama import Llama  # noqa: E402

SUM = [{"role": "user", "content": "What is 21 + 34?"}]
STORY = "Once upon a time"


@pytest.fixture(scope="module")
def server():
    with Server("--max_seq_len", "512", "--no_web") as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> "openai.OpenAI":
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def offline(demo: Llama, dialog=SUM, **options):
    return demo.chat_completion([dialog], **options)


def test_a_chat_is_answered_as_offline_in_openais_shape(client, demo):
    found = client.chat.completions.create(model="llama-demo", messages=SUM, temperature=0)
    (expected,) = offline(demo, temperature=0)
    assert found.object == "chat.completion" and found.id.startswith("chatcmpl-") and found.created > 1e9
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected["generation"]["content"])
    assert choice.finish_reason == "stop" and choice.index == 0 and choice.logprobs is None
    assert found.usage.prompt_tokens == 25 and found.usage.completion_tokens == 35
    assert found.usage.total_tokens == 60


def test_a_prompt_that_was_asked_before_is_counted_as_cached(client):
    ask = lambda: client.chat.completions.create(model="llama-demo", messages=SUM, temperature=0, max_tokens=2)  # noqa: E731
    ask()
    assert ask().usage.prompt_tokens_details.cached_tokens == 24


def test_a_stream_has_one_id_the_role_first_the_usage_last_and_joins_to_the_answer(client, demo):
    chunks = [*client.chat.completions.create(
        model="llama-demo", messages=SUM, temperature=0, stream=True, stream_options={"include_usage": True}
    )]  # fmt: skip
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == offline(demo, temperature=0)[0]["generation"]["content"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 35
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len(chunks) > 20  # token by token, and not in one piece


def test_a_stream_ends_with_done(server):
    body = {"prompt": STORY, "max_tokens": 2, "stream": True}
    text = httpx.post(server.url + "/v1/completions", json=body, timeout=60).text
    assert text.endswith("data: [DONE]\n\n")


OPTIONS = [
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.2, "seed": 4, "top_p": 0.8, "n": 3},
    {"temperature": 0, "logit_bias": {"100": 5.0}, "presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"temperature": 1.0, "seed": 5, "stop": [" the", "duck"], "extra": {"top_k": 9, "min_p": 0.02}},
    {"temperature": 0.7, "seed": 6, "extra": {"repetition_penalty": 1.3}},
    {"temperature": 1.0, "seed": 8, "extra": {"regex": "[a-z]{4,9}"}},
    {"temperature": 1.0, "seed": 9, "extra": {"choice": ["yes", "no"]}},
    {"temperature": 1.0, "seed": 10, "extra": {"grammar": 'start: "a" | "b" start'}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_acts_as_the_offline_option_of_the_same_name_streamed_or_not(client, demo, options):
    options = dict(options)
    given = {"model": "llama-demo", "prompt": STORY, "max_tokens": 24, "extra_body": options.pop("extra", {})}
    whole = client.completions.create(**given, **options)
    pieces = [chunk.choices[0] for chunk in client.completions.create(**given, **options, stream=True)]
    n = options.pop("n", 1)
    if "logit_bias" in options:
        options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
    same = {"top_p": 1.0, **options, **given["extra_body"], "num_return_sequences": n, "max_gen_len": 24}
    expected = demo.text_completion([STORY], **same)
    assert [choice.text for choice in whole.choices] == [prediction["generation"] for prediction in expected]
    for choice in whole.choices:
        own = [piece for piece in pieces if piece.index == choice.index]
        assert "".join(piece.text for piece in own) == choice.text
        assert [piece.finish_reason for piece in own if piece.finish_reason] == [choice.finish_reason]


def test_the_logprobs_of_a_chat_are_those_of_offline_and_join_to_the_text(client, demo):
    (expected,) = offline(demo, temperature=0, logprobs=True, top_logprobs=3, max_gen_len=12)
    for stream in (False, True):
        given = {"model": "llama-demo", "messages": SUM, "temperature": 0, "max_tokens": 12, "stream": stream}
        found = client.chat.completions.create(**given, logprobs=True, top_logprobs=3)
        if stream:
            content = [token for chunk in found if (got := chunk.choices[0].logprobs) for token in got.content]
        else:
            content = found.choices[0].logprobs.content
        assert [token.token for token in content] == expected["tokens"]
        assert [token.logprob for token in content] == pytest.approx(expected["logprobs"], rel=1e-5, abs=1e-5)
        assert [[top.logprob for top in token.top_logprobs] for token in content] == [
            pytest.approx([value for _, value in row], rel=1e-5, abs=1e-5) for row in expected["top_logprobs"]
        ]
        joined = b"".join(bytes(token.bytes) for token in content).decode()
        assert joined == expected["generation"]["content"]


def test_echoed_prompts_that_wait_for_a_slot_are_streamed_like_whole_responses(client):
    asked = {"model": "llama-demo", "prompt": [f"{STORY} {n}" for n in range(20)], "temperature": 0, "max_tokens": 3}
    whole = client.completions.create(**asked, logprobs=1, echo=True).choices
    parts = [chunk.choices[0] for chunk in client.completions.create(**asked, logprobs=1, echo=True, stream=True)]
    for choice in whole:
        own = [part for part in parts if part.index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        tokens = [token for part in own if part.logprobs for token in part.logprobs.tokens]
        assert tokens == choice.logprobs.tokens


@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt_as_offline(client, demo, stream):
    (expected,) = demo.text_completion([STORY], temperature=0, max_gen_len=5, logprobs=True, echo=True, top_logprobs=2)
    found = client.completions.create(
        model="llama-demo", prompt=STORY, temperature=0, max_tokens=5, logprobs=2, echo=True, stream=stream
    )
    parts = [chunk.choices[0] for chunk in found] if stream else [found.choices[0]]
    text = "".join(part.text for part in parts)
    assert text.startswith(STORY) and "<|begin_of_text|>" + text == expected["generation"]
    join = lambda name: [value for part in parts if part.logprobs for value in getattr(part.logprobs, name)]  # noqa: E731
    assert join("tokens") == expected["tokens"]
    assert join("token_logprobs") == [
        None,
        *(pytest.approx(value, rel=1e-5, abs=1e-5) for value in expected["logprobs"][1:]),
    ]
    offsets = join("text_offset")
    assert offsets[0] == 0
    for token, offset in zip(join("tokens")[1:], offsets[1:]):
        assert text[offset:].startswith(token)
    tops = join("top_logprobs")
    assert tops[0] is None and all(token in top for token, top in zip(join("tokens")[1:], tops[1:]))


def test_prompts_may_be_texts_ids_and_lists_of_both(client, demo):
    ids = demo.tokenizer.encode(STORY, bos=True)
    (expected,) = demo.text_completion([STORY], temperature=0, max_gen_len=6)
    for prompt, n in ((STORY, 1), (ids, 1), ([STORY, STORY], 2), ([ids, ids], 2), ([STORY, ids], 2)):
        found = client.completions.create(model="llama-demo", prompt=prompt, temperature=0, max_tokens=6)
        assert [choice.text for choice in found.choices] == [expected["generation"]] * n
        assert [choice.index for choice in found.choices] == [*range(n)]


def test_the_endpoints_for_models_the_tokenizer_and_health_answer(server, client, demo):
    (model,) = client.models.list().data
    assert model.id == "llama-demo" and client.models.retrieve("llama-demo").id == "llama-demo"
    post = lambda path, body: httpx.post(server.url + path, json=body, timeout=60).json()  # noqa: E731
    ids = demo.tokenizer.encode(STORY, bos=True)
    assert post("/tokenize", {"prompt": STORY}) == {"tokens": ids, "count": len(ids), "max_model_len": 512}
    assert post("/tokenize", {"prompt": STORY, "add_special_tokens": False})["tokens"] == ids[1:]
    assert post("/tokenize", {"messages": SUM})["tokens"] == demo.formatter.encode_dialog_prompt(SUM)
    assert post("/detokenize", {"tokens": ids[1:]}) == {"prompt": STORY}
    assert httpx.get(server.url + "/health").status_code == 200
    assert httpx.get(server.url + "/docs").status_code == 200


def test_the_metrics_count_what_has_run(server, client):
    def read() -> dict[str, float]:
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        return {(words := line.rsplit(" ", 1))[0]: float(words[1]) for line in lines if not line.startswith("#")}

    before = read()
    client.chat.completions.create(model="llama-demo", messages=SUM, temperature=0, max_tokens=5, n=2)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="llama-demo", messages=[])
    after = read()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["llama_prompt_tokens_total"] == 25 and grown["llama_answer_tokens_total"] == 10
    assert grown["llama_time_to_first_token_seconds_count"] == 2 and grown["llama_time_per_token_seconds_count"] == 2
    assert grown["llama_reused_prefix_tokens_total"] >= 24
    assert grown['llama_refused_requests_total{status="400"}'] == 1
    assert after["llama_waiting"] == after["llama_running"] == 0


def test_an_answer_fits_its_schema(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 10}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    found = client.chat.completions.create(model="llama-demo", messages=SUM, temperature=0, response_format=wanted)
    answer = json.loads(found.choices[0].message.content)
    assert answer.keys() == {"a", "b"} and answer["b"] in ("x", "y")
    found = client.chat.completions.create(
        model="llama-demo", messages=SUM, temperature=0, response_format={"type": "json_object"}
    )
    assert found.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(found.choices[0].message.content), dict)


BAD = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content"),
    ({"messages": [*SUM, {"role": "assistant", "content": "55"}]}, "messages"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include": True}}, "stream_options.include"),
    ({"messages": [*SUM, {"role": "tool", "content": "55"}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "55"}, *SUM]}, "messages"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"functions": []}, "functions"),
    ({"best_of": 3}, "best_of"),
    ({"no_such_field": None}, "no_such_field"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}},
     "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"messages": [{"role": "user", "content": "long " * 2000}]}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize("change, param", BAD, ids=str)
def test_what_is_wrong_is_a_400_that_names_the_field(server, change, param):
    body = {"model": "llama-demo", "messages": SUM, "max_tokens": 2, **change}
    response = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
    error = response.json()["error"]
    assert response.status_code == 400 and error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    assert error["param"] == param, error


def test_the_error_of_a_too_long_prompt_names_both_numbers(client):
    with pytest.raises(openai.BadRequestError, match=r"\d{3,} tokens: expected at most 512"):
        client.completions.create(model="llama-demo", prompt="long " * 2000)


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-7", messages=SUM)
    assert caught.value.param == "model" and caught.value.code == "model_not_found"


def test_extra_keys_inside_a_message_and_null_fields_are_accepted(server):
    message = {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ada", "refusal": None}
    body = {"messages": [message], "max_tokens": 2, "stop": None, "logit_bias": None, "user": "ada", "store": False}
    body["parallel_tool_calls"] = False
    response = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
