"""Rows of data files: JSON lines, CSV and Parquet, read one after the other, with what is wrong with a broken one.

Knows nothing of models; what a row holds is its reader's business.
"""

import contextlib
import csv
import datetime
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

FORMATS = (".jsonl", ".ndjson", ".csv", ".parquet")
# Lists and objects inside one another. Each level takes stack wherever a row is walked, and Python's has an end.
MAX_DEPTH = 100
QUOTED_CELL = re.compile(r'(?<![^,])"[^"]*(?:""[^"]*)*"(?![^,\r\n])')  # of a row of CSV


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
        ValueError: its name ends in none of these; or, on the way, a Parquet file that cannot be read, or a CSV file
            in which it cannot be told where a row ends.
    """

    def __init__(self, path: str | os.PathLike, as_json: Collection[str] = ()):
        self.path, self.as_json = Path(path), as_json
        self._read = {".csv": self._csv, ".parquet": self._parquet}.get(format_of(self.path), self._json_lines)
        if not self.path.is_file():
            found = f"{self.path} is a directory" if self.path.is_dir() else f"there is no file {self.path}"
            raise FileNotFoundError(f"{found}: expected a file of rows")

    def __iter__(self) -> Iterator[Row]:
        return self._read()

    def _json_lines(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield row_of(number, _from_json(line.decode("utf-8-sig")))
                except UnicodeDecodeError as error:
                    yield Row(number, None, {"raw": repr(line)}, f"not UTF-8: {error}")
                except RecursionError:
                    yield Row(number, None, {"raw": repr(line)}, f"nested deeper than {MAX_DEPTH} levels")
                except ValueError as error:
                    yield Row(number, None, {"raw": repr(line)}, f"not JSON: {error}")

    def _csv(self) -> Iterator[Row]:
        # What is no UTF-8 is read as surrogates, so that it breaks its own row only.
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = self._csv_cells(file)
            header, error = next(rows, ([], None))
            if error or not header or "" in header or len(set(header)) < len(header):
                found = error or header
                hint = " (pandas writes its index without one: to_csv(…, index=False))" if "" in header else ""
                raise ValueError(f"{self.path}: expected a first line of column names, each once; found {found}{hint}")
            for number, (cells, error) in enumerate(rows, 1):
                yield Row(number, None, {"raw": cells}, error) if error else self._csv_row(number, header, cells)

    def _csv_cells(self, file: Iterable[str]) -> Iterator[tuple[list[str], str | None]]:
        """(cells, None) of each row that is not empty; (its line, why) of one that is no CSV.

        After a stray quote the reader goes on with the next line. That is the next row, unless the line was the first
        of a longer text. Then a quote that closes this text comes later, where none can be: the file is refused.
        """
        taken: list[str] = []  # the lines of this row; "" for the end of the file
        is_doubtful = False  # whether an earlier row was broken

        def lines() -> Iterator[str]:
            for line in file:
                taken.append(line)
                yield line
            taken.append("")

        reader = csv.reader(lines(), strict=True)  # not strict, it would drop quotes, or take all the rest for a cell
        while True:
            taken.clear()
            first = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if len(taken) == 1:
                    is_doubtful = True
                    yield [*taken], f'no CSV at line {first}, {error}: expected "" for each quote in a quoted cell'
                    continue
                problem = error if taken[-1] else "a quote opens a cell and none closes it"
            else:
                if not (is_doubtful and '"' in QUOTED_CELL.sub("", "".join(taken))):
                    if cells:
                        yield cells, None
                    continue
                problem = "a quote in a cell that is not quoted"
            raise ValueError(
                f"{self.path}, line {first}: {problem}, so that it cannot be told where rows end: "
                'expected "" for each quote in a quoted cell (JSON lines have no such limits)'
            )

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
                fields[name] = _from_json(fields[name])
        return row_of(number, fields)

    def _parquet(self) -> Iterator[Row]:
        pyarrow, number = import_pyarrow(), 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(1024):
                    for fields in batch.to_pylist():
                        number += 1
                        yield self._parquet_row(number, fields)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self.path} cannot be read as Parquet: {error}") from None

    def _parquet_row(self, number: int, values: dict[str, Any]) -> Row:
        fields = {}
        for name, value in values.items():
            try:
                if value is not None:
                    fields[name] = _as_json(value)
            except ValueError as error:
                return Row(number, None, {"raw": values}, f"column {name!r}: {error}")
        return row_of(number, fields)


def _from_json(text: str) -> Any:
    """What a JSON text holds. Raises ValueError, or RecursionError if it is nested deeper than MAX_DEPTH."""
    value = json.loads(text)
    _check_depth(value)
    return value


def _check_depth(value: Any, left: int = MAX_DEPTH) -> None:
    if isinstance(value, (dict, list)):
        if not left:
            raise RecursionError
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, left - 1)


def _as_json(value: Any) -> Any:
    """What JSON has for a value of a Parquet file: dates and times are text (ISO 8601), decimals numbers."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value.as_tuple().exponent >= 0 else float(value)
    if isinstance(value, UUID):
        return str(value)
    kind = type(value).__name__
    raise ValueError(
        f"found {kind}, which JSON does not have: expected text, numbers, dates, lists or structs of these"
    )


def row_of(number: int, fields: Any) -> Row:
    """A row of what was read; its id is taken out of the fields."""
    if not isinstance(fields, dict):
        return Row(number, None, {"raw": fields}, f"a {type(fields).__name__}: expected an object, {{…}}")
    rest = {name: value for name, value in fields.items() if name != "id"}
    given = fields.get("id")
    if given is None:
        return Row(number, number, rest)
    if isinstance(given, float) and given.is_integer():  # a column of integers in which one is missing, by pandas
        given = int(given)
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
    """What a run is known by of its rows: how many, and a digest of them and of the first so many of them.

    Attributes:
        last: the largest of their numbers, which in JSON lines count empty lines as well; 0 if there is no row.
    """

    n_rows: int
    digest: str
    digest_of_first: str | None
    last: int


def scan(rows: Iterable[Row], n_first: int = -1) -> Scan:
    """Goes through all rows.

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
                "(a line without one goes by its number)"
            )
        last = row.number
        content = json.dumps([last, row.id, row.fields], sort_keys=True, default=str)
        digest.update(content.encode() + b"\n")
        if n_rows == n_first:
            of_first = digest.hexdigest()
    return Scan(n_rows, digest.hexdigest(), of_first, last)


def import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'llama[data]'") from error
    return pyarrow
