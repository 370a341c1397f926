"""One `Llama` with six threads: the same answers as one call after the other, and how much faster.

    python -m benchmarks.threads [--n_threads 6] [--n_calls 200] [--shape llama-3.2-1b] [--rounds 3]

First each thread makes `n_calls` calls (greedy, sampled, beam, scoring, streams) on a small random float32 model; each
answer is compared with that of the same call alone. Then a few calls of each kind run on a model of `shape` with 8
slots, in threads and one after the other, in turn. Prints the medians of their tokens/s.
"""

import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fire

from benchmarks.shapes import default_folder, write_random_checkpoint, write_small_checkpoint
from llama import Llama

KINDS = ("greedy", "sampled", "beam", "scoring", "stream")


def call(llama: Llama, n: int, most_new: int) -> tuple[object, int]:
    """Makes the n-th of a fixed list of calls. Returns its result, and how many tokens it generated or scored."""
    draw = random.Random(n)
    kind = KINDS[n % len(KINDS)]
    prompt = [draw.randrange(97, 123) for _ in range(draw.randint(4, 60))]
    new = draw.randint(most_new // 2, most_new)
    if kind == "scoring":
        (result,) = llama.score_tokens([(prompt + [draw.randrange(256) for _ in range(new)], len(prompt))])
        return [round(logprob, 3) for logprob in result.logprobs], new
    if kind == "stream":
        text = "".join(llama.stream_text(bytes(prompt).decode(), temperature=1.0, seed=n, max_gen_len=new))
        return text, len(llama.tokenizer.encode(text))
    options = {"greedy": {"temperature": 0}, "sampled": {"temperature": 1.0, "seed": n}}
    beams = {"temperature": 0, "num_beams": 3}
    tokens, _ = llama.generate([prompt], new, **options.get(kind, beams))
    return tokens, len(tokens[0])


def one_after_the_other(llama: Llama, n_calls: int, most_new: int) -> list[tuple[object, int]]:
    return [call(llama, n, most_new) for n in range(n_calls)]


def in_threads(llama: Llama, n_calls: int, most_new: int, n_threads: int) -> list[tuple[object, int]]:
    """Each thread takes every n_threads-th call."""
    with ThreadPoolExecutor(n_threads) as threads:
        shares = threads.map(
            lambda i: [call(llama, n, most_new) for n in range(i, n_calls, n_threads)], range(n_threads)
        )
        results = dict(pair for i, share in enumerate(shares) for pair in zip(range(i, n_calls, n_threads), share))
    return [results[n] for n in range(n_calls)]


def main(
    n_threads: int = 6, n_calls: int = 200, shape: str = "llama-3.2-1b", rounds: int = 3, dtype: str = "bfloat16"
) -> None:
    """Prints how many answers are equal, and the two speeds.

    Args:
        n_threads: callers at a time.
        n_calls: of each thread, on the small model.
        shape: of the large model; "none" leaves the speed out.
        rounds: how many turns each of the two has.
        dtype: of the large model.
    """
    with tempfile.TemporaryDirectory() as name:
        write_small_checkpoint(Path(name), std=0.1)
        alone, shared = (Llama.build(name, None, 256, 8, device="cpu", dtype="float32") for _ in range(2))
        expected = one_after_the_other(alone, n_threads * n_calls, 12)
        found = in_threads(shared, n_threads * n_calls, 12, n_threads)
        same = sum(near(a, b) for (a, _), (b, _) in zip(found, expected))
        print(f"{n_threads} threads x {n_calls} calls, float32: {same} of {len(expected)} answers as alone")
    if shape == "none":
        return
    write_random_checkpoint(default_folder(shape), shape)
    llama = Llama.build(default_folder(shape), None, 512, 8, dtype=dtype)
    llama.tokenizer.stop_tokens = set()
    n, most_new = 5 * n_threads, 24
    call(llama, 0, 4)  # packs the matrices
    speeds: dict[str, list[float]] = {"one after the other": [], f"{n_threads} threads": []}
    for _ in range(rounds):
        for way, run in zip(speeds, (one_after_the_other, lambda *a: in_threads(*a, n_threads))):
            started = time.perf_counter()
            n_tokens = sum(tokens for _, tokens in run(llama, n, most_new))
            speeds[way].append(n_tokens / (time.perf_counter() - started))
    medians = {way: statistics.median(values) for way, values in speeds.items()}
    for way, median in medians.items():
        print(f"{shape} {dtype}, {n} calls, {way}: {median:.1f} tokens/s")
    first, second = medians.values()
    print(f"threads / one after the other: {second / first:.2f} (bar 3)")


def near(a: object, b: object) -> bool:
    """Whether two results are equal; log-probabilities may differ by the rounding of sums in another batch."""
    if isinstance(a, list) and a and isinstance(a[0], float):
        return len(a) == len(b) and all(abs(x - y) < 2e-3 for x, y in zip(a, b))
    return a == b


if __name__ == "__main__":
    fire.Fire(main)
