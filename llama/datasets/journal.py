"""The answers to the rows of a file, written as they come, a line each, so that a killed run can go on.

What is written is a journal of JSON lines: it only ever grows by whole lines, from one writer. Beside it, OUT.run.json
says to which rows and parameters it belongs. CSV and Parquet files, which do not grow by lines, are made of a journal
(OUT.jsonl, beside them) in the end. Knows nothing of models; what a record holds is its writer's business.
"""

import contextlib
import csv
import io
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama.datasets.rows import Row, Scan, format_of, import_pyarrow, scan

try:
    import fcntl
except ImportError:  # Windows, which has no flock: nothing keeps a second writer away there
    fcntl = None

# After this many seconds of writing, what was written is forced to the disk: so much a power failure may cost.
SYNC_SECONDS = 5.0


def check_target(path: str | os.PathLike, *inputs: str | os.PathLike) -> None:
    """What can be said of an output before there is anything to write.

    Args:
        path: of the answers.
        inputs: files that are read, none of which may be written over.

    Raises:
        ValueError: its name ends in none of the formats; it, its journal or what is beside it is an input.
        OSError: it is a directory, or its directory is not there or cannot be written on.
        ImportError: it needs pyarrow.
    """
    path = Path(path)
    if format_of(path) == ".parquet":
        import_pyarrow()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: expected the name of a file for the answers")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} for {path.name}: make it, or choose another")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"nothing can be written in {path.parent}: choose another directory for {path.name}")
    for file in (path, *_beside(path)):
        for source in inputs:
            if file.exists() and os.path.samefile(source, file):
                use = "" if file == path else f", which writing {path} would overwrite"
                raise ValueError(f"{file} is the input{use}: expected another file for the answers")


def _beside(path: Path) -> tuple[Path, Path]:
    """The journal of an output, which may be the output itself, and what says to which run it belongs."""
    is_journal = format_of(path) in (".jsonl", ".ndjson")
    return path if is_journal else path.with_name(path.name + ".jsonl"), path.with_name(path.name + ".run.json")


