"""Task templates: files, without code, that turn a row of data into a prompt and say how to read the answer.

A template file is JSON: {"tasks": {NAME: TASK, …}}. A row names its task in the field `task`, or in the template's
"column". If it names none, its task is the first whose `match` fits it, or the only one. A TASK has

- `user`, a text in which {field} stands for a field of the row and {id} for its id ({{ and }} are braces), and
  optionally `system`; or instead of these `prompt`, a text to continue;
- `options`: decoding options, which a row may override;
- `parse`: what to read from the answer: "integer", its first integer; {"regex": R}, the first group of the first match
  (the whole match if R has no group); {"integers": k}, the first k distinct integers, optionally only those from
  "least" to "most"; {"choice": [A, B, …]}, the only one of these that it has as a separate word;
- `match`: a regular expression that is searched in each text of the row;
- `gold`, the field with the right answer, and `metric`, which compares the two: from 0 to 1 (METRICS).

Knows nothing of models.
"""

import contextlib
import json
import math
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llama.datasets.prompts import from_json

TASK_KEYS = ("system", "user", "prompt", "options", "parse", "match", "gold", "metric")
TEMPLATE = '{"tasks": {NAME: {"user": …}}}'
METRICS = "accuracy, exact_match, hit@K, ndcg or ndcg@K"
METRIC = re.compile(r"accuracy|exact_match|hit@[1-9]\d{0,5}|ndcg(@[1-9]\d{0,5})?", re.ASCII)
# With or without commas between thousands. 3.14 has no integer; 5-3 has two, both without a sign.
INTEGER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?!\.?\d)", re.ASCII)


