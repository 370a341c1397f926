"""Rejection sampling from file to file, and scores for the answers that a file has: on any number of replicas.

Lines and their seeds are those of `llama.batch`; the output is locked, and a killed run goes on where it was. Rank 0
reads and writes; each replica takes a line whenever it has room.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch.distributed as dist
from tqdm import tqdm

from llama import parallel
from llama.batch import KEYS, KINDS, OPTIONS, identity, line_seed
from llama.best_of_n import Summary
from llama.generation import Llama
from llama.open_turns import is_open
from llama.options import DecodingOptions, from_json
from llama.output import Output
from llama.rejection_sampling import Plan, Task, check_option, draw, give_scores, result
from llama.rows import Row, Rows
from llama.scorers import Scorer, prompt_ids
from llama.work import Work

# The decoding options of a sampled answer.
NOT_SAMPLED = ("num_return_sequences", "num_beams", "length_penalty", "early_stopping", "top_logprobs")
SAMPLED = tuple(name for name in OPTIONS if name not in NOT_SAMPLED)
PROMPT_KEYS = (*KINDS, "metadata")  # what a record says of its prompt


def sample_files(
    llama: Llama,
    source: str | os.PathLike,
    target: str | os.PathLike,
    scorer: Scorer,
    plan: Plan,
    scorer_name: Any,
    *,
    force: bool = False,
    retry: bool = False,
    progress: bool = False,
    **options: Any,
) -> Summary | None:
    """Draws, scores and keeps answers to the lines of a file; what the output has already is not done again.

    A line holds what one of `llama.batch` does; its `metadata` is where a scorer finds what it needs to know, such as
    the right answer. A record is {"id", "line", the prompt, "metadata", "seed"} and what `rejection_sample` returns, or
    an "error".

    Args:
        llama, scorer, plan: as in `rejection_sampling.draw`.
        source, target: .jsonl, .csv or .parquet files; the latter two are made once all lines are done.
        scorer_name: what the scorer is known by, in terms of JSON; another one does not go on with this output.
        force: whether to start over, whatever the output holds.
        retry: whether lines that failed are tried again.
        progress: whether to show a bar on stderr.
        options: decoding options of the lines that have none of their own; `seed` is the run's.

    Returns:
        on rank 0, the summary of all lines, those of earlier runs included.

    Raises:
        FileNotFoundError, ValueError, BlockingIOError, OSError: as `batch.run_batch_files`.
    """
    seed = llama.seed if options.get("seed") is None else options["seed"]
    options = {name: value for name, value in options.items() if name != "seed"}
    checked = DecodingOptions(**options)
    check_option(checked, plan)
    llama.check_option(checked)
    parameters = {"model": identity(llama), "options": options, "seed": seed, "plan": vars(plan), "scorer": scorer_name}

    def task_of(row: Row) -> dict[str, Any]:
        known = (*KEYS[: -len(OPTIONS)], *SAMPLED)
        if unknown := [name for name in row.fields if name not in known or name == "logprobs"]:
            expected = f"one of {', '.join(KINDS)}; id; metadata; or a decoding option: {', '.join(SAMPLED)}"
            raise ValueError(f"{unknown[0]!r} is not known: expected {expected}")
        given = {name: value for name, value in row.fields.items() if name in SAMPLED}
        given.setdefault("seed", line_seed(seed, row.id))
        return {"row": _prompt_of(row.fields), "options": given}

    def answered(work: Work) -> Iterator[None]:
        def tasks() -> Iterator[Task]:
            while (task := work.take()) is not None:
                try:
                    if "error" in task:
                        raise ValueError(task["error"])
                    if any(map(is_open, task["row"].get("messages", ()))):
                        raise ValueError("the dialog has open turns: expected none but the one at its end")
                    option = DecodingOptions(**options | from_json(task["options"]))
                    check_option(option, plan)
                    llama.check_option(option)
                    prompt = llama.check_prompt("the prompt", prompt_ids(llama, task["row"]))
                    yield Task(task["line"], task["row"], prompt, option)
                except (ValueError, TypeError) as error:
                    work.give({"line": task["line"], "error": str(error)})

        for task in draw(llama, tasks(), scorer, plan):
            work.give({"line": task.key, "seed": task.option.seed, **result(task.answers, plan)})
            yield

    return _run(source, target, parameters, task_of, answered, KEYS[1:], plan, force, retry, progress)


def rescore_files(
    source: str | os.PathLike,
    target: str | os.PathLike,
    scorer: Scorer,
    plan: Plan,
    scorer_name: Any,
    *,
    prompts: str | os.PathLike | None = None,
    force: bool = False,
    retry: bool = False,
    progress: bool = False,
) -> Summary | None:
    """Scores the answers that a file has: the output of `llama sample`, or of `llama batch`.

    Arguments, records and errors as in `sample_files`.

    Args:
        source: lines with `answers`, each an object with its `text`, or with one answer's `text`.
        prompts: the file with the lines that were answered, for a source that does not repeat them, such as the output
            of `llama batch`; the lines are found by their ids.
    """
    asked: dict[str, dict] = {}
    with parallel.fail_together():
        if prompts is not None and dist.get_rank() == 0:
            asked = {str(row.id): row.fields for row in Rows(prompts, KEYS[1:]) if row.error is None}

    def task_of(row: Row) -> dict[str, Any]:
        if "error" in row.fields:
            raise ValueError(f"it has no answer: {row.fields['error']}")
        fields = dict(row.fields)
        if prompts is not None:
            if str(row.id) not in asked:
                raise ValueError(f"{prompts} has no line with the id {row.id!r}")
            fields = asked[str(row.id)] | {name: fields[name] for name in ("answers", "text") if name in fields}
        answers = fields.get("answers", [{"text": fields["text"]}] if "text" in fields else None)
        is_list = isinstance(answers, list) and all(isinstance(a, dict) for a in answers)
        if not is_list or not answers or not all(isinstance(a.get("text"), str) for a in answers):
            raise ValueError("expected `answers`, a list of objects with a `text` each, or a `text`")
        kept = ("text", "finish_reason")
        answers = [{"score": None} | {name: a[name] for name in kept if name in a} for a in answers]
        return {"row": _prompt_of(fields, needed=False), "answers": answers}

    def answered(work: Work) -> Iterator[None]:
        group = fairscale_groups.get_model_parallel_group()
        while (task := work.take()) is not None:
            if "error" not in task:
                give_scores(scorer, task["row"], task["answers"], group)
                task = {"line": task["line"], **result(task["answers"], plan)}
            work.give(task)
            yield

    names = ("answers", *PROMPT_KEYS[1:])
    parameters = {"scorer": scorer_name, "keep": plan.keep}
    if prompts is not None:
        parameters["prompts"] = os.path.basename(prompts)
    return _run(source, target, parameters, task_of, answered, names, plan, force, retry, progress)


def _prompt_of(fields: Mapping[str, Any], needed: bool = True) -> dict[str, Any]:
    """The fields of a line that a scorer sees, and that a record repeats."""
    row = {name: fields[name] for name in PROMPT_KEYS if fields.get(name) is not None}
    if needed and len(given := [name for name in KINDS if name in row]) != 1:
        raise ValueError(f"found {' and '.join(given) or 'none'} of {', '.join(KINDS)}: expected one of them")
    return row


def _run(
    source: str | os.PathLike,
    target: str | os.PathLike,
    parameters: dict[str, Any],
    task_of: Callable[[Row], dict[str, Any]],
    answered: Callable[[Work], Iterator[None]],
    as_json: Iterable[str],
    plan: Plan,
    force: bool,
    retry: bool,
    progress: bool,
) -> Summary | None:
    """Makes tasks of the lines that are not done (rank 0), has them answered (all), and writes what comes of them."""
    output = None
    rows: Iterable[Row] = ()
    with parallel.fail_together():
        if dist.get_rank() == 0:
            rows = Rows(source, as_json)
            output = Output(target, rows, parameters, force, retry)
    try:
        with parallel.fail_at_once():
            done = set() if output is None else output.done
            records = _records((row for row in rows if row.number not in done), task_of, answered)
            if output is None:
                deque(records, maxlen=0)
            else:
                with tqdm(total=output.n_rows, initial=len(done), unit="line", disable=not progress) as bar:
                    for record in records:
                        output.append(record)
                        bar.update()
                output.finish()
            return None if output is None else summarize(output.journal, plan)
    finally:
        if output is not None:
            output.close()


def _records(
    rows: Iterable[Row], task_of: Callable[[Row], dict[str, Any]], answered: Callable[[Work], Iterator[None]]
) -> Iterator[dict[str, Any]]:
    """On rank 0, the record of each row as it is done; on the others, nothing, while they answer."""
    open_rows: dict[int, tuple[Row, dict]] = {}

    def tasks() -> Iterator[dict[str, Any]]:
        for row in rows:
            try:
                if row.error is not None:
                    raise ValueError(row.error)
                task = {"line": row.number, **task_of(row)}
            except (ValueError, TypeError) as error:
                task = {"line": row.number, "error": str(error)}
            open_rows[row.number] = row, task.get("row", {})
            yield task

    def record(said: dict[str, Any]) -> dict[str, Any]:
        row, prompt = open_rows.pop(said["line"])
        return {"id": row.id, "line": row.number, **prompt, **said}

    with Work(tasks()) as work:
        for _ in answered(work):
            yield from map(record, work.results())
        yield from map(record, work.results(wait=True))
        parallel.gather_from_replicas(
            []
        )  # a replica that comes late to ask for work finds someone to say there is none


def summarize(path: str | os.PathLike, plan: Plan) -> Summary:
    """The summary of an output's records."""
    summary = Summary(plan.threshold, None if plan.threshold is None else plan.n)
    with open(path, encoding="utf-8") as file:
        for record in map(json.loads, file):
            if "error" in record:
                summary.n_failed += 1
                continue
            summary.groups.append(record["scores"])
            errors = [answer["error"] for answer in record["answers"] if "error" in answer]
            summary.first_error = summary.first_error or next(iter(errors), None)
    return summary
