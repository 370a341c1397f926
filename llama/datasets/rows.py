"""Rows of data files: JSON lines, CSV and Parquet, read one at a time. A broken row is marked, and breaks no other.

Knows nothing of models, or of what a row asks.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.datasets.tables import Cells, read_csv, read_parquet

FORMATS = (".jsonl", ".ndjson", ".csv", ".parquet")
# How deep lists and objects may be nested. Each level takes stack wherever a row is walked, and Python's has an end.
MAX_DEPTH = 100


@dataclass
class Row:
    """One row of a file.

    Attributes:
        number: its line, from 1; in a CSV or Parquet file, its place among the rows.
        id: its `id`; its number if it has none; None if the row is broken.
        fields: everything else it holds.
        error: why it is broken.
    """

    number: int
    id: str | int | None
    fields: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Rows:
    """The rows of a file, read one at a time, and read again each time they are iterated over.

    Args:
        path: a .jsonl, .ndjson, .csv or .parquet file; the last two need pyarrow.
        as_json: the columns of a CSV file whose cells hold JSON, such as numbers and lists; all others are text. An
            empty cell is a field that is not there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its name ends in none of these. While iterating: a Parquet file that cannot be read, or a CSV file
            with a quote out of place (`tables.read_csv`).
        ImportError: while iterating: pyarrow is missing.
    """

    def __init__(self, path: str | os.PathLike, as_json: Collection[str] = ()):
        self.path, self.as_json = Path(path), frozenset(as_json)
        self._format = format_of(self.path)
        if not self.path.is_file():
            found = f"{self.path} is a directory" if self.path.is_dir() else f"there is no file {self.path}"
            raise FileNotFoundError(f"{found}: expected a file of rows")

    def __iter__(self) -> Iterator[Row]:
        if self._format == ".csv":
            return (self._csv_row(number, cells) for number, cells in enumerate(read_csv(self.path), 1))
        if self._format == ".parquet":
            return (_row_of_cells(number, cells) for number, cells in enumerate(read_parquet(self.path), 1))
        return self._json_lines()

    def _json_lines(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield row_of(number, _from_json(line.decode("utf-8-sig")))
                    continue
                except UnicodeDecodeError as error:
                    problem = f"not UTF-8: {error}"
                except RecursionError:
                    problem = f"nested deeper than {MAX_DEPTH} levels"
                except ValueError as error:
                    problem = f"not JSON: {error}"
                yield Row(number, None, {"raw": repr(line)}, problem)

    def _csv_row(self, number: int, cells: Cells) -> Row:
        fields, error = cells
        for name in () if error else fields.keys() & self.as_json:
            with contextlib.suppress(ValueError, RecursionError):  # not JSON: text, such as a stop string
                fields[name] = _from_json(fields[name])
        return _row_of_cells(number, cells)


def _row_of_cells(number: int, cells: Cells) -> Row:
    fields, error = cells
    return row_of(number, fields) if error is None else Row(number, None, fields, error)


def row_of(number: int, fields: Any) -> Row:
    """A row of what was read; its id is taken out of the fields."""
    if not isinstance(fields, dict):
        return Row(number, None, {"raw": fields}, f"a {type(fields).__name__}: expected an object, {{…}}")
    rest = {name: value for name, value in fields.items() if name != "id"}
    given = fields.get("id")
    if given is None:
        return Row(number, number, rest)
    if isinstance(given, float) and given.is_integer():  # pandas writes a column of integers so if one is missing
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        return Row(number, None, fields, f"id = {given!r}: expected a string or an integer")
    return Row(number, given, rest)


def _from_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, or RecursionError if it is nested deeper than MAX_DEPTH."""
    value = json.loads(text)
    _check_depth(value)
    return value


def _check_depth(value: Any, left: int = MAX_DEPTH) -> None:
    if isinstance(value, (dict, list)):
        if not left:
            raise RecursionError
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, left - 1)


def format_of(path: Path) -> str:
    """The ending of a file's name. Raises ValueError if it is not one of FORMATS."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    return path.suffix.lower()


@dataclass
class Scan:
    """What identifies the rows of a run.

    Attributes:
        n_rows: how many there are.
        digest: of all of them.
        digest_of_first: of the first `n_first` that `scan` was asked for; None if there are fewer.
        last: the largest row number, which in JSON lines counts empty lines too; 0 if there is no row.
    """

    n_rows: int
    digest: str
    digest_of_first: str | None
    last: int


def scan(rows: Iterable[Row], n_first: int = -1) -> Scan:
    """Reads all rows.

    Raises:
        ValueError: two rows have the same id; names both.
    """
    lines: dict[str, int] = {}
    digest, n_rows, last = hashlib.sha256(), 0, 0
    of_first = digest.hexdigest() if n_first == 0 else None
    for n_rows, row in enumerate(rows, 1):
        if row.id is not None and (first := lines.setdefault(str(row.id), row.number)) != row.number:
            raise ValueError(
                f"line {row.number} has the id {row.id!r}, and so has line {first}: expected each id once "
                "(the id of a line without one is its number)"
            )
        last = row.number
        content = json.dumps([last, row.id, row.fields], sort_keys=True, default=str)
        digest.update(content.encode() + b"\n")
        if n_rows == n_first:
            of_first = digest.hexdigest()
    return Scan(n_rows, digest.hexdigest(), of_first, last)