class Output:
    """The answers to the rows of a file, written as they come; at most one writer at a time.

    Args:
        path: of the answers, in one of the formats.
        rows: what is answered, which is gone through once here.
        parameters: all else that the answers depend on, in terms of JSON.
        force: whether to start over, whatever is there.
        retry: whether to forget the answers with an `error`, or with a null among their `scores`, so that they are
            tried again.

    Attributes:
        n_rows: how many rows there are.
        done: the numbers of those that were answered by an earlier run,
        n_failed: and how many of them with an `error`.

    Raises:
        BlockingIOError: another run is writing it.
        ValueError: it belongs to other rows or parameters, is no output of ours, or is the input; or as `scan`.
        OSError, ImportError: it cannot be written; or as `check_target`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        rows: Iterable[Row],
        parameters: dict[str, Any],
        force: bool = False,
        retry: bool = False,
    ):
        self.path = Path(path)
        source = getattr(rows, "path", None)
        check_target(self.path, *([] if source is None else [source]))
        self.journal, self._sidecar = _beside(self.path)
        is_ours = self.journal == self.path or (self.journal.exists() and self._sidecar.exists())
        if self.path.exists() and not (is_ours or force):
            raise ValueError(
                f"{path} is there already, and no {self.journal.name} with {self._sidecar.name} says that a run wrote "
                "it: expected a new file, or --force to write it anew"
            )
        self._file = self._lock()
        self.done: set[int] = set()
        self.n_failed = 0
        self._synced = time.monotonic()
        is_empty = force or os.fstat(self._file).st_size == 0
        try:
            before = None if is_empty else self._read_sidecar()
            if before is None and not is_empty:
                raise ValueError(
                    f"{self.journal} is there already, and no {self._sidecar.name} says what it belongs to: "
                    "expected a new file, or --force to write it anew"
                )
            found = scan(rows, before["rows"] if before else -1)
            self.n_rows = found.n_rows
            # Through JSON, as they will be read again: tuples are lists in it.
            parameters = json.loads(json.dumps(parameters))
            if before is not None:
                self._check(before, found, parameters)
                self._resume(retry, found.last)
            else:
                os.ftruncate(self._file, 0)
            writer = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
            content = {"rows": found.n_rows, "digest": found.digest, "parameters": parameters, "writer": writer}
            with replacing(self._sidecar) as file:
                file.write(json.dumps(content, ensure_ascii=False, indent=1).encode(errors="replace") + b"\n")
        except BaseException:
            if os.fstat(self._file).st_size == 0 and not self._sidecar.exists():
                self.journal.unlink()  # made here, for nothing
            os.close(self._file)
            raise
        self._size = os.fstat(self._file).st_size

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, record: dict[str, Any]) -> None:
        """Adds an answer, as one line in one write; its `line` is the number of the row.

        Raises:
            OSError: the disk is full, say. What is there ends with a whole line, then as ever.
        """
        line = to_json(record) + b"\n"
        try:
            if (n := os.write(self._file, line)) < len(line):
                os.write(self._file, line[n:])  # says what the matter is
        except OSError as error:
            os.ftruncate(self._file, self._size)
            problem = f"{error.strerror}: the answers so far are whole; the same command goes on from there"
            raise OSError(error.errno, problem, str(self.journal)) from error
        self._size += len(line)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Forces what was written to the disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Ends the writing; another run may go on with it."""
        try:
            self.sync()
        finally:
            os.close(self._file)

    def finish(self) -> None:
        """Makes the CSV or Parquet file of the journal, in the order of the rows; all of it or nothing of it."""
        if self.journal != self.path:
            with self.journal.open("rb") as file:
                records = sorted(map(json.loads, file), key=lambda record: record["line"])
            write = _write_csv if format_of(self.path) == ".csv" else _write_parquet
            with replacing(self.path) as file:
                write(file, records)

    def _lock(self) -> int:
        """The journal, opened to append to, and locked for as long as it is open."""
        while True:
            file = os.open(self.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), os.stat(self.journal)):
                    return file
            except BlockingIOError:
                os.close(file)
                holder = "another run"
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    holder = "process {pid} on {host}, since {since}".format(
                        **json.loads(self._sidecar.read_bytes())["writer"]
                    )
                raise BlockingIOError(
                    f"{self.path} is being written by {holder}: wait for that run, or choose another output"
                ) from None
            except FileNotFoundError:
                pass
            os.close(file)  # replaced in between

    def _read_sidecar(self) -> dict | None:
        """What the journal belongs to; None if that is not known."""
        try:
            content = json.loads(self._sidecar.read_bytes())
            for name, kind in (("rows", int), ("digest", str), ("parameters", dict)):
                if not isinstance(content, dict) or not isinstance(content.get(name), kind):
                    raise ValueError(f"it has no {name}")
            return content
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self._sidecar} is damaged ({error}): expected what a run wrote; --force starts over"
            ) from None

    def _check(self, before: dict, found: Scan, parameters: dict) -> None:
        """Refuses rows and parameters that are not those of the run before, but for rows that are new at the end."""
        changes = []
        if found.n_rows < before["rows"]:
            changes.append(f"the input had {before['rows']} lines, and has {found.n_rows}")
        elif found.digest_of_first != before["digest"]:
            changes.append(f"the input's first {before['rows']} lines were others")
        changes += differences(before["parameters"], parameters)
        if changes:
            raise ValueError(
                f"{self.path} belongs to another run: {'; '.join(changes)}. Choose another output, or --force to "
                "write it anew"
            )

    def _resume(self, retry: bool, last: int) -> None:
        """Reads which rows are done, of numbers up to `last`, and cuts off a last line that was not completed."""
        kept: list[bytes] = []
        end = 0
        broken: tuple[int, str] | None = None
        with self.journal.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    if not line.endswith(b"\n"):
                        raise ValueError("it has no end")
                except (ValueError, RecursionError) as error:
                    broken = broken or (number, str(error))
                    continue
                row = record.get("line") if isinstance(record, dict) else None
                if broken is None and not (type(row) is int and 1 <= row <= last):
                    broken = number, f"line = {row!r}: expected the number of a line of the input, from 1 to {last}"
                if broken is not None:  # and not only the end, as after a kill or a power failure
                    raise ValueError(
                        f"line {broken[0]} of {self.journal} is not an answer ({broken[1]}): "
                        "delete that line, and start the same command again"
                    )
                failed, end = "error" in record, end + len(line)
                again = retry and (failed or None in (record.get("scores") or ()))
                if not again:
                    self.done.add(row)
                    self.n_failed += failed
                if retry and not again:
                    kept.append(line)
        if not retry:
            os.ftruncate(self._file, end)
            return
        with replacing(self.journal) as file:
            file.writelines(kept)
        old, self._file = self._file, self._lock()
        os.close(old)


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two things of JSON, each with its name, its value before and its value now."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(n for n in now if n not in before)]
        return [d for n in names for d in differences(before.get(n), now.get(n), f"{name}.{n}" if name else n)]
    return [] if before == now else [f"{name} was {_short(before)}, and is {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def to_json(value: Any) -> bytes:
    """One line of strict JSON in UTF-8; what JSON has no number for (NaN, inf) is null."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, default=str)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return json.dumps(json.loads(text)).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A file to write to that takes the place of `path` once it is whole, and is gone if anything is raised."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _columns(records: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


def _write_csv(file: Any, records: list[dict]) -> None:
    """Text as it is, all else as JSON; nothing for what a record does not have, as for a text that is empty."""
    text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
    writer = csv.writer(text)
    columns = _columns(records)
    writer.writerow(columns)
    for record in records:
        cells = (record.get(name) for name in columns)
        writer.writerow(
            "" if c is None else c if isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in cells
        )
    text.flush()
    text.detach()


def _write_parquet(file: Any, records: list[dict]) -> None:
    """A column whose values are of several types, such as ids of text and numbers, is text: strings, else JSON."""
    pyarrow = import_pyarrow()
    arrays = {}
    for name in _columns(records):
        values = [record.get(name) for record in records]
        try:
            arrays[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError):
            texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
            arrays[name] = pyarrow.array(texts, pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table(arrays), file)
