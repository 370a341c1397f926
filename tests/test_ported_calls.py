"""Calls written for Transformers, vLLM and lmdeploy: they do what is meant, or the error names our keyword."""

import inspect

import pytest
from conftest import DEMO

from llama import Llama
from llama.datasets.batch import run_batch
from llama.keywords import PORTED, PORTED_BUILD, Options, StreamOptions, unknown
from llama.options import NAMES, DecodingOptions
from llama.rejection_sampling import rejection_sample

USER = [{"role": "user", "content": "What is 21 + 34?"}]
P = {"role": "assistant", "content": "<PLACEHOLDER>"}


def test_the_typed_options_are_the_options():
    assert StreamOptions.__annotations__.keys() == set(NAMES)
    assert Options.__annotations__.keys() == set(NAMES) - {"max_gen_len", "temperature", "top_p"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_new_tokens", "max_new_tokens is max_gen_len here"),
        ("max_tokens", "max_tokens is max_gen_len here"),
        ("n", "n is num_return_sequences here"),
        ("num_samples", "num_samples is num_return_sequences here"),
        (
            "do_sample",
            "do_sample is temperature here: 0 takes the most likely token each time, and more than 0 samples",
        ),
        ("stop_token_ids", "stop_token_ids is stop here, which takes strings and ids of tokens"),
        ("sampling_params", "sampling_params is not an object here: pass its fields"),
        ("attention_mask", "attention_mask is not needed here: prompts may differ in length"),
        ("streamer", "streamer is stream_text or stream_chat here, methods of their own"),
        ("truncation_side", "truncation_side is truncate here: 'left' or 'right'"),
        ("temprature", "'temprature' is not a decoding option: did you mean temperature? expected one of "),
    ],
)
def test_a_keyword_of_another_library_is_answered_with_ours(demo, name, message):
    calls = [
        lambda: demo.generate([[1]], **{name: 4}),
        lambda: demo.text_completion(["One"], **{name: 4}),
        lambda: demo.chat_completion([USER], **{name: 4}),
        lambda: demo.stream_chat(USER, **{name: 4}),
        lambda: run_batch(demo, [], **{name: 4}),
    ]
    for call in calls:
        with pytest.raises(TypeError) as found:
            call()
        assert message in str(found.value)
    (record,) = run_batch(demo, [{"prompt": "One day", name: 4}])
    assert message.replace("a decoding option", "a field of a row") in record["error"]


def test_each_keyword_that_an_error_suggests_exists():
    for name, ours in PORTED.items():
        assert name not in NAMES
        first = ours.partition(" here")[0].partition("=")[0]
        not_options = {"always so", "not an object", "not needed", "stream_text or stream_chat"}
        assert first in {*NAMES, *not_options, *inspect.signature(Llama.generate).parameters}, name
        assert unknown(name, NAMES).startswith(f"{name} is {first}")
    parameters = inspect.signature(Llama.build).parameters
    for name, ours in PORTED_BUILD.items():
        assert name not in parameters and ours.partition(" here")[0] in parameters, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is model_parallel_size here"),
        ({"torch_dtype": "float16"}, "torch_dtype is dtype here"),
        ({"max_model_len": 64}, "max_model_len is max_seq_len here"),
        ({"load_in_8bit": True}, "load_in_8bit is quantize here: 'int8' or 'int4'"),
        ({"max_sequence_len": 64}, "'max_sequence_len' is not an argument: did you mean max_seq_len? expected one of "),
        ({"compile": "yes"}, "compile = 'yes': expected True or False"),
        ({"train": "no"}, "train = 'no': expected True or False"),
        ({"seed": "x"}, "seed = 'x': expected an integer, or None"),
    ],
)
def test_build_refuses_arguments_that_it_could_misread(options, message):
    with pytest.raises((TypeError, ValueError)) as found:
        Llama.build("/nowhere", **options)
    assert message in str(found.value)


