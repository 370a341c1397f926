"""Files that are not JSON lines: an array of rows, or objects one after the other, each of one or several lines.

Knows nothing of what the rows mean.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

SPACE = re.compile(r"\s*")


def is_one_document(lines: list[bytes]) -> bool:
    """Whether the first two lines of a .jsonl file begin an array, or an object that goes over several lines."""
    first, second = [line.removeprefix(b"\xef\xbb\xbf").strip() for line in [*lines, b"{"][:2]] if lines else (b"", b"")
    goes_on = first[:1] == b"{" and first.endswith((b"{", b"[", b",", b":")) and second[:1] != b"{"
    return first[:1] == b"[" or first == b"{" or goes_on


def read_json_rows(path: Path) -> Iterator[Any]:
    """The elements of the array in a file, or the values that it holds one after the other.

    Reads the whole file before it yields a row. Raises ValueError that names the line of a mistake.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    decoder, values, at = json.JSONDecoder(), [], 0
    try:
        while (at := SPACE.match(text, at).end()) < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(value)
    except RecursionError:
        raise ValueError(f"{path}: the value at character {at} is nested too deeply") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{path}: not JSON: {error.msg} at {where}: expected an array of objects") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    yield from values[0] if len(values) == 1 and isinstance(values[0], list) else values


def write_json_array(file: BinaryIO, records: Iterator[bytes], indent: int | None) -> None:
    """Writes records, each a line of JSON, as an array: one record a line, or indented by `indent` spaces."""
    separator = b"[\n"
    for line in records:
        if indent is not None:
            line = json.dumps(json.loads(line), ensure_ascii=False, indent=indent)
            line = " " * indent + line.replace("\n", "\n" + " " * indent)
            line = line.encode(errors="backslashreplace")
        file.write(separator + line.rstrip(b"\n"))
        separator = b",\n"
    file.write(b"[]\n" if separator == b"[\n" else b"\n]\n")
