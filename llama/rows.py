"""Rows of data files: JSON lines, CSV and Parquet, read one after the other, with what is wrong with a broken one.

Knows nothing of models; what a row holds is its reader's business.
"""

import contextlib
import csv
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMATS = (".jsonl", ".ndjson", ".csv", ".parquet")


@dataclass
class Row:
    """One row of a file.

    Attributes:
        number: its line, from 1; of a CSV or Parquet file, its place among the rows.
        id: its `id`; its number if it has none; None if the row is broken.
        fields: all else it holds.
        error: why it is broken.
    """

    number: int
    id: str | int | None
    fields: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Rows:
    """The rows of a file, read anew, and one after the other, each time they are gone through.

    Args:
        path: a .jsonl, .ndjson, .csv or .parquet file; the last needs pyarrow.
        as_json: the columns of a CSV file whose cells hold JSON, such as numbers and lists; all others are text. An
            empty cell is a field that is not there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its name ends in none of these; or, on the way, a CSV file that is none.
    """

    def __init__(self, path: str | os.PathLike, as_json: Collection[str] = ()):
        self.path, self.as_json = Path(path), as_json
        self._read = {".csv": self._csv, ".parquet": self._parquet}.get(format_of(self.path), self._json_lines)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")

    def __iter__(self) -> Iterator[Row]:
        return self._read()

    def _json_lines(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield row_of(number, json.loads(line.decode("utf-8-sig")))
                except UnicodeDecodeError as error:
                    yield Row(number, None, {"raw": repr(line)}, f"not UTF-8: {error}")
                except (ValueError, RecursionError) as error:
                    yield Row(number, None, {"raw": repr(line)}, f"not JSON: {error}")

    def _csv(self) -> Iterator[Row]:
        # What is no UTF-8 is read as surrogates, so that it breaks its own row only.
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                header = next(reader, [])
                if not header or "" in header or len(set(header)) < len(header):
                    raise ValueError(f"{self.path}: expected a first line of column names, each once; found {header}")
                for number, cells in enumerate((cells for cells in reader if cells), 1):
                    yield self._csv_row(number, header, cells)
            except csv.Error as error:
                raise ValueError(
                    f"{self.path}, line {reader.line_num}: {error} (JSON lines have no such limits)"
                ) from None

    def _csv_row(self, number: int, header: list[str], cells: list[str]) -> Row:
        if len(cells) != len(header):
            return Row(
                number, None, {"raw": cells}, f"{len(cells)} cells: expected {len(header)}, as in the first line"
            )
        fields: dict[str, Any] = {name: cell for name, cell in zip(header, cells) if cell}
        try:
            "".join(cells).encode()
        except UnicodeEncodeError:
            return Row(number, None, {"raw": cells}, "not UTF-8")
        for name in fields.keys() & set(self.as_json):
            with contextlib.suppress(ValueError, RecursionError):  # what is no JSON is text, such as a stop string
                fields[name] = json.loads(fields[name])
        return row_of(number, fields)

    def _parquet(self) -> Iterator[Row]:
        number = 0
        with import_pyarrow().parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield row_of(number, {name: value for name, value in fields.items() if value is not None})


def row_of(number: int, fields: Any) -> Row:
    """A row of what was read; its id is taken out of the fields."""
    if not isinstance(fields, dict):
        return Row(number, None, {"raw": fields}, f"a {type(fields).__name__}: expected an object, {{…}}")
    rest = {name: value for name, value in fields.items() if name != "id"}
    given = fields.get("id")
    if given is None:
        return Row(number, number, rest)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        return Row(number, None, fields, f"id = {given!r}: expected a string or an integer")
    return Row(number, given, rest)


def format_of(path: Path) -> str:
    """The ending of a file's name, if it is one that is known."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    return path.suffix.lower()


@dataclass
class Scan:
    """What a run is known by of its rows: how many, and a digest of them and of the first so many of them."""

    n_rows: int
    digest: str
    digest_of_first: str | None


def scan(rows: Iterable[Row], n_first: int = -1) -> Scan:
    """Goes through all rows.

    Raises:
        ValueError: two rows have the same id; names both.
    """
    lines: dict[str, int] = {}
    digest, n_rows = hashlib.sha256(), 0
    of_first = digest.hexdigest() if n_first == 0 else None
    for n_rows, row in enumerate(rows, 1):
        if row.id is not None and (first := lines.setdefault(str(row.id), row.number)) != row.number:
            raise ValueError(
                f"line {row.number} has the id {row.id!r}, and so has line {first}: expected each id once "
                "(a line without one goes by its number)"
            )
        content = json.dumps([row.number, row.id, row.fields], sort_keys=True, default=str)
        digest.update(content.encode() + b"\n")
        if n_rows == n_first:
            of_first = digest.hexdigest()
    return Scan(n_rows, digest.hexdigest(), of_first)


def import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'llama[data]'") from error
    return pyarrow
