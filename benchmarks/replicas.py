"""How much time a second replica saves: `run_batch` on one replica of one thread, and on two, with the same rows.

    python -m benchmarks.replicas [--rounds 2] [--n_rows 128]

Samples texts of the embedded checkpoint in float32, on replicas that Ray starts on this machine. The two take turns;
times are in seconds, without the loading. At the end a replica of two ranks answers the same rows. All answers are
compared with those of this process.
"""

import functools
import statistics
import time
from pathlib import Path

import fire
import torch

from llama import Llama
from llama.datasets.batch import run_batch
from llama.datasets.runs import RemoteModel

DEMO = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"


def build(size: int = 1) -> Llama:
    torch.set_num_threads(1)
    llama = Llama.build(DEMO, None, 256, 8, size, dtype="float32", device="cpu")
    llama.tokenizer.stop_tokens = set()
    return llama


def answers(model: Llama | RemoteModel, rows: list[dict]) -> tuple[float, dict[int, list[int]]]:
    """How long the rows take, and the answers."""
    started = time.perf_counter()
    found = {record["line"]: record["token_ids"] for record in run_batch(model, rows, seed=0)}
    return time.perf_counter() - started, found


def main(rounds: int = 2, n_rows: int = 128) -> None:
    """Prints the median times and their ratio.

    Args:
        rounds: how many turns each has, of two runs each.
        n_rows: prompts of 11 to 50 tokens, 100 new tokens each.
    """
    rows = [{"tokens": [1, *range(100 + i, 110 + i + i % 40)], "max_gen_len": 100} for i in range(n_rows)]
    n_threads = torch.get_num_threads()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    found = {"here": [answers(build(), rows)[1]], "replicas": [], "two ranks": []}
    torch.set_num_threads(n_threads)
    for _ in range(rounds):
        for n, times in seconds.items():
            with RemoteModel(build, n, device="cpu") as model:
                while model.replicas.n_alive < n:
                    answers(model, rows[:16])  # until all have loaded
                for _ in range(2):
                    took, answered = answers(model, rows)
                    times.append(took)
                    found["replicas"].append(answered)
    with RemoteModel(functools.partial(build, 2), 1, 2, device="cpu") as model:
        found["two ranks"].append(answers(model, rows)[1])
    one, two = (statistics.median(times) for times in seconds.values())
    print(f"{n_rows} rows: {one:.2f} s on one replica, {two:.2f} s on two, {two / one:.2f} of it (bar 0.6)")
    for name in ("replicas", "two ranks"):
        same = "the same answers" if all(a == found["here"][0] for a in found[name]) else "NOT the same answers"
        print(f"{name}: {same} as one process without Ray")


if __name__ == "__main__":
    fire.Fire(main)
