"""A journal: the records of a run, one JSON line each, written as they come, so that a killed run can go on.

One writer appends whole lines. The sidecar OUT.run.json has the fingerprint of the run's rows, and its parameters. A
CSV, Parquet or JSON target cannot grow line by line: it is made at the end from a journal beside it (OUT.csv.jsonl).
Knows nothing of models, or of a record beyond its `line`, `error` and `scores`.
"""

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llama.datasets.json_file import write_json_array
from llama.datasets.rows import Row, Rows, Scan, counted, format_of, scan
from llama.datasets.tables import import_pyarrow, write_table

try:
    import fcntl
except ImportError:  # Windows has no flock: nothing stops a second writer there
    fcntl = None

# Records are forced to the disk this often, so a power failure loses at most the records of these seconds.
SYNC_SECONDS = 5.0
# The keys that a sidecar must have.
SIDECAR_TYPES = {"rows": int, "digest": str, "parameters": dict}


def check_target(path: str | os.PathLike, *inputs: str | os.PathLike) -> None:
    """Checks an output before there is anything to write. Missing folders are made when the run begins.

    Raises:
        ValueError: its name ends in none of the formats; or it, its journal or its sidecar is one of the inputs.
        OSError: it is a directory, or its place cannot be written.
        ImportError: its format needs pyarrow.
    """
    path = Path(path)
    if format_of(path) in (".csv", ".parquet"):
        import_pyarrow()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: expected the name of a file for the answers")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: expected a directory for {path.name}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"nothing can be written in {folder}: choose another directory for {path.name}")
    for file in (path, *_beside(path)):
        if file.exists() and any(os.path.samefile(source, file) for source in inputs):
            use = "" if file == path else f", which writing {path} would overwrite"
            raise ValueError(f"{file} is the input{use}: expected another file for the answers")


def _beside(path: Path) -> tuple[Path, Path]:
    """The journal of an output and its sidecar."""
    is_journal = format_of(path) in (".jsonl", ".ndjson")
    return path if is_journal else path.with_name(path.name + ".jsonl"), path.with_name(path.name + ".run.json")


