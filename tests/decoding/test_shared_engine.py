"""Many callers of one `Llama`: threads, asyncio, closed streams, exceptions and Ctrl-C, against each call alone."""

import asyncio
import itertools
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ranks, run_python

from llama import GenerationError, Llama

N_THREADS = 6


@pytest.fixture
def make(write_checkpoint) -> Callable[..., Llama]:
    folder = write_checkpoint("shared")

    def build(max_batch_size: int = 4, max_seq_len: int = 256) -> Llama:
        llama = Llama.build(folder, None, max_seq_len, max_batch_size, device="cpu")
        llama.folder = folder
        return llama

    return build


class Broken(Exception):
    pass


def breaks(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if ids.shape[1] % 7 == 3:
        raise Broken("as it was meant to")
    return logits


def some_call(n: int) -> Callable[[Llama], object]:
    """The n-th of a fixed list of calls of every kind; some are refused, and some fail."""
    draw = random.Random(n)
    prompts = [[draw.randrange(256) for _ in range(draw.choice((1, 5, 40, 90)))] for _ in range(draw.choice((1, 1, 3)))]
    text = "".join(chr(draw.randrange(32, 120)) for _ in range(draw.choice((3, 30))))
    length = draw.choice((1, 3, 8))

    def stream(llama: Llama, n_pieces: int | None = None) -> list[str]:
        return list(itertools.islice(llama.stream_text(text, temperature=1.0, seed=n, max_gen_len=length), n_pieces))

    calls: list[Callable[[Llama], object]] = [
        lambda llama: llama.generate(prompts, length, temperature=0),
        lambda llama: llama.generate(prompts, length, temperature=1.0, seed=n, num_return_sequences=2, logprobs=True),
        lambda llama: llama.generate(prompts, length, temperature=0, num_beams=3, num_return_sequences=2),
        lambda llama: llama.score([text, *prompts]),
        lambda llama: llama.score_tokens([([*prompt, *range(5)], len(prompt)) for prompt in prompts]),
        lambda llama: llama.chat_completion([[{"role": "user", "content": text}]], temperature=0, max_gen_len=length),
        lambda llama: stream(llama),
        lambda llama: stream(llama, 1),  # and closed
        lambda llama: llama.generate([[1], []], length),
        lambda llama: llama.generate(prompts, length, temperature=0, logits_processor=breaks),
    ]
    return calls[n % len(calls)]


def outcome(llama: Llama, n: int) -> object:
    """What a call returns, or how it fails."""
    try:
        result = some_call(n)(llama)
    except ValueError as error:
        return str(error)
    except GenerationError as error:
        return str(error), [[a.tokens for a in group] for group in error.answers], type(error.__cause__)
    return rounded(result)


def rounded(result: object) -> object:
    """Log-probabilities to five digits: another batch shape adds in another order."""
    if isinstance(result, float):
        return round(result, 4)
    if isinstance(result, (list, tuple)):
        return [rounded(item) for item in result]
    if isinstance(result, dict):
        return {name: rounded(item) for name, item in result.items()}
    return [rounded(result.logprobs), result.is_greedy] if hasattr(result, "is_greedy") else result


def nearly_equal(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) < 2e-4
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(nearly_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(nearly_equal(a[name], b[name]) for name in a)
    return a == b


def assert_idle(llama: Llama) -> None:
    engine, shared = llama._engine, llama.answerer.shared
    assert not engine.has_work
    assert not shared.owners and not shared.sleepers and shared.driver is None


def test_six_threads_of_every_kind_of_call_get_what_each_call_gets_alone(make):
    alone, llama = make(), make()
    n_calls = 60
    expected = [outcome(alone, n) for n in range(N_THREADS * n_calls)]

    def caller(thread: int) -> list[object]:
        return [outcome(llama, n) for n in range(thread, N_THREADS * n_calls, N_THREADS)]

    with ThreadPoolExecutor(N_THREADS) as threads:
        found = list(threads.map(caller, range(N_THREADS)))
    for thread, results in enumerate(found):
        for n, result in zip(range(thread, N_THREADS * n_calls, N_THREADS), results):
            assert nearly_equal(result, expected[n]), f"call {n}"
    assert_idle(llama)
    # They ran in one batch: fewer steps than one after the other.
    assert llama.answerer.shared.n_steps < 0.6 * alone.answerer.shared.n_steps


def test_the_pieces_of_a_stream_are_those_it_has_alone_however_far_others_have_driven_it(make):
    llama = make()
    llama.tokenizer.stop_tokens = set()
    options = {"temperature": 1.0, "seed": 3, "max_gen_len": 40}
    alone = list(llama.stream_text("ab", **options))
    stream = llama.stream_text("ab", **options)
    pieces = [next(stream)]
    llama.generate([[1]], 20, temperature=0)  # runs twenty steps, also for the stream's sequence
    assert pieces + list(stream) == alone


def test_asyncio_through_threads_gets_the_same(make):
    alone, llama = make(), make()
    numbers = list(range(40))

    async def gather() -> list[object]:
        return await asyncio.gather(*(asyncio.to_thread(outcome, llama, n) for n in numbers))

    for n, result in zip(numbers, asyncio.run(gather())):
        assert nearly_equal(result, outcome(alone, n)), f"call {n}"
    assert_idle(llama)


def test_more_threads_than_slots_are_served_first_come_first_served(make):
    """The engine has one queue: the sequence that was added first runs first, whoever added it."""
    llama = make(max_batch_size=1)
    llama.tokenizer.stop_tokens = set()
    first = []
    streams = [
        llama.stream_text(
            f"{i}", temperature=0, max_gen_len=2, logits_processor=lambda ids, x, i=i: (first.append(i), x)[1]
        )
        for i in range(4)
    ]
    threads = []
    for stream in streams:  # each joins the queue before the next one comes
        added = threading.Event()
        add = llama._engine.add

        def watched(sequence, add=add, added=added):
            add(sequence)
            added.set()

        llama._engine.add = watched
        threads.append(threading.Thread(target=list, args=(stream,)))
        threads[-1].start()
        assert added.wait(60)
        llama._engine.add = add
    for thread in threads:
        thread.join()
    assert list(dict.fromkeys(first)) == [0, 1, 2, 3]


def test_cancelling_frees_the_slot_within_one_step(make):
    llama = make(max_batch_size=4)
    llama.tokenizer.stop_tokens = set()
    streams = [llama.stream_text(text, temperature=0, max_gen_len=100) for text in ("ab", "cd", "ef")]
    for stream in streams:
        next(stream)
    engine = llama._engine
    assert len(engine.running) == 3
    streams[1].close()
    assert len(engine.running) == 2  # at once, because no step was running
    cancelled_during_a_step = []
    step = engine.step

    def closing():
        closer = threading.Thread(target=streams[0].close)  # while the step runs, in another thread
        closer.start()
        closer.join()
        cancelled_during_a_step.append(len(engine.running))
        return step()

    engine.step = closing
    while not cancelled_during_a_step:  # the first pieces are of steps that the other streams have run
        next(streams[2])
    engine.step = step
    assert cancelled_during_a_step == [2]
    assert len(engine.running) == 1  # once that step had ended
    streams[2].close()
    assert_idle(llama)


def test_a_free_slot_is_filled_although_other_answers_to_the_same_prompt_still_run(make):
    """Four answers to each prompt, of very unequal lengths: all four slots are busy until no prompt is left to add."""
    llama = make(max_batch_size=4)
    llama.tokenizer.stop_tokens = set(range(0, 250, 20))
    engine, n_busy, n_prompts = llama._engine, [], 5
    decode = engine._decode

    def counting():
        n_started = len({tuple(sequence.prompt) for sequence in [*llama.answerer.shared.owners]})
        n_done = len(seen - {tuple(sequence.prompt) for sequence in [*llama.answerer.shared.owners]})
        seen.update(tuple(sequence.prompt) for sequence in engine.running)
        if n_started + n_done < n_prompts:
            n_busy.append(len(engine.running))
        decode()

    seen: set[tuple] = set()
    engine._decode = counting
    prompts = [[7 * n, 3, 9] for n in range(n_prompts)]
    tokens, _ = llama.generate(prompts, 60, temperature=1.0, top_p=1.0, num_return_sequences=4, seed=3)
    engine._decode = decode
    assert max(map(len, tokens)) > 2 * sum(map(len, tokens)) / len(tokens)  # unequal
    assert len(n_busy) > 20 and n_busy.count(4) >= 0.9 * len(n_busy), n_busy  # an answer may end with its prefill
    assert_idle(llama)


def test_a_processor_may_not_call_the_model_that_runs_it(make):
    llama = make()

    def calls(ids, logits):
        llama.generate([[1]], 2)
        return logits

    with pytest.raises(GenerationError, match="a logits_processor called the model that runs it"):
        llama.generate([[1]], 2, logits_processor=calls)
    assert_idle(llama)


def test_a_step_that_fails_fails_everybody_in_it_and_nobody_after_it(make):
    llama = make()
    expected = llama.generate([[1, 2]], 5, temperature=0)
    stream = llama.stream_text("ab", temperature=0, max_gen_len=50)
    next(stream)
    hidden_states = llama._engine.model.hidden_states
    llama._engine.model.hidden_states = lambda *_: (_ for _ in ()).throw(MemoryError("none left"))
    with pytest.raises(MemoryError, match="none left"):
        llama.generate([[1, 2]], 5, temperature=0)
    llama._engine.model.hidden_states = hidden_states
    with pytest.raises(GenerationError, match="the step failed: MemoryError: none left"):
        list(stream)
    assert llama.generate([[1, 2]], 5, temperature=0) == expected
    assert_idle(llama)


CTRL_C = """
import signal, sys, threading
from llama import Llama
llama = Llama.build(sys.argv[1], None, 256, 4, device="cpu", dtype="float32")
llama.tokenizer.stop_tokens = set()
alone = [llama.generate([[i, 7]], 120, temperature=0)[0] for i in range(3)]
found = [None] * 3
started = threading.Barrier(4)

def caller(i):
    started.wait()
    found[i] = llama.generate([[i, 7]], 120, temperature=0)[0]

threads = [threading.Thread(target=caller, args=(i,)) for i in range(3)]
for thread in threads:
    thread.start()
started.wait()
seen = []

def interrupt(ids, logits):
    seen.append(1)
    if len(seen) == 20:
        signal.raise_signal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else (
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    return logits

try:
    llama.generate([[9]], 200, temperature=0, logits_processor=interrupt)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
for thread in threads:
    thread.join()
print(found == alone, llama._engine.has_work)
"""


def test_ctrl_c_ends_the_call_of_the_main_thread_and_no_other(make):
    llama = make()
    # Started in the background, a process would ignore Ctrl-C: it has the handler of a foreground one.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + CTRL_C
    result = run_python(code, llama.folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["interrupted", "True False"]


TWO_RANKS = """
import sys, threading
from llama import Llama
llama = Llama.build(sys.argv[1], None, 256, 4, device="cpu")
print(llama.generate([[1, 2]], 3, temperature=0)[0])
problems = []

def second():
    try:
        llama.generate([[1, 2]], 3, temperature=0)
    except RuntimeError as error:
        problems.append(str(error))

thread = threading.Thread(target=second, name="second")
thread.start()
thread.join()
print(problems)
"""


def test_on_two_ranks_a_call_from_a_second_thread_is_refused(make, tmp_path):
    llama = make()
    (tmp_path / "script.py").write_text(TWO_RANKS)
    result = ranks(2, tmp_path / "script.py", llama.folder)
    assert result.returncode == 0, result.stderr
    assert (
        "a call from a second thread, 'second', in a run of 2 processes: expected calls from one thread"
        in result.stdout
    )