def test_a_single_prompt_or_text_instead_of_a_list_is_refused(demo):
    text, row = USER[0]["content"], {"prompt": "One day"}
    calls = [
        (lambda: demo.text_completion(text), r"prompts is a str: expected a list of texts, so pass \[prompt\]"),
        (lambda: demo.text_completion(None), "prompts is a NoneType: expected a list of texts$"),
        (
            lambda: demo.generate({"input_ids": [[1]]}),
            "prompt_tokens is a dict: expected a list of prompts, ",
        ),
        (
            lambda: demo.chat_completion(text),
            r"dialogs is a str: .* dialogs or strings, so pass \[text\]",
        ),
        (lambda: demo.chat_completion(USER[0]), r"dialogs is a dict: .* so pass \[dialog, itself a list of messages\]"),
        (lambda: demo.score(text), "texts is a str"),
        (lambda: demo.score([5]), "text 0 is a int: expected a list of token ids"),
        (lambda: demo.perplexity(5), "texts is a int: expected a list of texts"),
        (lambda: demo.perplexity([5]), "text 0 is a int: expected a text, or a list of token ids"),
        (
            lambda: rejection_sample(demo, text, "logprob"),
            "prompts is a str: expected a list of texts, dialogs or",
        ),
        (lambda: rejection_sample(demo, row, "logprob"), "prompts is a dict"),
        (lambda: run_batch(demo, "in.jsonl"), r"lines is a str: expected dictionaries.*`run_batch_files` reads files"),
        (lambda: run_batch(demo, row), "lines is a dict: expected dictionaries, one for each row"),
        (lambda: run_batch("demo/checkpoint", [row]), "llama is a str: expected a Llama, or `replicas` and a dir"),
    ]
    for call, message in calls:
        with pytest.raises(TypeError, match=message):
            call()
    for name in ("logprobs", "echo", "progress"):  # vLLM's logprobs are a number
        with pytest.raises(TypeError, match=f"{name} = 5: expected True or False"):
            demo.text_completion(["One"], **{name: 5})
    with pytest.raises(
        TypeError, match=r"logprobs = 'no': expected True or False \(for the likeliest tokens, top_logp"
    ):
        run_batch(demo, [row], logprobs="no")


def test_beams_without_a_temperature_are_greedy_beams(demo):
    options = {"num_beams": 4, "num_return_sequences": 2, "max_gen_len": 8}
    ported, ours = (demo.text_completion(["One day"], **options, **t) for t in ({}, {"temperature": 0}))
    assert [a["generation"] for a in ported] == [a["generation"] for a in ours]
    assert [a["score"] for a in ported] == pytest.approx([a["score"] for a in ours], abs=1e-4)
    both = demo.generate([[65], [66]], num_beams=[1, 2], seed=1, max_gen_len=4)[0]
    assert both[0] == demo.generate([[65]], temperature=0.6, seed=1, max_gen_len=4)[0][0]
    assert both[1] == demo.generate([[66]], temperature=0, num_beams=2, max_gen_len=4)[0][0]
    with pytest.raises(ValueError, match=r"num_beams = 2 with temperature = 0.6: a beam search does not sample"):
        demo.text_completion(["One day"], 0.6, num_beams=2)


def test_a_top_k_of_minus_one_is_all(demo):
    options = {"max_gen_len": 12, "seed": 3, "temperature": 2.0, "top_p": 1.0}
    everything = demo.text_completion(["One day"], **options)
    assert demo.text_completion(["One day"], top_k=-1, **options) == everything
    assert demo.text_completion(["One day"], top_k=1, **options) != everything
    assert DecodingOptions(top_k=-1) == DecodingOptions()  # so that a batch goes on


def test_a_string_where_a_dialog_is_expected_is_one_turn_of_the_user(demo):
    text, options = USER[0]["content"], {"temperature": 0, "max_gen_len": 40}
    expected = demo.chat_completion([USER], **options)
    assert demo.chat_completion([text], **options) == expected
    assert "".join(demo.stream_chat(text, **options)) == expected[0]["generation"]["content"]
    (record,) = run_batch(demo, [{"messages": text, **options}])
    assert record["text"] == expected[0]["generation"]["content"]
    with pytest.raises(ValueError, match=r"dialog 0: .*found dict.*pass \[dialog\]"):
        demo.chat_completion(USER)