class Journal(contextlib.AbstractContextManager):
    """The records of a run. It goes on with the journal that a killed run has left.

    Args:
        rows: the rows of the run; read once here.
        parameters: everything else that the records depend on, as JSON.
        force: whether to start over, and overwrite what is there.
        retry: whether rows whose records have an `error`, or a null among their `scores`, are done again.

    Raises:
        BlockingIOError: another run is writing it.
        ValueError, OSError, ImportError: it belongs to another run; or as `scan` and `check_target`.
    """

    n_rows: int

    def __init__(
        self, target: str | os.PathLike, rows: Iterable[Row], parameters: dict, force: bool = False, retry: bool = False
    ):
        self.target = Path(target)
        check_target(self.target, *([rows.path] if isinstance(rows, Rows) else []))
        self.path, self._sidecar = _beside(self.target)  # the journal is the target itself if that is JSON lines
        missing = [file.name for file in (self.path, self._sidecar) if not file.exists()]
        for file in (self.target, self.path):
            if missing and not force and file.exists() and file.stat().st_size > 0:
                found = f"{file} is there already, and no {' with '.join(missing)} says which run it belongs to"
                raise ValueError(f"{found}: expected a new file, or --force to overwrite it")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._lock()
        self.done: set[int] = set()  # the numbers of the rows that have a record from an earlier run
        self.n_failed = 0  # how many of these records have an `error`
        self._synced = time.monotonic()
        try:
            self._begin(rows, parameters, force, retry)
        except BaseException:
            if os.fstat(self._file).st_size == 0 and not self._sidecar.exists():
                self.path.unlink()  # this call has made it
            os.close(self._file)
            raise
        self._size = os.fstat(self._file).st_size

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, record: dict[str, Any]) -> None:
        """Appends a record, as one line in one write. Raises OSError if the disk is full; earlier lines stay whole."""
        line = _to_json(record)
        try:
            if (n := os.write(self._file, line)) < len(line):
                os.write(self._file, line[n:])  # raises the reason
        except OSError as error:
            os.ftruncate(self._file, self._size)
            problem = f"{error.strerror}: the answers so far are whole; the same command goes on from there"
            raise OSError(error.errno, problem, str(self.path)) from error
        self._size += len(line)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        """Closes the journal. Another run may go on with it."""
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def finish(self, indent: int | None = None) -> None:
        """Makes the CSV, Parquet or JSON target from the journal, in the order of the rows. It appears whole or not.

        A JSON array has one record a line, or records indented by `indent` spaces.
        """
        if self.path == self.target:
            return
        with self.path.open("rb") as file:
            lines = sorted(file, key=lambda line: json.loads(line)["line"])
        with _replacing(self.target) as file:
            if (kind := format_of(self.target)) == ".json":
                write_json_array(file, iter(lines), indent)
            else:
                write_table(file, list(map(json.loads, lines)), is_parquet=kind == ".parquet")

    def _lock(self) -> int:
        """Opens the journal for appending, and locks it until it is closed."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), os.stat(self.path)):
                    return file
            except BlockingIOError:
                os.close(file)
                writer = "another run"
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    found = json.loads(self._sidecar.read_bytes())["writer"]
                    writer = "process {pid} on {host}, since {since}".format(**found)
                hint = "wait for that run, or choose another output"
                raise BlockingIOError(f"{self.target} is being written by {writer}: {hint}") from None
            except FileNotFoundError:
                pass
            os.close(file)  # another run has replaced the journal between open and lock: open the new one

    def _begin(self, rows: Iterable[Row], parameters: dict[str, Any], force: bool, retry: bool) -> None:
        """Checks that the journal belongs to this run, reads which rows are done, and writes the sidecar."""
        is_empty = force or os.fstat(self._file).st_size == 0
        before = None if is_empty else self._read_sidecar()
        found = scan(rows, before["rows"] if before else -1)
        self.n_rows = found.n_rows
        parameters = json.loads(json.dumps(parameters))  # as the sidecar will have them: tuples become lists
        if before is not None:
            try:
                self._check(before, found, parameters)
            except ValueError:
                if self._has_answers():
                    raise
                before = None  # no answer is lost, and the user may have corrected the input or the options
        if before is None:
            os.ftruncate(self._file, 0)
        else:
            self._resume(retry, found.last)
        writer = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
        content = {"rows": found.n_rows, "digest": found.digest, "parameters": parameters, "writer": writer}
        with _replacing(self._sidecar) as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=1).encode(errors="backslashreplace") + b"\n")

    def _read_sidecar(self) -> dict[str, Any]:
        """The sidecar of the run that the journal belongs to. Raises ValueError if it is damaged."""
        try:
            content = json.loads(self._sidecar.read_bytes())
            for name, kind in SIDECAR_TYPES.items():
                if not isinstance(content, dict) or not isinstance(content.get(name), kind):
                    raise ValueError(f"it has no {name}")
            return content
        except (ValueError, RecursionError) as error:
            problem = f"damaged ({error}): expected the sidecar of a run; --force starts over"
            raise ValueError(f"{self._sidecar} is {problem}") from None

    def _check(self, before: dict[str, Any], found: Scan, parameters: dict[str, Any]) -> None:
        """Raises ValueError if rows or parameters have changed since the last run. New rows at the end are allowed."""
        changes = []
        if found.n_rows < before["rows"]:
            changes.append(f"the input had {counted(before['rows'], 'line')}, and has {found.n_rows}")
        elif found.digest_of_first != before["digest"]:
            n = before["rows"]
            first = "the first line of the input has" if n == 1 else f"the first {n:,} lines of the input have"
            changes.append(f"{first} changed")
        changes += differences(before["parameters"], parameters)
        if changes:
            hint = "Choose another output, or --force to overwrite it"
            raise ValueError(f"{self.target} belongs to another run: {'; '.join(changes)}. {hint}")

    def _has_answers(self) -> bool:
        """Whether the journal holds anything besides records of rows that failed before they ran."""
        with self.path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    if record["error"] and not record.get("text") and not record.keys() & {"answers", "turns"}:
                        continue
                except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                    pass
                return True
        return False

    def _resume(self, retry: bool, last: int) -> None:
        """Reads which rows, numbered up to `last`, are done. Cuts off an incomplete last line."""
        kept: list[bytes] = []
        end = 0
        broken: tuple[int, str] | None = None
        with self.path.open("rb") as file:
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
                if broken is not None:  # a kill or a power failure breaks only the last line
                    hint = "delete that line, and start the same command again"
                    raise ValueError(f"line {broken[0]} of {self.path} is not an answer ({broken[1]}): {hint}")
                end += len(line)
                if retry and ("error" in record or None in (record.get("scores") or ())):
                    continue
                self.done.add(row)
                self.n_failed += "error" in record
                if retry:
                    kept.append(line)
        if not retry:
            os.ftruncate(self._file, end)
            return
        with _replacing(self.path) as file:
            file.writelines(kept)
        old, self._file = self._file, self._lock()
        os.close(old)


class Printed(contextlib.AbstractContextManager):
    """Standard output instead of a journal: prints each record as it comes. No run can go on from there."""

    target = path = Path("-")

    def __init__(self, rows: Iterable[Row]):
        self.n_rows, self.done, self.n_failed = scan(rows).n_rows, set(), 0

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()

    def append(self, record: dict[str, Any]) -> None:
        print(_to_json(record).decode(), end="", flush=True)

    def finish(self, indent: int | None = None) -> None:
        """Does nothing."""


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """The differences between two JSON values: the name and both values, shortened, of each."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = before | now
        return [d for n in names for d in differences(before.get(n), now.get(n), f"{name}.{n}" if name else n)]
    texts = [json.dumps(value, ensure_ascii=False) for value in (before, now)]
    was, is_now = (text if len(text) <= 60 else text[:57] + "…" for text in texts)
    return [] if before == now else [f"{name} was {was}, and is {is_now}"]


def _to_json(value: Any) -> bytes:
    """A line of strict JSON in UTF-8. Half of a surrogate pair, which UTF-8 does not have, is escaped."""
    text = json.dumps(_finite(value), ensure_ascii=False, default=str)
    return text.encode(errors="backslashreplace") + b"\n"


def _finite(value: Any) -> Any:
    """The value, with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to. It replaces `path` at the end; after an exception it is removed."""
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
