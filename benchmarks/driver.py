"""How much one driver of replicas can do, measured without a model.

    python -m benchmarks.driver rate [--n 30000]      # rows/s read, handed out, and written, if workers answer at once
    python -m benchmarks.driver resume [--n 1000000]  # seconds until a half-done run goes on, and memory
    python -m benchmarks.driver busy [--n 200]        # how busy workers are that sleep as long as an answer takes

Only the answers are fake: the rows are those of `llama batch`, the workers are Ray's actors, and the records go through
the journal.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire

from benchmarks.shapes import write_small_checkpoint
from llama import Llama
from llama.datasets.batch import _Batch
from llama.datasets.journal import Journal
from llama.datasets.rows import Rows
from llama.datasets.runs import RemoteModel
from llama.parallel import actors
from llama.parallel.actors import Replicas

TEXT = "An answer of some forty characters or so."


class AtOnce(_Batch):
    """A batch whose rows are answered without the model."""

    def begin(self, task: dict[str, Any]) -> dict[str, Any]:
        seed = task["options"]["seed"]
        answer = {"text": TEXT, "finish_reason": "stop", "answer_tokens": 9, "prompt_tokens": 12, "seed": seed}
        return {"line": task["line"], **answer}

    @classmethod
    def on(cls, model: RemoteModel) -> "AtOnce":
        """A run on the driver."""
        run = cls(model, None, False, {})
        run.remote = functools.partial(AtOnce, template=None, logprobs=False, options={})
        return run


def small_model(folder: str) -> Llama:
    return Llama.build(folder, max_seq_len=64, max_batch_size=16, device="cpu")


def write_rows(path: Path, n: int) -> None:
    with path.open("w") as file:
        for number in range(n):
            file.write(
                json.dumps({"id": f"row {number}", "prompt": f"How much is {number} + 1?", "max_gen_len": 32}) + "\n"
            )


def peak_memory() -> float:
    """The most memory that this process has used, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024) / 1.024


def rate(n: int = 30_000, replicas: int = 2) -> None:
    """Prints how many rows a second are handed out and written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small_checkpoint(folder)
        write_rows(folder / "in.jsonl", n)
        with RemoteModel(functools.partial(small_model, name), replicas, device="cpu") as model:
            run, started = AtOnce.on(model), time.perf_counter()
            run.write(folder / "in.jsonl", folder / "out.jsonl", {})
            seconds = time.perf_counter() - started
        ids = {json.loads(line)["id"] for line in (folder / "out.jsonl").open()}
    print(f"{n:,} rows in {seconds:.1f} s: {n / seconds:,.0f} rows/s (bar 3,000), {len(ids):,} ids written")


class First(Exception):
    """Ends a run at its first record."""


class UntilFirst(AtOnce):
    def record_of(self, *_: Any) -> dict[str, Any]:
        raise First


def resume(n: int = 1_000_000) -> None:
    """Prints how long a run with half of its rows done takes until it goes on, and the driver's memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, target = folder / "in.jsonl", folder / "out.jsonl"
        write_small_checkpoint(folder)
        write_rows(source, n)
        Journal(target, Rows(source), {}).close()
        record = {"text": TEXT, "finish_reason": "stop", "answer_tokens": 9, "prompt_tokens": 12, "seed": 2**47}
        with target.open("w") as file:
            for number in range(n // 2):
                file.write(json.dumps({"id": f"row {number}", "line": number + 1, **record}) + "\n")
        command = [sys.executable, "-m", "benchmarks.driver", "resumed", name]
        subprocess.run(command, check=True)  # a new process, because this one has used memory to make the files


def resumed(name: str) -> None:
    """The process that `resume` starts."""
    folder = Path(name)
    with RemoteModel(functools.partial(small_model, name), 1, device="cpu") as model:
        run, before, started = UntilFirst.on(model), peak_memory(), time.perf_counter()
        with contextlib.suppress(First):
            run.write(folder / "in.jsonl", folder / "out.jsonl", {})
        seconds = time.perf_counter() - started
    n_done = sum(1 for _ in (folder / "out.jsonl").open())
    print(f"{2 * n_done:,} rows, {n_done:,} of them done: it goes on after {seconds:.1f} s (bar 30)")
    print(f"the driver's memory: {peak_memory():,.0f} MB at most (bar 500), {before:,.0f} MB of them before any row")


class Sleeper:
    """A worker with 8 slots; each answer takes 2 to 10 s, counted while the worker is in `work`."""

    def __init__(self):
        self.waiting: list[dict[str, Any]] = []
        self.slots: list[list] = []  # [seconds left, task]
        self.chance = random.Random(os.getpid())
        self.at_work = self.in_slots = 0.0  # seconds

    def facts(self) -> dict[str, Any]:
        return {"room": 8}

    def open(self, make: Callable) -> None:
        """A run needs nothing."""

    def work(self, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        started = time.perf_counter()
        self.waiting += tasks
        while self.waiting and len(self.slots) < 8:
            self.slots.append([self.chance.uniform(2, 10), self.waiting.pop(0)])
        time.sleep(min(left for left, _ in self.slots))
        seconds = time.perf_counter() - started
        self.at_work += seconds
        self.in_slots += seconds * len(self.slots) / 8
        for slot in self.slots:
            slot[0] -= seconds
        done = [task for left, task in self.slots if left <= 0]
        self.slots = [slot for slot in self.slots if slot[0] > 0]
        clocks = {"worker": os.getpid(), "now": time.time(), "at_work": self.at_work, "in_slots": self.in_slots}
        return [{"line": task["line"], **clocks} for task in done]


def busy(n: int = 200, seconds: float = 60) -> None:
    """Prints the share of the time that workers are at work, after all have started and filled their slots.

    Args:
        n: how many workers.
        seconds: how long to measure.
    """
    import ray

    os.environ |= {"RAY_worker_register_timeout_seconds": "600"}  # because all start at the same time
    ray.cloudpickle.register_pickle_by_value(actors)  # so that 200 processes need not import torch
    ray.init("local", num_cpus=n, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    replicas, first, last = Replicas(Sleeper, n, device="cpu"), {}, {}
    started, n_rows = None, 0
    for result in replicas.results(os.getpid, ({"line": i, "prompt": TEXT} for i in itertools.count())):
        if started is None and replicas.n_alive == n:
            started = time.time() + 10  # by then each has been full once
        if started is not None and result["now"] > started:
            first.setdefault(result["worker"], result)
            last[result["worker"]] = result
            n_rows += 1
            if result["now"] > started + seconds:
                break
    replicas.close()
    ray.shutdown()
    shares = {}
    for name in ("at_work", "in_slots"):
        parts = [(last[w][name] - first[w][name]) / (last[w]["now"] - first[w]["now"]) for w in first]
        shares[name] = 100 * statistics.fmean(parts)
    print(f"{len(first)} workers of 8 slots, {n_rows / seconds:,.0f} rows/s: ", end="")
    print(f"{shares['at_work']:.1f} % of their time at work (bar 95), {shares['in_slots']:.1f} % of their slots full")


if __name__ == "__main__":
    fire.Fire({"rate": rate, "resume": resume, "resumed": resumed, "busy": busy})
