"""The rows of a data set: tasks made of them, answered on any number of replicas, and the records of what came of it.

Rank 0 reads and writes; each replica takes a task whenever it has room. Knows nothing of what a task asks.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from llama import parallel
from llama.datasets.fingerprint import fingerprint
from llama.datasets.journal import Journal
from llama.datasets.rows import Row, Rows
from llama.datasets.task_queue import TaskQueue
from llama.generation import Llama
from llama.options import DecodingOptions


@dataclass(frozen=True)
class Run:
    """What is done with each row.

    Attributes:
        task_of: on rank 0, what a replica has to know of a row, in terms of JSON. Raises ValueError or TypeError.
        answer: on every process, answers tasks as long as there are any, and gives word of each: a dictionary with the
            task's `line`, and an `error` where it failed, as that of a row of which no task could be made. Yields
            whenever one is done.
        record_of: on rank 0, the record of a row, of its task and of what was said of this.
        as_json: the columns of a CSV file that hold JSON.
    """

    task_of: Callable[[Row], dict[str, Any]]
    answer: Callable[[TaskQueue], Iterator[None]]
    record_of: Callable[[Row, dict[str, Any], dict[str, Any]], dict[str, Any]]
    as_json: Collection[str] = ()

    def records(self, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
        """On rank 0, the record of each row as it is done; on the others, nothing, while they answer."""
        open_rows: dict[int, tuple[Row, dict[str, Any]]] = {}

        def tasks() -> Iterator[dict[str, Any]]:
            for row in rows:
                try:
                    if row.error is not None:
                        raise ValueError(row.error)
                    task = {"line": row.number, **self.task_of(row)}
                except (ValueError, TypeError) as error:
                    task = {"line": row.number, "error": str(error)}
                open_rows[row.number] = row, task
                yield task

        def record(said: dict[str, Any]) -> dict[str, Any]:
            return self.record_of(*open_rows.pop(said["line"]), said)

        with TaskQueue(tasks()) as queue:
            for _ in self.answer(queue):
                yield from map(record, queue.results())
            yield from map(record, queue.results(wait=True))


@dataclass(frozen=True)
class Files:
    """Where the rows are and the records go, on rank 0; what is there already is not done again.

    Attributes:
        source, target: .jsonl, .csv or .parquet files; the latter two are made once all rows are done.
        force: whether to start over, whatever the target holds.
        retry: whether rows that failed are tried again; if not, they count as done.
    """

    source: str | os.PathLike
    target: str | os.PathLike
    force: bool = False
    retry: bool = False

    def write(
        self,
        run: Run,
        parameters: dict[str, Any],
        shown: Callable[[Iterator[dict[str, Any]], Journal], Iterable[dict[str, Any]]],
    ) -> Journal | None:
        """Writes the records of the rows that are not done; every process calls this.

        Args:
            run: what is done with a row.
            parameters: all that the records depend on besides the rows, in terms of JSON.
            shown: yields the records that it is given, and does what it likes with them on the way.

        Returns:
            on rank 0, the journal, closed.

        Raises:
            FileNotFoundError, ValueError, TypeError: as `Rows` and `Journal`. Nothing has run then.
            BlockingIOError: another run is writing the target.
            OSError: the target cannot be written on.
        """
        journal, rows = None, ()
        with parallel.fail_together():
            if dist.get_rank() == 0:
                rows = Rows(self.source, run.as_json)
                journal = Journal(self.target, rows, parameters, self.force, self.retry)
        try:
            with parallel.fail_at_once():
                if journal is None:
                    deque(run.records(()), maxlen=0)
                else:
                    for record in shown(run.records(row for row in rows if row.number not in journal.done), journal):
                        journal.append(record)
                    journal.finish()
                parallel.gather_from_replicas([])  # none goes on before all are done
        finally:
            if journal is not None:
                journal.close()
        return journal


def decoding_parameters(llama: Llama, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """What answers depend on besides their prompts, in terms of JSON; every process calls this.

    Options that are not given have their defaults, so that saying one changes nothing.
    """
    options = {name: value for name, value in vars(DecodingOptions(**options)).items() if name != "seed"}
    if (processor := options.pop("logits_processor")) is not None:
        options["logits_processor"] = getattr(processor, "__qualname__", type(processor).__qualname__)
    return {"model": fingerprint(llama), "options": options, "seed": seed}


def line_seed(seed: int, id: str | int | None) -> int:
    """The seed of a line, of 48 bits: a function of the run's and of the line's id."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {id}".encode(errors="replace"), digest_size=6).digest(), "little")
