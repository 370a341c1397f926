"""`Llama` against golden texts and against the slow, simple way: one prompt at a time, one full forward per token."""

import json

import pytest
import torch
from conftest import DEMO, run_python

from llama import Llama


@pytest.fixture
def small(write_checkpoint) -> Llama:
    """Random weights, room for 256 tokens and 8 sequences at a time."""
    return Llama.build(write_checkpoint(), max_seq_len=256, max_batch_size=8, device="cpu")


def slow_generate(llama: Llama, prompt: list[int], n_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy decoding without a cache: runs the whole sequence for each token."""
    cache, llama.model.cache = llama.model.cache, None
    tokens, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(n_tokens):
            logits = llama.model(torch.tensor([tokens]))[0, -1]
            token = int(logits.argmax())
            if token in llama.tokenizer.stop_tokens:
                break
            logprobs.append(torch.log_softmax(logits, 0)[token].item())
            tokens.append(token)
    llama.model.cache = cache
    return tokens[len(prompt) :], logprobs


def random_prompts(lengths: list[int], vocab_size: int = 256) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


UNEVEN = [1, 200, 17, 64, 2, 128, 33, 5]


def test_real_weights_give_the_golden_tokens_and_logprobs(stories):
    expected = json.loads((stories / "expected.json").read_text())
    llama = Llama.build(stories, max_seq_len=512, max_batch_size=1, device="cpu", dtype="float32")
    tokens, logprobs = llama.generate([expected["prompt_tokens"]], 200, temperature=0, logprobs=True)
    assert tokens == [expected["tokens"]]
    assert llama.tokenizer.decode(tokens[0]) == expected["text"]
    assert logprobs[0] == pytest.approx(expected["logprobs"], abs=1e-4)


def test_embedded_checkpoint_gives_its_golden_text(demo):
    golden = json.loads((DEMO.parent / "golden.json").read_text())
    for case in golden["text"]:
        answer = demo.text_completion([case["prompt"]], temperature=0, max_gen_len=40)[0]
        assert answer["generation"] == case["generation"]
    for case in golden["chat"]:
        answer = demo.chat_completion([case["dialog"]], temperature=0, max_gen_len=80, logprobs=True)[0]
        assert answer["generation"] == {"role": "assistant", "content": case["generation"]}
        assert answer["logprobs"] == pytest.approx(case["logprobs"], abs=1e-3)


def test_generate_equals_a_full_forward_for_each_token(small):
    prompts = random_prompts([1, 30, 7])
    tokens, logprobs = small.generate(prompts, 20, temperature=0, logprobs=True)
    for prompt, answer, values in zip(prompts, tokens, logprobs):
        slow_tokens, slow_logprobs = slow_generate(small, prompt, 20)
        assert answer == slow_tokens
        assert values == pytest.approx(slow_logprobs, abs=1e-4)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {"top_p": 1.0}])
def test_prompts_of_different_lengths_give_the_same_tokens_and_logprobs_as_alone(small, settings):
    prompts = random_prompts(UNEVEN)
    together, logprobs = small.generate(prompts, 40, logprobs=True, echo=True, seed=7, **settings)
    for index, prompt in enumerate(prompts):
        alone, alone_logprobs = small.generate([prompt], 40, logprobs=True, echo=True, seed=7, **settings)
        assert alone[0] == together[index]
        assert alone_logprobs[0] == pytest.approx(logprobs[index], abs=1e-4)


def test_more_prompts_than_slots_take_turns_and_keep_their_order(small, write_checkpoint):
    prompts = random_prompts([3, 50, 1, 20, 9, 120, 4, 7, 31, 2, 64])
    budget = 30
    expected = small.generate(prompts, budget, seed=3)
    for max_batch_size in (1, 2, 3, 16):
        llama = Llama.build(write_checkpoint(f"b{max_batch_size}"), None, 256, max_batch_size, device="cpu")
        assert llama.generate(prompts, budget, seed=3) == expected


def test_stop_tokens_end_an_answer_and_are_not_part_of_it(small):
    prompt = random_prompts([12])[0]
    small.tokenizer.stop_tokens = set()
    free, _ = small.generate([prompt], 30, temperature=0)
    stop = free[0][10]
    small.tokenizer.stop_tokens = {stop}
    tokens, logprobs = small.generate([prompt], 30, temperature=0, logprobs=True)
    assert tokens[0] == free[0][: free[0].index(stop)]
    assert len(logprobs[0]) == len(tokens[0])


def test_echoed_stop_tokens_of_the_prompt_do_not_cut_it(small):
    eot = small.tokenizer.special_tokens["<|eot_id|>"]
    prompt = [1, eot, 2, eot, 3]
    tokens, logprobs = small.generate([prompt], 4, temperature=0, echo=True, logprobs=True)
    assert tokens[0][:5] == prompt
    assert len(tokens[0]) == len(logprobs[0]) > 5


def test_prompt_logprobs_are_the_cross_entropy_of_the_untempered_logits(small):
    prompt = random_prompts([40])[0]
    for max_gen_len in (0, 3):
        tokens, logprobs = small.generate([prompt], max_gen_len, temperature=2.0, logprobs=True, echo=True, seed=1)
        small.model.cache, cache = None, small.model.cache
        logits = small.model(torch.tensor([tokens[0]]))[0]
        small.model.cache = cache
        expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[0][1:]), reduction="none")
        assert logprobs[0][0] == 0.0
        assert logprobs[0][1:] == pytest.approx((-expected).tolist(), abs=1e-4)


def test_each_prompt_has_its_own_budget(small):
    small.tokenizer.stop_tokens = set()
    lengths = [1, 250, 256, 100]
    tokens, _ = small.generate(random_prompts(lengths), 20, temperature=0)
    assert [len(answer) for answer in tokens] == [20, 6, 0, 20]
    tokens, _ = small.generate(random_prompts(lengths), temperature=0)
    assert [len(answer) for answer in tokens] == [255, 6, 0, 156]


def test_a_seed_reproduces_a_call_and_without_one_calls_differ(small, write_checkpoint):
    prompts = random_prompts([5, 9])
    seeded = [small.generate(prompts, 20, temperature=1.0, seed=5) for _ in range(2)]
    assert seeded[0] == seeded[1]
    calls = [small.generate(prompts, 20, temperature=1.0)[0] for _ in range(3)]
    assert calls[0] != calls[1] != calls[2] != calls[0]
    again = Llama.build(write_checkpoint("again"), None, 256, 8, device="cpu")  # the same seed of build
    assert [again.generate(prompts, 20, temperature=1.0)[0] for _ in range(3)] == calls
    other = Llama.build(write_checkpoint("other"), None, 256, 8, seed=2, device="cpu")
    assert other.generate(prompts, 20, temperature=1.0)[0] != calls[0]


def test_a_prompt_given_ten_times_gets_ten_answers(small):
    answers, _ = small.generate([[1, 2, 3]] * 10, 20, temperature=1.0, seed=0)
    assert len({tuple(answer) for answer in answers}) == 10


def test_text_completion_returns_metas_keys(small):
    plain = small.text_completion(["Hello", ""], max_gen_len=5, temperature=0)
    assert [set(prediction) for prediction in plain] == [{"generation", "finish_reason"}] * 2
    full = small.text_completion(["Hello", ""], 0, 0.9, 5, True, True)  # by position, as Meta's
    assert [set(prediction) for prediction in full] == [{"generation", "finish_reason", "tokens", "logprobs"}] * 2
    # The echo is of the prompt's tokens, begin_of_text first.
    assert full[0]["tokens"][:6] == ["<|begin_of_text|>", *"Hello"]
    assert full[0]["generation"].endswith(plain[0]["generation"])
    assert len(full[0]["tokens"]) == len(full[0]["logprobs"])


def test_chat_completion_answers_the_formatted_dialog(small):
    dialog = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|eot_id|> is text"}]
    answer = small.chat_completion([dialog], temperature=0, max_gen_len=6, logprobs=True)[0]
    prompt = small.formatter.encode_dialog_prompt(dialog)
    tokens, logprobs = small.generate([prompt], 6, temperature=0, logprobs=True)
    assert answer["generation"] == {"role": "assistant", "content": small.tokenizer.decode(tokens[0])}
    assert answer["logprobs"] == pytest.approx(logprobs[0], abs=1e-4)
    assert prompt.count(small.tokenizer.special_tokens["<|eot_id|>"]) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, r"temperature = -0.1: expected a number of at least 0"),
        ({"temperature": float("nan")}, ValueError, r"temperature = nan"),
        ({"temperature": "0.6"}, ValueError, r"temperature = '0.6'"),
        ({"top_p": 0}, ValueError, r"top_p = 0: expected a number of at least 1e-30"),
        ({"top_p": 1.01}, ValueError, r"top_p = 1.01"),
        ({"max_gen_len": -1}, ValueError, r"max_gen_len = -1: expected an integer of at least 0"),
        ({"seed": 1.5}, ValueError, r"seed = 1.5: expected an integer"),
    ],
)
def test_numbers_out_of_range_are_refused(small, arguments, error, message):
    with pytest.raises(error, match=message):
        small.generate([[1, 2]], **arguments)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, r"prompt 2 is empty"),
        ([1] * 257, ValueError, r"prompt 2 has 257 tokens: expected at most max_seq_len = 256"),
        ([1, 512], ValueError, r"prompt 2 has 512 among its ids: expected integers from 0 to 511"),
        ([-1], ValueError, r"prompt 2 has -1 among its ids"),
        ([1.0], ValueError, r"prompt 2 has 1.0 among its ids"),
        ("text", TypeError, r"prompt 2 is a str: expected a list of token ids \(`text_completion` takes texts\)"),
        (5, TypeError, r"prompt 2 is a int"),
    ],
)
def test_a_bad_prompt_is_named_before_anything_runs(small, monkeypatch, bad, error, message):
    monkeypatch.setattr(small._engine, "step", lambda *_: pytest.fail("the other prompts were run"))
    with pytest.raises(error, match=message):
        small.generate([[1], [2, 3], bad, [4]])


def test_ids_may_come_as_tensors_and_tuples(small):
    expected = small.generate([[1, 2, 3]], 5, temperature=0)
    assert small.generate([torch.tensor([1, 2, 3])], 5, temperature=0) == expected
    assert small.generate(torch.tensor([[1, 2, 3]]), 5, temperature=0) == expected
    assert small.generate(((1, 2, 3),), 5, temperature=0) == expected


def test_no_prompts_give_no_answers(small):
    assert small.generate([]) == ([], None)
    assert small.text_completion([], logprobs=True) == []
    assert small.chat_completion([]) == []


def test_bad_texts_and_dialogs_are_named(small):
    with pytest.raises(TypeError, match="prompt 1 is a NoneType"):
        small.text_completion(["Hello", None])
    good = [{"role": "user", "content": "Hello"}]
    with pytest.raises(ValueError, match=r"dialog 1: message 1 of the dialog has no .content."):
        small.chat_completion([good, [*good, {"role": "assistant"}]])
    with pytest.raises(ValueError, match=r"dialog 0: .*'bot'"):
        small.chat_completion([[{"role": "bot", "content": "Hello"}]])
    with pytest.raises(ValueError, match=r"dialog 1: a dialog is a list .* found dict"):
        small.chat_completion([good, good[0]])


@pytest.mark.parametrize("name", ["max_seq_len", "max_batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_build_refuses_sizes_out_of_range(write_checkpoint, name, value):
    with pytest.raises(ValueError, match=f"{name} = .*: expected an integer of at least 1"):
        Llama.build(write_checkpoint(), **{name: value})


def test_build_refuses_unknown_devices_and_dtypes(write_checkpoint):
    folder = write_checkpoint()
    with pytest.raises(ValueError, match="device 'abacus' is not known to PyTorch"):
        Llama.build(folder, device="abacus")
    with pytest.raises(ValueError, match="dtype = 'int8': expected bfloat16, float16, float32 or float64"):
        Llama.build(folder, dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' was asked for, but PyTorch finds no CUDA device"):
            Llama.build(folder, device="cuda")


def test_a_plain_python_builds_twice_and_nothing_global_is_touched(write_checkpoint):
    folder = write_checkpoint()
    code = """
import os, socket, sys, torch
ports = []
bind = socket.socket.bind
state = lambda: (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
                 torch.random.get_rng_state().tolist(), torch.is_grad_enabled(), dict(os.environ))
before = state()
from llama import Llama
for _ in range(2):
    llama = Llama.build(sys.argv[1], max_seq_len=32, device="cpu")
    print(llama.generate([[1, 2, 3]], 4, temperature=0.7, seed=0))
assert state() == before
"""
    result = run_python(code, folder, is_forked=False)
    assert result.returncode == 0, result.stderr
    loaded, first, loaded_again, second = result.stdout.splitlines()
    assert first == second
    assert loaded.startswith("Loaded in ") and loaded_again.startswith("Loaded in ")


def test_groups_that_the_caller_made_are_used(write_checkpoint):
    code = """
import sys, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import fairscale.nn.model_parallel.initialize as fs
fs.initialize_model_parallel(1)
groups = dist.group.WORLD, fs.get_model_parallel_group()
from llama import Llama
llama = Llama.build(sys.argv[1], max_seq_len=32, device="cpu")
assert (dist.group.WORLD, fs.get_model_parallel_group()) == groups
assert llama.model.output.group is groups[1]
"""
    result = run_python(code, write_checkpoint())
    assert result.returncode == 0, result.stderr


def test_bfloat16_checkpoints_compute_in_bfloat16_on_the_cpu(write_checkpoint):
    folder = write_checkpoint(dtype=torch.bfloat16)
    llama = Llama.build(folder, max_seq_len=64, device="cpu")
    assert {parameter.dtype for parameter in llama.model.parameters()} == {torch.bfloat16}
    assert llama.model.cache.keys[0].dtype == torch.bfloat16
    wide = Llama.build(folder, max_seq_len=64, device="cpu", dtype="float32")
    assert {parameter.dtype for parameter in wide.model.parameters()} == {torch.float32}
    logits = [m.model(torch.tensor([[1, 2, 3]])) for m in (llama, wide)]
    assert logits[0].dtype == torch.float32
    torch.testing.assert_close(*logits, atol=0.1, rtol=0.05)


def test_texts_and_dialogs_go_through_a_generate_that_somebody_has_put_in_place(small, monkeypatch):
    calls, ids, dialog = [], small.tokenizer.encode("Hi"), [{"role": "user", "content": "Hello"}]

    def generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs=False, echo=False):
        calls.append((len(prompt_tokens), max_gen_len, echo))
        return [(prompt if echo else []) + ids for prompt in prompt_tokens], None

    monkeypatch.setattr(small, "generate", generate)
    texts = [p["generation"] for p in small.text_completion(["a", "b"], max_gen_len=3, echo=True)]
    assert texts == [small.tokenizer.decode(small.tokenizer.encode(text, bos=True)) for text in ("aHi", "bHi")]
    assert small.chat_completion([dialog], max_gen_len=4)[0]["generation"] == {"role": "assistant", "content": "Hi"}
    assert calls == [(2, 3, True), (1, 4, False)]
