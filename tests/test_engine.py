"""Continuous batching against each prompt alone; prefix reuse, by the engine's own counters."""

import io
import itertools
import json
import signal
import sys

import pytest
import torch
from conftest import ranks
from tqdm import tqdm

from llama import GenerationError, Llama
from llama.decoding import answering
from llama.engine import PREFILL_TOKENS, PREFILL_TOKENS_WHILE_DECODING

N_NEW = 6


@pytest.fixture
def make(write_checkpoint):
    folder = write_checkpoint("engine", multiple_of=16)

    def build(max_batch_size: int = 8, max_seq_len: int = 512) -> Llama:
        llama = Llama.build(folder, None, max_seq_len, max_batch_size, device="cpu")
        llama.folder = folder
        return llama

    return build


def prompts_of_every_length(n: int = 200) -> list[list[int]]:
    """Prompts of random lengths from 1 to 300. Every third has the beginning of the one before it."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randperm(300, generator=generator)[:n] + 1).tolist()
    prompts: list[list[int]] = []
    for i, length in enumerate(lengths):
        prompt = torch.randint(0, 256, (length,), generator=generator).tolist()
        if i % 3 == 2:
            prompt[: length // 2] = prompts[-1][: length // 2]
        prompts.append(prompt)
    return prompts


SETTINGS = {"greedy": {"temperature": 0}, "sampled": {"temperature": 1.0, "top_p": 0.95}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, list[list[int]]]:
    """The answers to each prompt alone, computed once for all tests."""
    return {}


def expected_answers(alone: dict, make, setting: str) -> list[list[int]]:
    if setting not in alone:
        llama = make(3)
        llama._engine.reuse_prefixes = False
        options = {"num_return_sequences": 3, "seed": 1, **SETTINGS[setting]}
        alone[setting] = [row for p in prompts_of_every_length() for row in llama.generate([p], N_NEW, **options)[0]]
    return alone[setting]


@pytest.mark.parametrize("reuse_prefixes", [True, False])
@pytest.mark.parametrize("max_batch_size", [1, 7, 32])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_prompt_of_200_gives_the_tokens_it_gives_alone(alone, make, setting, max_batch_size, reuse_prefixes):
    llama = make(max_batch_size)
    llama._engine.reuse_prefixes = reuse_prefixes
    options = {"num_return_sequences": 3, "seed": 1, **SETTINGS[setting]}
    answers, _ = llama.generate(prompts_of_every_length(), N_NEW, **options)
    assert answers == expected_answers(alone, make, setting)
    if setting == "sampled":
        assert len({tuple(answer) for answer in answers[:3]}) == 3
    assert (llama._engine.counters.reused > 0) == reuse_prefixes


def test_streamed_prompts_give_the_text_they_give_in_a_batch(make):
    llama = make()
    texts = ["".join(chr(32 + i % 90) for i in prompt) for prompt in prompts_of_every_length()]
    for setting in SETTINGS.values():
        together = [p["generation"] for p in llama.text_completion(texts, max_gen_len=N_NEW, seed=2, **setting)]
        streamed = ["".join(llama.stream_text(t, max_gen_len=N_NEW, seed=2, **setting)) for t in texts]
        assert streamed == together


SCRIPT = """
import json, sys
from llama import Llama
folder, model_parallel_size, prompts, out = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3])), sys.argv[4]
llama = Llama.build(folder, None, 512, 4, model_parallel_size, device="cpu")
answers = [llama.generate(prompts, 6, num_return_sequences=3, seed=1, temperature=t, top_p=0.95)[0] for t in (0, 1.0)]
texts = ["".join(chr(32 + i % 90) for i in prompt) for prompt in prompts[:12]]
answers += ["".join(llama.stream_text(t, max_gen_len=6, seed=2, temperature=1.0)) for t in texts]
import torch.distributed as dist
json.dump(answers, open(f"{out}.{dist.get_rank()}", "w"))
"""


@pytest.mark.parametrize("model_parallel_size", [1, 2])
def test_two_processes_give_the_same_tokens_split_or_as_replicas(make, tmp_path, model_parallel_size):
    llama = make(4)
    prompts = prompts_of_every_length()
    expected = [
        llama.generate(prompts, N_NEW, num_return_sequences=3, seed=1, temperature=t, top_p=0.95)[0] for t in (0, 1.0)
    ]
    texts = ["".join(chr(32 + i % 90) for i in prompt) for prompt in prompts[:12]]
    expected += [p["generation"] for p in llama.text_completion(texts, 1.0, max_gen_len=6, seed=2)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [llama.folder, model_parallel_size, tmp_path / "prompts.json", tmp_path / "out"]
    result = ranks(2, tmp_path / "script.py", *arguments)
    assert result.returncode == 0, result.stderr
    for rank in range(2):  # every rank has all the answers
        assert json.loads((tmp_path / f"out.{rank}").read_text()) == expected


def test_a_long_prompt_is_prefilled_in_pieces_while_others_go_on(make):
    llama = make(2, max_seq_len=6000)
    llama.tokenizer.stop_tokens = set()
    generator = torch.Generator().manual_seed(0)
    short, long = ([torch.randint(0, 256, (n,), generator=generator).tolist()] for n in (5, PREFILL_TOKENS + 700))
    expected = [llama.generate(p, 30, temperature=0)[0][0] for p in (short, long)]

    stream = llama.stream_text(llama.tokenizer.decode(short[0]), temperature=0, max_gen_len=30)
    next(stream)  # a sequence that is decoding
    (running,) = llama._engine.running
    widths = []
    prefill = llama._engine._prefill

    def watched(group, starts, first_slot, stops):
        widths.append((stops[0] - starts[0], len(running.tokens)))
        prefill(group, starts, first_slot, stops)

    llama._engine._prefill = watched
    assert llama.generate(long, 30, temperature=0)[0][0] == expected[1]
    assert max(width for width, _ in widths[:20]) <= PREFILL_TOKENS_WHILE_DECODING
    # One more token of the other sequence between any two pieces.
    assert all(b - a == 1 for (_, a), (_, b) in itertools.pairwise(widths) if b < 30)
    "".join(stream)


def test_a_slot_that_ends_is_given_to_the_next_at_once(make):
    llama = make(4)
    llama.tokenizer.stop_tokens = set()
    budgets = [1, 40, 2, 3, 40, 1, 5, 8, 13, 2, 1, 1]
    n_running = []
    decode = llama._engine._decode
    llama._engine._decode = lambda: (n_running.append(len(llama._engine.running)), decode())
    answers, _ = llama.generate([[i] for i in range(12)], budgets, temperature=0)
    assert [len(answer) for answer in answers] == budgets
    # A decode step for each token but a prompt's first, and no row that has ended among them.
    assert sum(n_running) == sum(budgets) - len(budgets)
    assert len(n_running) <= 42


def test_samples_of_a_prompt_prefill_it_once(make):
    llama = make(8)
    for length in (3, 100):
        before = llama._engine.counters.prefilled
        answers, _ = llama.generate([list(range(length))], 4, num_return_sequences=6, temperature=1.0, seed=0)
        assert len(answers) == 6
        assert llama._engine.counters.prefilled - before == length + 5  # each other sample runs the last token again


def test_the_second_turn_of_a_chat_prefills_only_what_is_new(make):
    llama = make(4, max_seq_len=2048)
    history = [{"role": "user", "content": "x" * 1000}]
    first_prompt = llama.formatter.encode_dialog_prompt(history)
    ((first_answer,), _) = llama.generate([first_prompt], 20, temperature=0)
    history += [{"role": "assistant", "content": llama.tokenizer.decode(first_answer)}]
    history += [{"role": "user", "content": "and now?"}]
    prompt = llama.formatter.encode_dialog_prompt(history)
    counters = llama._engine.counters
    assert (counters.prefilled, counters.reused) == (len(first_prompt), 0)
    second = llama.chat_completion([history], temperature=0, max_gen_len=20)[0]["generation"]
    # Everything after the first turn and its answer. The last token of the answer has no key yet.
    known = [*first_prompt, *first_answer[:-1]]
    n_known = next((i for i, (a, b) in enumerate(zip(known, prompt)) if a != b), len(known))
    assert n_known >= len(first_prompt) > 1000
    assert (counters.prefilled, counters.reused) == (len(first_prompt) + len(prompt) - n_known, n_known)
    fresh = make(4, max_seq_len=2048)
    assert fresh.generate([prompt], 20, temperature=0)[0][0] == llama.generate([prompt], 20, temperature=0)[0][0]
    assert second["content"] == llama.tokenizer.decode(fresh.generate([prompt], 20, temperature=0)[0][0])


def test_a_shared_system_prompt_is_prefilled_once(make):
    llama = make(8)
    system = list(range(100, 200))
    prompts = [[*system, i, i + 1] for i in range(8)]
    llama.generate(prompts, 1, temperature=0)
    assert llama._engine.counters.prefilled == 102 + 7 * 2


def test_rows_whose_padding_would_leave_the_cache_are_right(make):
    llama = make(4, max_seq_len=256)
    shared = list(range(240))
    prompts = [shared, [*shared[:230], *range(20)], [9] * 60]
    expected = [llama.generate([p], temperature=0, max_gen_len=5)[0][0] for p in prompts]
    for _ in range(2):  # the second time with prefixes of very unequal length in the slots
        assert llama.generate(prompts, temperature=0, max_gen_len=5)[0] == expected


def test_nan_logits_end_their_row_and_not_the_others(make):
    llama = make(4)
    prompts = [[1, 2], [77, 3], [4, 5, 6]]
    expected, _ = llama.generate(prompts, 8, temperature=0)
    engine = llama._engine
    step = engine.decode_step

    def damaged(*inputs):
        logits = step(*inputs).clone()
        for row, sequence in enumerate(engine.running):
            if sequence.prompt[0] == 77 and len(sequence.tokens) == 3:
                logits[row, 5] = float("nan")
        return logits

    engine.decode_step = damaged
    with pytest.raises(GenerationError, match="prompt 1: the model's logits are NaN or infinite") as caught:
        llama.generate(prompts, 8, temperature=0)
    groups = caught.value.answers
    assert [group[0].finish_reason == "error" for group in groups] == [False, True, False]
    assert [groups[0][0].tokens, groups[2][0].tokens] == [expected[0], expected[2]]
    assert groups[1][0].tokens == expected[1][:3]  # the answer so far is kept


def test_closing_a_stream_frees_its_slot_and_streams_can_interleave(make):
    llama = make(2)
    llama.tokenizer.stop_tokens = set()
    whole = "".join(llama.stream_text("ab", temperature=0, max_gen_len=20))
    one, two = (llama.stream_text("ab", temperature=0, max_gen_len=20) for _ in range(2))
    pieces = [next(one), next(two), next(one)]
    assert len(llama._engine.running) == 2
    two.close()
    assert len(llama._engine.running) == 1
    # A whole call in between shares the batch with the stream.
    assert llama.text_completion(["ab"], temperature=0, max_gen_len=20)[0]["generation"] == whole
    assert pieces[0] + pieces[2] + "".join(one) == whole
    assert llama._engine.running == []


def test_two_chats_that_take_turns_each_keep_their_history(make):
    llama = make(4)
    chats = [[100 + i] * 60 for i in range(2)]
    for chat in chats:
        llama.generate([chat], 1, temperature=0)
    before = llama._engine.counters.prefilled
    for _ in range(3):
        for chat in chats:
            chat += [7, 8, 9]
            llama.generate([chat], 1, temperature=0)
    assert llama._engine.counters.prefilled - before == 6 * 3


def test_chats_of_a_batch_each_keep_their_history(make):
    llama = make(4)
    chats = [[100 + i] * (50 + 10 * i) for i in range(4)]
    llama.generate(chats, [1, 9, 3, 5], temperature=0)
    before = llama._engine.counters.prefilled
    llama.generate([[*chat, 7, 8] for chat in chats], 1, temperature=0)
    assert llama._engine.counters.prefilled - before == 4 * 2


def test_a_stream_goes_on_while_prompts_come_and_end_at_once(make):
    llama = make(2)
    llama.tokenizer.stop_tokens = set()
    stream = llama.stream_text("ab", temperature=0, max_gen_len=200)
    next(stream)
    (sequence,) = llama._engine.running
    before = len(sequence.tokens)
    llama.generate([[i, 5] for i in range(30)], 1, temperature=0)  # each ends with its prefill
    assert len(sequence.tokens) - before >= 29
    stream.close()


class Broken(Exception):
    pass


def test_a_processor_that_raises_ends_its_prompt_and_leaves_streams_alone(make):
    llama = make(4)
    llama.tokenizer.stop_tokens = set()
    expected = [p["generation"] for p in llama.text_completion(["stream of mine"], temperature=0, max_gen_len=30)]
    fresh, _ = llama.generate([[1], [3]], 8, temperature=0)

    def breaks(ids, scores):
        if ids[0, 0] == 2 and ids.shape[1] == 4:
            raise Broken("by accident")
        return scores

    stream = llama.stream_text("stream of mine", temperature=0, max_gen_len=30)
    pieces = [next(stream), next(stream)]
    with pytest.raises(GenerationError, match="prompt 1: logits_processor breaks raised Broken: by accident") as caught:
        llama.generate([[1], [2], [3]], 8, temperature=0, logits_processor=breaks)
    assert isinstance(caught.value.__cause__, Broken)
    assert [group[0].tokens for group in caught.value.answers][::2] == fresh
    assert "".join([*pieces, *stream]) == expected[0]


@pytest.mark.parametrize("n_calls", range(60, 6000, 431))
def test_an_interrupt_beside_an_open_stream_changes_nothing(make, n_calls):
    llama = make(3)
    llama.tokenizer.stop_tokens = set()
    text = "a text of some length to begin with"
    expected = llama.text_completion([text], temperature=0, max_gen_len=20)[0]["generation"]
    stream = llama.stream_text(text, temperature=0, max_gen_len=20)
    pieces = [next(stream)]
    calls = itertools.count()

    def trace(frame, event, argument):  # Ctrl-C at some call inside the package
        if "llama" in frame.f_code.co_filename and next(calls) == n_calls:
            signal.raise_signal(signal.SIGINT)

    sys.setprofile(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            llama.generate([[i] * 20 for i in range(9)], 20, temperature=0)
    finally:
        sys.setprofile(None)
    assert "".join([*pieces, *stream]) == expected
    assert llama._engine.running == [] and not llama._engine.waiting
    for tokens in [list(held) for held in llama._engine.slots.tokens]:  # the slots hold what their records say
        if len(tokens) > 16:
            reused = llama.generate([[*tokens, 5]], 4, temperature=0)
            fresh = make(1)
            fresh.tokenizer.stop_tokens = set()
            assert reused == fresh.generate([[*tokens, 5]], 4, temperature=0)


def test_running_out_of_memory_ends_what_was_running_and_the_next_call_is_right(make):
    llama = make(2)
    expected = llama.generate([[1, 2, 3]], 5, temperature=0)
    hidden_states = llama.model.hidden_states
    llama.model.hidden_states = lambda *_: (_ for _ in ()).throw(MemoryError("none left"))
    with pytest.raises(MemoryError, match="none left"):
        llama.generate([[1, 2, 3], [4]], 5, temperature=0)
    llama.model.hidden_states = hidden_states
    assert llama.generate([[1, 2, 3]], 5, temperature=0) == expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 3}])
def test_progress_counts_every_prompt(make, monkeypatch, options):
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, file=io.StringIO())
            bars.append((self, self.disable))

    monkeypatch.setattr(answering, "tqdm", Bar)
    make(4).generate([[1], [2] * 30, [3]], [5, 7, 0], temperature=0, progress=True, **options)
    assert [(bar.n, bar.total, disabled) for bar, disabled in bars] == [(3, 3, False)]


def test_beams_scores_and_samples_run_beside_open_streams(make):
    llama = make(4)
    llama.tokenizer.stop_tokens = set()
    text = llama.text_completion(["ab"], temperature=0, max_gen_len=60)[0]["generation"]
    beams = llama.generate([[1, 2], [3]], 5, temperature=0, num_beams=4)
    scores = llama.score(["a text to score"])
    streams = [llama.stream_text("ab", temperature=0, max_gen_len=60) for _ in range(3)]
    pieces = [next(stream) for stream in streams]
    # Four beams wait until all streams have ended, though nobody has read their pieces.
    assert llama.generate([[1, 2], [3]], 5, temperature=0, num_beams=[4, 4]) == beams
    assert llama.score(["a text to score"]) == scores
    assert [piece + "".join(stream) for piece, stream in zip(pieces, streams)] == [text] * 3


def test_a_model_that_callers_may_change_is_never_run_with_stale_keys(make):
    prompt = list(range(100, 160))
    llama, fresh = make(4), make(4)
    plain, _ = llama.generate([prompt], 8, temperature=0)
    model = llama.model  # from here on it may change at any time
    for other in (model, fresh.model):
        hook = lambda module, args, output: output + 3.0  # noqa: E731
        other.layers[0].register_forward_hook(hook)
    steered, _ = fresh.generate([prompt], 8, temperature=0)
    assert llama.generate([prompt], 8, temperature=0)[0] == steered != plain
    model.layers[0]._forward_hooks.clear()
    assert llama.generate([prompt], 8, temperature=0)[0] == plain
    model(torch.tensor([[7] * 100]))  # overwrites what a slot held
    assert llama.generate([prompt], 8, temperature=0)[0] == plain
    # Within one call the prompt still runs only once.
    before = llama._engine.counters.prefilled
    llama.generate([prompt], 8, temperature=1.0, num_return_sequences=4)
    assert llama._engine.counters.prefilled - before == len(prompt) + 3


def test_a_model_that_callers_cannot_change_reuses_prefixes(make):
    llama = make(4)
    llama.generate([list(range(100, 160))], 1, temperature=0)
    llama.generate([list(range(100, 160))], 1, temperature=0)
    assert llama._engine.counters.reused == 59