def test_results_say_why_they_end_and_beams_how_good_they_are(demo):
    short, whole = demo.chat_completion([USER, USER], temperature=0, max_gen_len=[3, 60])
    assert (short["finish_reason"], whole["finish_reason"]) == ("length", "stop")
    beams = demo.text_completion(["One day"], num_beams=3, num_return_sequences=3, max_gen_len=6, logprobs=True)
    for beam in beams:  # log-probability / length
        assert beam["finish_reason"] == "length"
        assert beam["score"] == pytest.approx(sum(beam["logprobs"]) / 6, abs=1e-5)
    assert [beam["score"] for beam in beams] == sorted((beam["score"] for beam in beams), reverse=True)
    assert "score" not in short


def test_a_beam_search_as_it_is_written_for_transformers_gives_its_answers(demo, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers to compare with it")
    from llama.checkpoint.convert import convert

    convert(DEMO, tmp_path / "hf", "hf", None, "float32")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32")
    ids = demo.tokenizer.encode("One day", bos=True)
    import torch

    written = {"num_beams": 4, "num_return_sequences": 4, "no_repeat_ngram_size": 3}
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False, **written)
    with pytest.raises(TypeError, match="max_new_tokens is max_gen_len here"):
        demo.generate([ids], max_new_tokens=10, **written)
    found, _ = demo.generate([ids], max_gen_len=10, **written)
    assert found == [row[len(ids) :] for row in expected.tolist()]


@pytest.mark.parametrize(
    ("program", "script"), [("mine.py", "mine.py"), ("-c", "SCRIPT.py"), ("/a/llama/__main__.py", "-m llama")]
)
def test_a_plain_script_on_several_gpus_is_told_the_torchrun_command(tmp_path, monkeypatch, program, script):
    (tmp_path / "mine.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [program])
    with pytest.raises(ValueError) as found:
        Llama.build(DEMO, model_parallel_size=2, device="cpu")
    assert str(found.value).startswith("model_parallel_size=2 in a run of one process: a model is split over processes")
    assert f"`torchrun --nproc_per_node 2 {script} …`" in str(found.value)


def test_a_text_without_a_token_to_predict_has_no_perplexity(demo):
    for text, found in (("", "is empty"), ([5], "has one token")):
        with pytest.raises(ValueError, match=f"text 1 {found}: a perplexity needs a token after the first"):
            demo.perplexity(["One day", text])


# Several answers to a dialog with open turns


def rollout_alone(demo, sample: int, **options) -> list[str]:
    """The answers in two open turns, each drawn as sample `sample` of its own prompt: the slow, simple way."""
    dialog, texts = list(USER), []
    for more in ([{"role": "user", "content": "And 12 + 7?"}], []):
        drawn = demo.chat_completion([dialog], num_return_sequences=sample + 1, **options)
        texts.append(drawn[sample]["generation"]["content"])
        dialog = [*dialog, {"role": "assistant", "content": texts[-1]}, *more]
    return texts


def test_open_turns_give_as_many_rollouts_as_are_asked_for_each_as_alone(demo):
    options = {"temperature": 3.0, "top_p": 1.0, "seed": 7, "max_gen_len": 16}
    dialog = [*USER, P, {"role": "user", "content": "And 12 + 7?"}, P]
    rollouts = demo.chat_completion([dialog], num_return_sequences=3, **options)
    assert len(rollouts) == 3
    turns = [[r["dialog"][1]["content"], r["generation"]["content"]] for r in rollouts]
    assert turns == [rollout_alone(demo, sample, **options) for sample in range(3)]
    assert len({first for first, _ in turns}) > 1 and all(r["dialog"][3] == r["generation"] for r in rollouts)
    assert demo.chat_completion([dialog], num_return_sequences=2, **options) == rollouts[:2]

    (record,) = run_batch(demo, [{"messages": dialog, "num_return_sequences": 3, **options}])
    assert [[t["text"] for t in a["turns"]] for a in record["answers"]] == turns
    assert [a["messages"] for a in record["answers"]] == [r["dialog"] for r in rollouts]
    assert record["text"] == turns[0][1] and record["messages"] == rollouts[0]["dialog"]
    assert record["answer_tokens"] == sum(a["answer_tokens"] for a in record["answers"])
