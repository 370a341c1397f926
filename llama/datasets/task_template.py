"""Task templates: what is asked of the model for a row of data, and what is read out of its answer, without code.

A template file is JSON: {"tasks": {NAME: TASK, …}}. A row names its `task`, unless there is only one. A TASK has

- `user`, a text in which {field} stands for a field of the row and {id} for its id ({{ and }} are braces), and perhaps
  another, `system`; or instead of these `prompt`, a text to be continued;
- `options`: decoding options, which a row may override;
- `parse`: what is read out of the answer: "integer", the first one in it; {"regex": R}, the first group of the first
  match (the whole match if R has no group); {"integers": k}, k distinct ones; {"choice": [A, B, …]}, the only one of
  these that stands by itself in it.

Knows nothing of models.
"""

import json
import os
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llama.datasets.prompts import from_json

TASK_KEYS = ("system", "user", "prompt", "options", "parse")
# With or without commas between thousands. The 3 of 3.14 is not one; 5-3 are two, both without a sign.
INTEGER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?!\.?\d)", re.ASCII)


@dataclass(frozen=True)
class Task:
    """One task."""

    name: str
    texts: dict[str, list[tuple[str, str | None]]]  # `system`, `user`, `prompt`: pairs of a text and the field after it
    options: dict[str, Any]  # decoding options
    parse: Callable[[str], Any] | None  # reads an answer, or raises ValueError if there is nothing to read

    @property
    def fields(self) -> set[str]:
        """The names of the fields in its texts."""
        return {field for pieces in self.texts.values() for _, field in pieces if field is not None}

    def render(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The `prompt` or `messages` of a row; braces in its fields are text. Raises ValueError if it lacks a field."""
        texts = dict.fromkeys(self.texts, "")
        for name, pieces in self.texts.items():
            for text, field in pieces:
                if field is not None and fields.get(field) is None:
                    raise ValueError(f"the line has no field {field!r}, which the template of task {self.name!r} names")
                texts[name] += text if field is None else text + _as_text(fields[field])
        if "prompt" in texts:
            return texts
        return {"messages": [{"role": role, "content": texts[role]} for role in ("system", "user") if role in texts]}

    def read(self, answer: str) -> dict[str, Any]:
        """What is read out of an answer, as `parsed`; where that is nothing, `parse_error` says why."""
        if self.parse is None:
            return {}
        try:
            return {"parsed": self.parse(answer)}
        except ValueError as error:
            return {"parsed": None, "parse_error": str(error)}


class Template:
    """The tasks of a template. Raises ValueError, which names task and key, if it is not as described above."""

    def __init__(self, content: Any):
        self.content = content
        if not isinstance(content, dict) or set(content) != {"tasks"} or not isinstance(content["tasks"], dict):
            raise ValueError('expected {"tasks": {NAME: {"user": …}}} and nothing beside "tasks"')
        self.tasks = {}
        for name, task in content["tasks"].items():
            try:
                self.tasks[name] = _read_task(name, task)
            except (ValueError, TypeError) as error:
                raise ValueError(f"task {name!r}: {error}") from None
        if not self.tasks:
            raise ValueError("there is no task: expected one or more in 'tasks'")

    def task_of(self, fields: dict[str, Any]) -> Task:
        """The task of a row. Raises ValueError if it names one that is not there, or none of several."""
        name = fields.get("task", next(iter(self.tasks)) if len(self.tasks) == 1 else None)
        if not isinstance(name, str) or name not in self.tasks:
            raise ValueError(f"task = {name!r}: expected one of {', '.join(map(repr, self.tasks))}")
        return self.tasks[name]


def read_template(path: str | os.PathLike) -> Template:
    """Reads a template file. Raises FileNotFoundError or, as `Template`, ValueError."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no template file {path}")
        return Template(json.loads(Path(path).read_text(encoding="utf-8-sig")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_task(name: str, task: Any) -> Task:
    if not isinstance(task, dict):
        raise ValueError(f"a {type(task).__name__}: expected an object")
    if unknown := sorted(set(task) - set(TASK_KEYS)):
        raise ValueError(f"{unknown[0]!r} is not known: expected {', '.join(TASK_KEYS)}")
    if ("user" in task) == ("prompt" in task) or ("system" in task and "prompt" in task):
        raise ValueError("expected either 'user', perhaps with 'system', or 'prompt'")
    texts = {key: _pieces(key, task[key]) for key in ("system", "user", "prompt") if key in task}
    options = task.get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f"options = {options!r}: expected an object")
    return Task(name, texts, from_json(options), _rule(task["parse"]) if task.get("parse") is not None else None)


def _pieces(key: str, text: Any) -> list[tuple[str, str | None]]:
    """A text, cut into pairs of a piece and the field after it."""
    if not isinstance(text, str):
        raise ValueError(f"{key} = {text!r}: expected a text")
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{key}: {error}; expected {{field}}, and {{{{ or }}}} for a brace") from None
    for _, field, spec, conversion in parts:
        if field is not None and (not field or spec or conversion or "." in field or "[" in field):
            raise ValueError(f"{key}: {{{field}}} with nothing, or more than a name, in it: expected {{field}}")
    return [(text, field) for text, field, *_ in parts]


def _as_text(value: Any) -> str:
    """A field's value as text; a list becomes a numbered line for each item."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(f"{number}. {_as_text(item)}" for number, item in enumerate(value, 1))
    return json.dumps(value, ensure_ascii=False, default=str)


def _rule(parse: Any) -> Callable[[str], Any]:
    """The function that reads an answer, of what a template says of it."""
    if parse == "integer":
        return _first_integer
    if isinstance(parse, dict) and len(parse) == 1:
        ((kind, value),) = parse.items()
        if kind == "regex" and isinstance(value, str):
            try:
                return partial(_first_match, re.compile(value))
            except re.error as error:
                raise ValueError(f"parse: {value!r} is no regular expression: {error}") from None
        if kind == "integers" and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return partial(_distinct_integers, value)
        if kind == "choice" and isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
            return partial(_choice, value)
    expected = '"integer", {"regex": R}, {"integers": k} or {"choice": [A, B, …]}'
    raise ValueError(f"parse = {json.dumps(parse, ensure_ascii=False)}: expected {expected}")


def _integers(answer: str) -> Iterator[int]:
    return (int(found[0].replace(",", "")) for found in INTEGER.finditer(answer))


def _first_integer(answer: str) -> int:
    for number in _integers(answer):
        return number
    raise ValueError("no integer in the answer")


def _distinct_integers(k: int, answer: str) -> list[int]:
    found = list(_integers(answer))
    if len(found) != k or len(set(found)) != k:
        raise ValueError(f"found the integers {found}: expected {k} distinct ones")
    return found


def _first_match(pattern: re.Pattern, answer: str) -> str:
    found = pattern.search(answer)
    text = found and found[min(1, pattern.groups)]
    if text is None:
        raise ValueError(f"no match of {pattern.pattern}")
    return text


def _choice(choices: list[str], answer: str) -> str:
    # The longest first, so that "A+" is not read as "A".
    either = "|".join(re.escape(choice) for choice in sorted(choices, key=len, reverse=True))
    found = list(dict.fromkeys(re.findall(rf"(?<!\w)(?:{either})(?!\w)", answer)))
    if len(found) != 1:
        raise ValueError(f"found {', '.join(found) or 'none'} of {', '.join(choices)}: expected one of them")
    return found[0]
