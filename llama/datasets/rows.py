"""Rows of data files: JSON lines and arrays, CSV and Parquet, read one at a time. A broken row breaks no other.

Knows nothing of models, or of what a row asks.
"""

import contextlib
import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama.datasets.json_file import is_one_document, read_json_rows
from llama.datasets.tables import read_csv, read_parquet

TEXT = ".txt"  # each line is a prompt; such files are only read
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
# How deep lists and objects may be nested: walking a row recursively takes stack for each level.
MAX_DEPTH = 100
BLANK = b" \t\r\n\xef\xbb\xbf"  # white space, and a byte order mark


@dataclass
class Row:
    """One row of a file."""

    number: int  # its line, from 1; in a CSV or Parquet file, its place among the rows
    id: str | int | None  # its number if it has none of its own; None if the row is broken
    fields: dict[str, Any]  # its other fields
    error: str | None = None  # why it is broken


class Rows:
    """The rows of a file, read one at a time. Each iteration reads the file again.

    Args:
        path: a .jsonl, .ndjson, .json, .csv or .parquet file; the last two need pyarrow. A .json file is an array of
            rows, or rows one after the other; a .jsonl file may be that too. Each line of a .txt file is a `prompt`.
        as_json: the columns of a CSV file whose cells hold JSON, such as numbers and lists; all others are text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its name has another ending; while iterating, as `read_csv` and `read_parquet`.
    """

    def __init__(self, path: str | os.PathLike, as_json: Collection[str] = ()):
        self.path, self.as_json = Path(path), frozenset(as_json)
        self._format = self.path.suffix.lower() if self.path.suffix.lower() == TEXT else format_of(self.path)
        if not self.path.is_file():
            found = f"{self.path} is a directory" if self.path.is_dir() else f"there is no file {self.path}"
            raise FileNotFoundError(f"{found}: expected a file of rows")

    def __iter__(self) -> Iterator[Row]:
        if self._format == TEXT:
            with self.path.open("rb") as file:
                yield from (_row_of_text(number, line) for number, line in enumerate(file, 1) if line.strip(BLANK))
            return
        if self._format in (".jsonl", ".ndjson"):
            with self.path.open("rb") as file:
                lines = ((number, line) for number, line in enumerate(file, 1) if line.strip(BLANK))
                begin = list(itertools.islice(lines, 2))
                if not is_one_document([line for _, line in begin]):
                    yield from (_row_of_json(*line) for line in itertools.chain(begin, lines))
                    return
        if self._format not in (".csv", ".parquet"):
            for number, value in enumerate(read_json_rows(self.path), 1):
                yield _row_of_value(number, value)
            return
        is_csv = self._format == ".csv"
        for number, (fields, error) in enumerate((read_csv if is_csv else read_parquet)(self.path), 1):
            for name in fields.keys() & self.as_json if is_csv and error is None else ():
                with contextlib.suppress(ValueError, RecursionError):  # not JSON: text, such as a stop string
                    fields[name] = _from_json(fields[name])
            yield row_of(number, fields) if error is None else Row(number, None, fields, error)


def _row_of_text(number: int, line: bytes) -> Row:
    try:
        return row_of(number, {"prompt": line.decode("utf-8-sig").rstrip("\r\n")})
    except UnicodeDecodeError as error:
        return Row(number, None, {"raw": repr(line)}, f"not UTF-8: {error}")


def _row_of_value(number: int, value: Any) -> Row:
    try:
        _check_depth(value, MAX_DEPTH)
    except RecursionError:
        return Row(number, None, {"raw": repr(value)[:1000]}, f"nested deeper than {MAX_DEPTH} levels")
    return row_of(number, value)


def _row_of_json(number: int, line: bytes) -> Row:
    try:
        return row_of(number, _from_json(line.decode("utf-8-sig")))
    except json.JSONDecodeError as error:  # its own message would count lines within this line
        problem = f"not JSON: {error.msg} at character {error.pos + 1}"
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: {error}"
    except RecursionError:
        problem = f"nested deeper than {MAX_DEPTH} levels"
    except ValueError as error:
        problem = f"not JSON: {error}"
    return Row(number, None, {"raw": repr(line)}, problem)


def row_of(number: int, fields: Any) -> Row:
    """A row with these fields, apart from its id."""
    if not isinstance(fields, dict):
        return Row(number, None, {"raw": fields}, f"a {type(fields).__name__}: expected an object, {{…}}")
    rest = {name: value for name, value in fields.items() if name != "id"}
    given = fields.get("id")
    if given is None:
        return Row(number, number, rest)
    if isinstance(given, float) and given.is_integer():  # pandas writes integers as floats if one is missing
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        return Row(number, None, fields, f"id = {given!r}: expected a string or an integer")
    return Row(number, given, rest)


def _from_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, or RecursionError if it is nested deeper than MAX_DEPTH."""
    value = json.loads(text)
    _check_depth(value, MAX_DEPTH)
    return value


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, (dict, list)):
        if not left:
            raise RecursionError
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, left - 1)


def counted(n: int, noun: str) -> str:
    """A number with its noun: "1 line", "2,000 lines"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def format_of(path: Path) -> str:
    """The ending of a file's name. Raises ValueError if it is not one of FORMATS."""
    if str(path) == "-":
        raise ValueError("-: only `llama batch` reads and writes standard streams: expected a file")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    return path.suffix.lower()


class Scan(NamedTuple):
    """The fingerprint of a run's rows."""

    n_rows: int
    digest: str  # of all rows
    digest_of_first: str | None  # of the first `n_first` rows; None if there are fewer
    last: int  # the last row's number (in JSON lines, empty lines count too); 0 if there is no row


def scan(rows: Iterable[Row], n_first: int = -1) -> Scan:
    """Reads all rows. Raises ValueError if two have the same id."""
    ids: dict[str, None] = {}  # in the order of the rows; it and `numbers` take a third less than one dictionary
    numbers = array("Q")
    digest, n_rows, last = hashlib.sha256(), 0, 0
    of_first = digest.hexdigest() if n_first == 0 else None
    for n_rows, row in enumerate(rows, 1):
        if row.id is not None:
            if (name := str(row.id)) in ids:
                first = numbers[list(ids).index(name)]
                raise ValueError(
                    f"line {row.number} has the id {row.id!r}, and so has line {first}: expected each id once "
                    "(the id of a line without one is its number)"
                )
            ids[name] = None
            numbers.append(row.number)
        last = row.number
        content = json.dumps([last, row.id, row.fields], sort_keys=True, default=str)
        digest.update(content.encode() + b"\n")
        if n_rows == n_first:
            of_first = digest.hexdigest()
    return Scan(n_rows, digest.hexdigest(), of_first, last)
