"""A run over the rows of a data set: makes a task of each row, answers many at a time, and makes a record of each.

Rank 0 reads and writes; each replica takes a task whenever it has room. Knows nothing of what a task asks.
"""

import contextlib
import functools
import hashlib
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from llama import parallel
from llama.datasets.fingerprint import fingerprint, package_digest
from llama.datasets.journal import Journal, Printed
from llama.datasets.prompts import KEYS, from_json
from llama.datasets.rows import Row, Rows, counted
from llama.datasets.task_queue import TaskQueue
from llama.decoding.answering import Answer, Job, Jobs
from llama.generation import Llama
from llama.options import DecodingOptions, check_flags
from llama.parallel.actors import Replicas

N_ERRORS_SHOWN = 10
Task = dict[str, Any]  # JSON, with the `line` of its row; and with an `error` if the row is broken
Result = dict[str, Any]  # JSON, with the `line` of its task, and an `error` if it failed


class Run(ABC):
    """A run over rows. Each kind of run has its own four methods at the end, which say what it does with a row.

    Args:
        llama: the model; None if no task needs it.
        options: the decoding options, for rows without their own; checked here. `seed` is the run's.
    """

    as_json: Collection[str] = KEYS[1:]  # the columns of a CSV file that hold JSON
    streams: bool = False  # whether records may go to standard output
    remote: Callable[[Llama | None], "Run"]  # if `llama` is a RemoteModel: makes this run on a replica

    def __init__(self, llama: "Llama | RemoteModel | None" = None, options: dict[str, Any] | None = None):
        self.llama, self.options = llama, from_json(options or {})
        seed = self.options.pop("seed", None)
        if llama is not None:
            self.seed = llama.answerer.seed if seed is None else seed
            self.option_of({"seed": self.seed})

    def _tasks(self, rows: Iterable[Row], waiting: dict[int, tuple[Row, Task]]) -> Iterator[Task]:
        """The task of each row. Puts both into `waiting`, by the row's number, until the result comes."""
        for row in rows:
            try:
                if row.error is not None:
                    raise ValueError(row.error)
                task = {"line": row.number, **self.task_of(row)}
            except (ValueError, TypeError, ImportError) as error:
                task = {"line": row.number, "error": str(error)}
            waiting[row.number] = row, task
            yield task

    def records(self, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
        """Answers many tasks at a time, on every process. Rank 0 yields the record of each row when it is done."""
        waiting: dict[int, tuple[Row, Task]] = {}
        tasks = self._tasks(rows, waiting)
        if isinstance(self.llama, RemoteModel):
            for result in self.llama.replicas.results(self.remote, tasks, _budget):
                yield self.record_of(*waiting.pop(result["line"]), result)
            return
        queue = TaskQueue(tasks, ahead=1 if self.llama is None else self.llama.answerer.args.max_batch_size)
        with self.open_jobs() as jobs:
            more = True
            while more or jobs.n_open:
                if more and jobs.has_room:
                    more = (task := queue.take()) is not None
                    results = self.begin_all(jobs, [task] if more else [])
                else:
                    results = self.step(jobs)
                for result in results:
                    queue.put(result)
                for result in queue.results(wait=not more and not jobs.n_open):
                    yield self.record_of(*waiting.pop(result["line"]), result)

    def open_jobs(self) -> contextlib.AbstractContextManager:
        """The jobs of the tasks that are being answered."""
        no_jobs = contextlib.nullcontext(SimpleNamespace(n_open=0, has_room=True))
        return no_jobs if self.llama is None else self.llama.open_jobs()

    def begin_all(self, jobs: Jobs, tasks: Iterable[Task]) -> list[Result]:
        """Begins tasks. Returns the results of those that need no job."""
        return self._add(jobs, [self._begin(task) for task in tasks])

    def step(self, jobs: Jobs) -> list[Result]:
        """Runs jobs until some are done. Returns the results of the tasks that are then done."""
        return self._add(jobs, [self.go_on(job, jobs.answers(job)) for job in jobs.step()])

    def _add(self, jobs: Jobs, outcomes: list[list[Job] | Result]) -> list[Result]:
        """Adds the new jobs, and returns the results."""
        for job in [job for outcome in outcomes if isinstance(outcome, list) for job in outcome]:
            jobs.add(job)
        return [outcome for outcome in outcomes if isinstance(outcome, dict)]

    def write(
        self,
        source: str | os.PathLike,
        target: str | os.PathLike,
        parameters: dict[str, Any],
        force: bool = False,
        retry: bool = False,
        progress: bool = False,
        indent: int | None = None,
    ) -> "Summary | None":
        """Writes the records of the rows that have none yet. Returns a summary on rank 0, None on the others.

        Every process calls this; only rank 0 needs the files. Raises as `Rows` and `Journal`, before anything runs.

        Args:
            source, target: .jsonl, .json, .csv or .parquet files; a target of the last three kinds is made once all
                rows are done.
            parameters, force, retry: as in `Journal`.
            progress: whether to show a bar, and why the first rows failed, on stderr.
            indent: the spaces by which the records of a .json target are indented; None: one record a line.
        """
        check_flags(force=force, retry=retry, progress=progress)
        check_indent(indent, target)
        check_stream(target, self.streams)
        journal, rows, summary = None, (), Summary(Path(target))
        if isinstance(self.llama, RemoteModel):
            self.llama.replicas.open(self.remote)  # raises what only a replica can find, before the target opens
        with parallel.fail_together():
            if dist.get_rank() == 0:
                every_row = Rows(source, self.as_json)
                is_file = str(target) != "-"
                journal = Journal(target, every_row, parameters, force, retry) if is_file else Printed(every_row)
                rows = (row for row in every_row if row.number not in journal.done)
                n_done = len(journal.done)
                summary = Summary(journal.path, journal.n_rows, n_done, journal.n_failed, n_done)
        bar = tqdm(total=summary.n_lines, initial=summary.n_done, unit="line", disable=journal is None or not progress)
        with journal or contextlib.nullcontext(), parallel.fail_at_once(), bar:
            for record in self.records(rows):
                journal.append(record)
                summary.add(record, bar, f", {self.llama.replicas}" if isinstance(self.llama, RemoteModel) else "")
            if journal is not None:
                journal.finish(indent)
            parallel.gather_from_replicas([])  # waits until all processes are done
        return None if journal is None else summary

    def option_of(self, options: dict[str, Any]) -> DecodingOptions:
        """The run's options, with those of a row on top. Raises ValueError or TypeError."""
        option = DecodingOptions(**self.options | from_json(options))
        self.llama.answerer.check_option(option)
        return option

    def with_seed(self, options: dict[str, Any], row: Row) -> dict[str, Any]:
        """A row's options, with a seed of its own if they have none."""
        return options if options.get("seed") is not None else options | {"seed": line_seed(self.seed, row.id)}

    def _begin(self, task: Task) -> list[Job] | Result:
        try:
            return task if "error" in task else self.begin(task)
        except (ValueError, TypeError, ImportError) as error:
            return {"line": task["line"], "error": str(error)}

    @abstractmethod
    def task_of(self, row: Row) -> Task:
        """On rank 0: the task of a row, with everything that a replica needs. Raises ValueError or TypeError."""

    @abstractmethod
    def begin(self, task: Task) -> list[Job] | Result:
        """On a replica: a task's first jobs, or its result. Raises ValueError or TypeError."""

    def go_on(self, job: Job, answers: list[Answer]) -> list[Job] | Result:
        """On a replica: the next jobs after the answers to a job, or the result after the last job."""
        raise NotImplementedError  # only runs with jobs need it

    def record_of(self, row: Row, task: Task, result: Result) -> dict[str, Any]:
        """On rank 0: a row's record. It has the row's id and number, its task's `row`, and the result."""
        return {"id": row.id, "line": row.number, **task.get("row", {}), **result}


class RemoteModel:
    """A model on the replicas of a Ray cluster. It has what a run needs of a `Llama` in this process.

    Args:
        build: a function that builds the model on a replica; or a checkpoint's directory, or a dictionary of
            `Llama.build`'s arguments.
        replicas, size, address, device: as in `parallel.actors.Replicas`, as are the errors.
    """

    def __init__(
        self,
        build: Callable[[], Llama | None] | str | os.PathLike | dict[str, Any],
        replicas: int | None = None,
        size: int = 1,
        address: str | None = None,
        device: str | None = None,
    ):
        if not callable(build):
            arguments = build if isinstance(build, dict) else {"ckpt_dir": build}
            size, device = arguments.get("model_parallel_size") or size, arguments.get("device", device)
            build = functools.partial(Llama.build, **arguments)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("replicas are started by Ray: expected one process, without torchrun")
        parallel.initialize(1, torch.device("cpu"))  # groups of this process alone
        expected = {"package": package_digest()}
        self.replicas = Replicas(functools.partial(_Worker, build), replicas, size, address, device, expected)
        self.seed = self.replicas.facts.get("seed", 1)
        self.fingerprint = self.replicas.facts.get("model")
        self.answerer = self  # a run reads `answerer.seed` and calls `answerer.check_option`

    def check_option(self, option: DecodingOptions, name: str = "") -> None:
        """As `Answerer.check_option`."""
        option.check_model(self.replicas.facts["vocab_size"], self.replicas.facts["max_batch_size"], name)

    def __enter__(self) -> "RemoteModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.replicas.close()


class _Worker:
    """A rank of a replica: see `parallel.actors.Worker`."""

    def __init__(self, build: Callable[[], Llama | None]):
        self.llama = build()
        self.open_runs = contextlib.ExitStack()

    def facts(self) -> dict[str, Any]:
        facts = {"package": package_digest(), "room": 16}
        if self.llama is not None:
            names = ("vocab_size", "max_batch_size", "max_seq_len")
            facts |= {name: getattr(self.llama.answerer.args, name) for name in names}
            facts |= {"model": fingerprint(self.llama), "room": facts["max_batch_size"]}
            facts["seed"] = self.llama.answerer.seed
        return facts

    def open(self, make: Callable[[Llama | None], Run]) -> None:
        self.open_runs.close()
        self.run = make(self.llama)
        if self.run.llama is not None:
            self.run.option_of({})  # checks what needs a model, such as a grammar
        self.jobs = self.open_runs.enter_context(self.run.open_jobs())

    def work(self, tasks: list[Task]) -> list[Result]:
        results = self.run.begin_all(self.jobs, tasks)
        while not results and self.jobs.n_open:
            results = self.run.step(self.jobs)
        return results


def _budget(task: Task) -> float:
    """The most tokens of a task's answer, 0 if it does not say; a replica refuses other values later."""
    budget = task.get("options", {}).get("max_gen_len")
    return budget if type(budget) is int else 0


@dataclass
class Summary:
    """What a run over files has done."""

    path: Path  # its journal
    n_lines: int = 0  # rows of the source
    n_done: int = 0  # rows that have a record
    n_failed: int = 0  # rows whose record has an `error`
    n_before: int = 0  # rows that had a record before this run
    n_tokens: int = 0  # in the answers of this run
    seconds: float = 0.0  # from the run's beginning to its last record
    started: float = field(default_factory=time.perf_counter, repr=False)

    def add(self, record: dict[str, Any], bar: tqdm, note: str = "") -> None:
        """Counts a record, updates the bar with a note, and prints why the first rows failed."""
        self.n_done += 1
        self.n_tokens += record.get("answer_tokens", 0)
        self.seconds = time.perf_counter() - self.started
        if "error" in record:
            self.n_failed += 1
            if not bar.disable and self.n_failed <= N_ERRORS_SHOWN:
                more = " (failures after this one are not shown)" if self.n_failed == N_ERRORS_SHOWN else ""
                tqdm.write(f"line {record['line']}: {record['error']}{more}", file=sys.stderr)
        rate = f", {self.n_tokens / self.seconds:.0f} tokens/s" if self.n_tokens else ""
        bar.set_postfix_str(f"{self.n_failed} failed{rate}{note}", refresh=False)
        bar.update()

    def __str__(self) -> str:
        before = f" ({self.n_before:,} of them before)" if self.n_before else ""
        rate = self.n_tokens / max(self.seconds, 1e-9)
        return (
            f"{self.n_done:,} of {counted(self.n_lines, 'line')} done{before}, {self.n_failed:,} of them failed; "
            f"{counted(self.n_tokens, 'token')} in {self.seconds:.1f} s, {rate:,.0f} tokens/s"
        )


def check_stream(target: str | os.PathLike, streams: bool) -> None:
    """Raises ValueError if the target is standard output but the run needs a file."""
    if str(target) == "-" and not streams:
        raise ValueError("-: only `llama batch` reads and writes standard streams: expected a file")


def check_indent(indent: int | None, target: str | os.PathLike) -> None:
    """Raises ValueError if `indent` is out of range, or the target is no .json file."""
    if indent is not None and (type(indent) is not int or not 0 <= indent <= 16):
        raise ValueError(f"indent = {indent!r}: expected an integer from 0 to 16")
    if indent is not None and Path(target).suffix.lower() != ".json":
        raise ValueError(f"indent = {indent} for {target}: expected a target whose name ends in .json")


def decoding_parameters(llama: Llama, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """What answers depend on besides their prompts, as JSON. Collective. Unset options have their defaults in it."""
    options = {name: value for name, value in vars(DecodingOptions(**options)).items() if name != "seed"}
    if (processor := options.pop("logits_processor")) is not None:
        options["logits_processor"] = getattr(processor, "__qualname__", type(processor).__qualname__)
    return {"model": fingerprint(llama), "options": options, "seed": seed}


def line_seed(seed: int, id: str | int | None) -> int:
    """The seed of a row, 48 bits: a function of the run's seed and the row's id."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {id}".encode(errors="replace"), digest_size=6).digest(), "little")
