"""CSV and Parquet files, by pyarrow, an optional extra. Knows nothing of what the columns mean."""

import codecs
import contextlib
import datetime
import json
import mmap
import re
from collections import deque
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

# The most bytes of a row of a CSV file, and how many are read at a time.
CSV_BLOCK = 8 << 20
# A quoted cell. The first group is empty if no quote closes the cell; the second is wrong text after the cell.
QUOTED_CELL = re.compile(rb'(?:\A(?:\xef\xbb\xbf)?|(?<=[,\r\n]))"[^"]*(?:""[^"]*)*("?)(?=([^,\r\n])?)')

Cells = tuple[dict[str, Any], str | None]  # a row's fields and None, or its raw content and what is wrong with it


def import_pyarrow() -> Any:
    """pyarrow with its CSV and Parquet parts. Raises ImportError that says how to install it."""
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("CSV and Parquet files need pyarrow: pip install '.[data]'") from error
    return pyarrow


def read_csv(path: Path) -> Iterator[Cells]:
    """The rows of a CSV file (RFC 4180, UTF-8), one at a time. Each cell is text; an empty one is no field.

    A row with a wrong number of cells, or one that is not UTF-8, is broken; the others are read. A stray quote is
    worse: nobody can tell where rows end, and pyarrow would guess silently. So it raises ValueError before the first
    row if a file has a stray quote, or if its first line does not name the columns.
    """
    pyarrow = import_pyarrow()
    _check_quotes(path)
    broken: deque[tuple[int, Cells]] = deque()  # number and content of the rows that pyarrow skips

    def keep_broken(row: Any) -> str:
        problem = f"{row.actual_columns} cells: expected {row.expected_columns}, as in the first line"
        broken.append((row.number, ({"raw": row.text}, problem)))
        return "skip"

    # One thread, or pyarrow does not number the rows. In Latin-1 every byte is a character, so bytes that are not UTF-8
    # break only their own row.
    reading = pyarrow.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK, encoding="latin-1")
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=keep_broken)
    try:
        with path.open("rb") as file, pyarrow.csv.open_csv(_after_mark(file), reading, parsing) as reader:
            names = reader.schema.names
        header = _header(path, names)
        broken.clear()
        number = 1  # of the header; pyarrow counts from there, without empty lines
        texts = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
        with path.open("rb") as file, pyarrow.csv.open_csv(_after_mark(file), reading, parsing, texts) as reader:
            for batch in reader:
                for cells in batch.to_pylist():
                    number += 1
                    while broken and broken[0][0] == number:
                        yield broken.popleft()[1]
                        number += 1
                    yield _decoded(header, cells.values())
            yield from (cells for _, cells in broken)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as CSV with rows of at most {CSV_BLOCK >> 20} MiB: {error}") from None


def _after_mark(file: BinaryIO) -> BinaryIO:
    """The file, after its byte order mark if it has one."""
    file.seek(len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0)
    return file


def _check_quotes(path: Path) -> None:
    """Raises ValueError at the first quoted cell that is never closed, or has text after its closing quote."""
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for cell in QUOTED_CELL.finditer(content):
            if not cell[1] or cell[2]:
                line = content[: cell.start()].count(b"\n") + 1
                problem = "cell has text after its closing quote" if cell[1] else "quote opens a cell, none closes it"
                expected = 'expected "" for each quote inside a quoted cell (JSON lines have no such limits)'
                raise ValueError(f"{path}, line {line}: a {problem}, so nobody can tell where rows end: {expected}")


def _header(path: Path, names: list[str]) -> list[str]:
    """The names of the columns. Raises ValueError if one is empty, a duplicate, or not UTF-8."""
    with contextlib.suppress(UnicodeDecodeError):
        names = [name.encode("latin-1").decode() for name in names]
        if "" not in names and len(set(names)) == len(names):
            return names
    hint = " (pandas writes its index without one: to_csv(…, index=False))" if "" in names else ""
    raise ValueError(f"{path}: expected a first line of column names, each once and in UTF-8; found {names}{hint}")


def _decoded(header: list[str], cells: Any) -> Cells:
    """The fields of a row whose cells were read as Latin-1."""
    try:
        return {name: c.encode("latin-1").decode() for name, c in zip(header, cells) if c}, None
    except UnicodeDecodeError:
        return {"raw": list(cells)}, "not UTF-8"


def read_parquet(path: Path) -> Iterator[Cells]:
    """The rows of a Parquet file, one at a time, as JSON values, without nulls. Raises ValueError."""
    pyarrow = import_pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from map(_without_nulls, batch.to_pylist())
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None


def _without_nulls(values: dict[str, Any]) -> Cells:
    fields = {}
    for name, value in values.items():
        try:
            fields |= {} if value is None else {name: json.loads(json.dumps(value, default=_as_json))}
        except ValueError as error:
            return {"raw": values}, f"column {name!r}: {error}"
    return fields, None


def _as_json(value: Any) -> Any:
    """A JSON value for one that JSON does not have: dates and times become text (ISO 8601), decimals numbers."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value.as_tuple().exponent >= 0 else float(value)
    if isinstance(value, UUID):
        return str(value)
    expected = "expected text, numbers, dates, lists or structs of these"
    raise ValueError(f"found {type(value).__name__}, which JSON does not have: {expected}")


def write_table(file: BinaryIO, records: list[dict[str, Any]], is_parquet: bool) -> None:
    """Writes a column for each name in the records. In CSV, lists and objects are JSON, and null is an empty cell."""
    pyarrow = import_pyarrow()
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: _column([record.get(name) for record in records], has_lists=is_parquet) for name in names}
    write = pyarrow.parquet.write_table if is_parquet else pyarrow.csv.write_csv
    write(pyarrow.table(columns), file)


def _column(values: list[Any], has_lists: bool) -> Any:
    """A pyarrow array of the values' type; of strings and JSON if there are several types, or an unsupported one."""
    pyarrow = import_pyarrow()
    with contextlib.suppress(pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        array = pyarrow.array(values)
        if not pyarrow.types.is_nested(array.type) or (has_lists and "struct<>" not in str(array.type)):
            return array
    texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
    # JSON can hold half of a surrogate pair, UTF-8 cannot: it becomes a question mark.
    return pyarrow.array([t and t.encode(errors="replace").decode() for t in texts], pyarrow.string())