@dataclass(frozen=True)
class Task:
    """One task."""

    name: str
    texts: dict[str, list[tuple[str, str | None]]]  # `system`, `user`, `prompt`: pairs of a text and the field after it
    options: dict[str, Any]  # decoding options
    parse: Callable[[str], Any] | None  # reads an answer; raises ValueError if it finds nothing
    match: re.Pattern | None = None  # matches a text of this task's rows
    gold: str | None = None  # the field with the right answer
    metric: str | None = None  # how an answer is compared with the right one

    @property
    def fields(self) -> set[str]:
        """The names of the fields in its texts."""
        return {field for pieces in self.texts.values() for _, field in pieces if field is not None}

    def fits(self, fields: dict[str, Any]) -> bool:
        """Whether `match` fits a text of the row."""
        texts = (value for value in fields.values() if isinstance(value, str))
        return self.match is not None and any(self.match.search(text) for text in texts)

    def render(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The `prompt` or `messages` of a row; braces in its fields are text. Raises ValueError for a missing field."""
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
        """What `parse` reads from an answer, as `parsed`; if it finds nothing, `parse_error` says why."""
        if self.parse is None:
            return {}
        try:
            return {"parsed": self.parse(answer)}
        except ValueError as error:
            return {"parsed": None, "parse_error": str(error)}

    def measure(self, answer: str, read: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        """The `gold` of a row and the metric of what was read; empty if the task has no metric.

        Raises ValueError if the row has no right answer.
        """
        if self.metric is None:
            return {}
        if (gold := fields.get(self.gold)) is None:
            raise ValueError(f"the line has no field {self.gold!r}, the gold of task {self.name!r}")
        if isinstance(gold, str) and gold.startswith(("[", "{")) and self.metric.startswith(("hit", "ndcg")):
            with contextlib.suppress(ValueError, RecursionError):  # a cell of a CSV file is text
                gold = json.loads(gold)
        if isinstance(gold, dict) and not all(type(gain) in (int, float) for gain in gold.values()):
            raise ValueError(f"{self.gold} = {gold!r}: expected a number for each item")
        found = read.get("parsed", answer)
        return {"gold": gold, self.metric: 0.0 if found is None else _metric(self.metric, found, gold)}


class Template:
    """The tasks of a template. Raises ValueError that names task and key if it is not as described above."""

    def __init__(self, content: Any):
        self.content = content
        is_object = isinstance(content, dict) and set(content) in ({"tasks"}, {"tasks", "column"})
        if not is_object or not isinstance(content["tasks"], dict):
            raise ValueError(f'expected {TEMPLATE} and nothing beside "tasks" but a "column"')
        self.tasks: dict[str, Task] = {}
        self.column = content.get("column", "task")
        if not isinstance(self.column, str):
            raise ValueError(f"column = {self.column!r}: expected the name of a field")
        for name, task in content["tasks"].items():
            try:
                self.tasks[name] = _read_task(name, task)
            except (ValueError, TypeError) as error:
                raise ValueError(f"task {name!r}: {error}") from None
        if not self.tasks:
            raise ValueError("there is no task: expected one or more in 'tasks'")

    def check_options(self, check: Callable[[dict[str, Any]], Any]) -> None:
        """Calls `check` with the options of each task, and adds the task's name to its ValueError."""
        for name, task in self.tasks.items():
            try:
                check(task.options)
            except ValueError as error:
                raise ValueError(f"task {name!r} of the template: {error}") from None

    def task_of(self, fields: dict[str, Any]) -> Task:
        """The task of a row. Raises ValueError if it names an unknown task, or if none of several fits."""
        name = fields.get(self.column, next(iter(self.tasks)) if len(self.tasks) == 1 else None)
        if name is None and (fitting := [task for task in self.tasks.values() if task.fits(fields)]):
            return fitting[0]
        if not isinstance(name, str) or name not in self.tasks:
            others = ", or a text that the `match` of one fits" if any(t.match for t in self.tasks.values()) else ""
            raise ValueError(f"{self.column} = {name!r}: expected one of {', '.join(map(repr, self.tasks))}{others}")
        return self.tasks[name]


def read_template(path: str | os.PathLike) -> Template:
    """Reads a template file. Raises FileNotFoundError or, as `Template`, ValueError."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no template file {path}")
        return Template(json.loads(Path(path).read_text(encoding="utf-8-sig")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): expected a template, {TEMPLATE}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_task(name: str, task: Any) -> Task:
    if not isinstance(task, dict):
        raise ValueError(f"a {type(task).__name__}: expected an object")
    if unknown := sorted(set(task) - set(TASK_KEYS)):
        raise ValueError(f"{unknown[0]!r} is not a key of a task: expected {', '.join(TASK_KEYS)}")
    if ("user" in task) == ("prompt" in task) or ("system" in task and "prompt" in task):
        raise ValueError("expected either 'user', perhaps with 'system', or 'prompt'")
    texts = {key: _pieces(key, task[key]) for key in ("system", "user", "prompt") if key in task}
    options = task.get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f"options = {options!r}: expected an object")
    parse = _parser(task["parse"]) if task.get("parse") is not None else None
    match = _compiled("match", task["match"]) if task.get("match") is not None else None
    gold, metric = task.get("gold"), task.get("metric")
    if (gold is None) != (metric is None):
        raise ValueError(f"found {'metric' if gold is None else 'gold'} alone: expected both `gold` and `metric`")
    if gold is not None and not isinstance(gold, str):
        raise ValueError(f"gold = {gold!r}: expected the name of a field")
    if metric is not None and not (isinstance(metric, str) and METRIC.fullmatch(metric)):
        raise ValueError(f"metric = {metric!r}: expected {METRICS}")
    return Task(name, texts, from_json(options), parse, match, gold, metric)


def _compiled(key: str, pattern: Any) -> re.Pattern:
    if not isinstance(pattern, str):
        raise ValueError(f"{key} = {pattern!r}: expected a regular expression")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is not a regular expression: {error}") from None


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
            raise ValueError(f"{key}: {{{field}}} is not the name of a field: expected {{field}}")
    return [(text, field) for text, field, *_ in parts]


def _as_text(value: Any) -> str:
    """A field's value as text; a list becomes numbered lines, one for each item."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(f"{number}. {_as_text(item)}" for number, item in enumerate(value, 1))
    return json.dumps(value, ensure_ascii=False, default=str)


def _parser(parse: Any) -> Callable[[str], Any]:
    """The function for a template's `parse`."""
    if parse == "integer":
        return _first_integer
    if isinstance(parse, dict) and len(parse) == 1:
        ((kind, value),) = parse.items()
        if kind == "regex" and isinstance(value, str):
            return partial(_first_match, _compiled("parse", value))
        if kind == "choice" and isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
            return partial(_choice, value)
    if isinstance(parse, dict) and "integers" in parse and set(parse) <= {"integers", "least", "most"}:
        k, least, most = parse["integers"], parse.get("least"), parse.get("most")
        if all(type(n) is int for n in (k, least or 0, most or 0)) and k > 0:
            return partial(_distinct_integers, k, least, most)
    expected = '"integer", {"regex": R}, {"integers": k} or {"choice": [A, B, …]}'
    raise ValueError(f"parse = {json.dumps(parse, ensure_ascii=False)}: expected {expected}")


def _integers(answer: str) -> Iterator[int]:
    return (int(found[0].replace(",", "")) for found in INTEGER.finditer(answer))


def _first_integer(answer: str) -> int:
    for number in _integers(answer):
        return number
    raise ValueError("no integer in the answer")


def _distinct_integers(k: int, least: int | None, most: int | None, answer: str) -> list[int]:
    """The first k distinct integers in range."""
    found = list(_integers(answer))
    in_range = [n for n in found if (least is None or n >= least) and (most is None or n <= most)]
    distinct = list(dict.fromkeys(in_range))[:k]
    if len(distinct) < k:
        bounds = "" if least is None and most is None else f" from {least} to {most}"
        raise ValueError(f"found the integers {found}: expected {k} distinct ones{bounds}")
    return distinct


def _metric(metric: str, found: Any, gold: Any) -> float:
    """The value of a metric, from 0 to 1."""
    name, _, k = metric.partition("@")
    if name == "accuracy":
        return float(_same(found, gold))
    if name == "exact_match":
        return float(_as_text(found).strip() == _as_text(gold).strip())
    ranking = (found if isinstance(found, list) else [found])[: int(k) if k else None]
    gains = gold if isinstance(gold, dict) else dict.fromkeys(map(str, gold if isinstance(gold, list) else [gold]), 1)
    if name == "hit":
        return float(any(gains.get(str(item), 0) > 0 for item in ranking))
    # Järvelin and Kekäläinen 2002: gains, discounted by the logarithm of the rank, divided by the best ranking's.
    best = sorted(gains.values(), reverse=True)[: int(k) if k else None]
    ideal = math.fsum(gain / math.log2(rank + 1) for rank, gain in enumerate(best, 1))
    reached = math.fsum(gains.get(str(item), 0) / math.log2(rank + 1) for rank, item in enumerate(ranking, 1))
    return reached / ideal if ideal else 0.0


def _same(found: Any, gold: Any) -> bool:
    """Whether two answers are the same number, or the same text apart from case and surrounding white space."""
    texts = [_as_text(value).strip().casefold() for value in (found, gold)]
    try:
        return float(texts[0].replace(",", "")) == float(texts[1].replace(",", ""))
    except ValueError:
        return texts[0] == texts[1]


def report_of(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each task: its lines, how many failed, how many answers could not be read, and the mean metric."""
    report: dict[str, dict[str, Any]] = {}
    for record in records:
        line = report.setdefault(record.get("task", "(none)"), {"lines": 0, "failed": 0, "unread": 0})
        line["lines"] += 1
        line["failed"] += "error" in record
        line["unread"] += "parse_error" in record
        for metric in filter(METRIC.fullmatch, record):
            line.setdefault(metric, []).append(record[metric])
    for line in report.values():
        for metric in filter(METRIC.fullmatch, list(line)):
            line[metric] = math.fsum(line[metric]) / len(line[metric])
    return dict(sorted(report.items()))


def table_of(report: dict[str, dict[str, Any]]) -> str:
    """A report as lines for a terminal."""
    rows = [f"{'task':20} {'lines':>7} {'failed':>7} {'unread':>7}"]
    for name, line in report.items():
        metrics = "".join(f"   {metric} {line[metric]:.4f}" for metric in filter(METRIC.fullmatch, line))
        rows.append(f"{name:20} {line['lines']:7,} {line['failed']:7,} {line['unread']:7,}{metrics}")
    return "\n".join(rows)


def _first_match(pattern: re.Pattern, answer: str) -> str:
    found = pattern.search(answer)
    text = found and found[min(1, pattern.groups)]
    if text is None:
        raise ValueError(f"no match of {pattern.pattern}")
    return text


def _choice(choices: list[str], answer: str) -> str:
    # Longest first, so that "A+" is not read as "A".
    either = "|".join(re.escape(choice) for choice in sorted(choices, key=len, reverse=True))
    found = list(dict.fromkeys(re.findall(rf"(?<!\w)(?:{either})(?!\w)", answer)))
    if len(found) != 1:
        raise ValueError(f"found {', '.join(found) or 'none'} of {', '.join(choices)}: expected one of them")
    return found[0]
