"""Tools: the prompt is Meta's, and a call is parsed from the answer, whole or in pieces."""

import json

import pytest

from llama.tokenizer.tool_calls import AnswerReader, call_schema, offer_tools, write_call

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
ASKED = [{"role": "user", "content": "Is it raining in Oslo?"}]


PROMPT = """\
<|begin_of_text|><|start_header_id|>system<|end_header_id|>

Environment: ipython
Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

You are helpful.<|eot_id|><|start_header_id|>user<|end_header_id|>

Given the following functions, please respond with a JSON for a function call with its proper arguments that best \
answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. \
Do not use variables.

{
    "type": "function",
    "function": {
        "name": "now"
    }
}

What time is it in Oslo?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{"name": "now", "parameters": {"city": "Oslo"}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>

{"time": "12:30"}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

"""


def test_the_prompt_of_a_call_and_its_result_is_the_one_that_meta_documents(demo):
    dialog = [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "What time is it in Oslo?"},
        {"role": "assistant", "content": write_call("now", '{"city":"Oslo"}')},
        {"role": "ipython", "content": '{"time": "12:30"}'},
    ]
    offered = offer_tools(dialog, [{"type": "function", "function": {"name": "now"}}])
    assert demo.tokenizer.decode(demo.formatter.encode_dialog_prompt(offered)) == PROMPT


def test_the_earlier_turns_and_the_given_dialog_are_unchanged():
    dialog = [*ASKED, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And in Rome?"}]
    before = json.dumps(dialog)
    written = offer_tools(dialog, [WEATHER])
    assert json.dumps(dialog) == before and written[2:] == dialog[1:]
    with pytest.raises(ValueError, match="user's first message"):
        offer_tools([{"role": "system", "content": "x"}, {"role": "tool", "content": "x"}], [WEATHER])


CALL = '{"name": "get_weather", "parameters": {"city": "Oslo", "text": "a } and a \\"{"}}'
ARGUMENTS = '{"city": "Oslo", "text": "a } and a \\"{"}'
ANSWERS = [
    ("It rains.", [("text", "It rains.")], False),
    (CALL, [("name", "get_weather"), ("arguments", ARGUMENTS)], True),
    ("<|python_tag|>" + CALL, [("name", "get_weather"), ("arguments", ARGUMENTS)], True),
    ('{"type": "function", ' + CALL[1:], [("name", "get_weather"), ("arguments", ARGUMENTS)], True),
    ('<|python_tag|>get_weather.call(city="Oslo")', [("name", "get_weather"), ("arguments", '{"city": "Oslo"}')], True),
    ('{"name": "no_such_tool", "parameters": {}}', [("text", '{"name": "no_such_tool", "parameters": {}}')], False),
    ('{"a": 1}', [("text", '{"a": 1}')], False),
    ("<|python_tag|>print(1)", [("text", "<|python_tag|>print(1)")], False),
    ('{"name": "get_weather", "parameters": {"city": "Os', [("name", "get_weather"), ("arguments", '{"city": "Os')],
     False),
]  # fmt: skip


@pytest.mark.parametrize("answer, expected, is_whole", ANSWERS, ids=[answer[:40] for answer, *_ in ANSWERS])
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_an_answer_is_read_the_same_whole_and_in_pieces(answer, expected, is_whole, step):
    reader = AnswerReader(["get_weather"])
    found: list[tuple[str, str]] = []
    for end in [*range(step, len(answer), step)]:
        found += reader.read(answer[:end])
    found += reader.read(answer, finished=True)
    joined: dict[str, str] = {}
    for kind, piece in found:
        joined[kind] = joined.get(kind, "") + piece
    assert [*joined.items()] == expected and reader.has_call == is_whole


def test_the_arguments_of_a_call_are_streamed():
    reader = AnswerReader(["get_weather"])
    pieces = [event for end in range(1, len(CALL) + 1) for event in reader.read(CALL[:end])]
    assert len([piece for kind, piece in pieces if kind == "arguments"]) > 20


def server_for(folder):
    from running import Server

    return Server("--ckpt_dir", str(folder), "--model_name", "m", "--max_seq_len", "4096", "--no_web")


def test_a_forced_call_comes_back_as_tool_calls_whole_and_streamed(write_checkpoint):
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    openai = pytest.importorskip("openai")
    with server_for(write_checkpoint(use_scaled_rope=True)) as server:
        create = openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=120).chat.completions.create
        given = {"model": "m", "messages": ASKED, "tools": [WEATHER], "temperature": 1.0, "seed": 4}
        named = {"type": "function", "function": {"name": "get_weather"}}
        choice = create(**given, tool_choice=named).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "get_weather" and arguments["city"] in ("Oslo", "Rome")
        assert 1 <= arguments["days"] <= 9 and call.id.startswith("call_")

        chunks = [*create(**given, tool_choice="required", stream=True)]
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        assert calls[0].function.name == "get_weather" and calls[0].id and len(calls) > 5
        assert json.loads("".join(call.function.arguments or "" for call in calls)) == arguments
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        assert not any(chunk.choices[0].delta.content for chunk in chunks)

        turns = [*ASKED, choice.message.model_dump(exclude_none=True)]
        turns.append({"role": "tool", "tool_call_id": call.id, "content": '{"rain": true}'})
        answer = create(model="m", messages=turns, tools=[WEATHER], max_tokens=3, temperature=0)
        assert answer.choices[0].finish_reason in ("length", "stop")
        with pytest.raises(openai.BadRequestError) as caught:
            create(**given, tool_choice={"type": "function", "function": {"name": "other"}})
        assert "there is no tool 'other'" in str(caught.value)


def test_a_schema_of_several_tools_is_a_choice_between_their_calls():
    other = {"type": "function", "function": {"name": "stop"}}
    both = call_schema([WEATHER, other])["anyOf"]
    assert [call["properties"]["name"]["const"] for call in both] == ["get_weather", "stop"]
    assert call_schema([WEATHER, other], "stop")["properties"]["parameters"] == {"type": "object"}
