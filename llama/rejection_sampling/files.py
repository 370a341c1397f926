"""Rejection sampling from file to file, and scores for the answers that a file has: on any number of replicas.

Lines and their seeds are those of `llama.datasets.batch`; the journal is locked, and a killed run goes on where it was.
Rank 0 reads and writes; each replica takes a line whenever it has room.
"""

import json
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch.distributed as dist
from tqdm import tqdm

from llama import parallel
from llama.datasets.batch import KEYS, OPTIONS
from llama.datasets.journal import Journal, check_target
from llama.datasets.prompts import KINDS, kind_of
from llama.datasets.rows import Row, Rows, scan
from llama.datasets.runs import Files, Run, decoding_parameters, line_seed
from llama.datasets.task_queue import TaskQueue
from llama.generation import Llama
from llama.options import DecodingOptions, from_json
from llama.rejection_sampling.best_of_n import Summary
from llama.rejection_sampling.draw import Plan, Task, check_option, draw, give_scores, prompt_to_sample, result
from llama.rejection_sampling.scorers import Judge, Logprob, Reward, Scorer
from llama.tokenizer.open_turns import has_open_turns

# The decoding options of a sampled answer.
NOT_SAMPLED = ("num_return_sequences", "num_beams", "length_penalty", "early_stopping", "top_logprobs")
SAMPLED = tuple(name for name in OPTIONS if name not in NOT_SAMPLED)
PROMPT_KEYS = (*KINDS, "metadata")  # what a record says of its prompt
# What a file may say of a single answer beside the prompt: the names are those of `llama batch`.
ANSWER_KEYS = ("text", "finish_reason", "answer_tokens", "token_ids", "tokens", "logprobs", "top_logprobs")


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

    A line holds what one of `llama.datasets.batch` does; its `metadata` is where a scorer finds what it needs to know,
    such as the right answer. A record is {"id", "line", the prompt, "metadata", "seed"} and what `rejection_sample`
    returns, or an "error".

    Args:
        llama, scorer, plan: as in `rejection_sampling.draw`.
        source, target: .jsonl, .csv or .parquet files; the latter two are made once all lines are done.
        scorer_name: what the scorer is known by, in terms of JSON; another one does not go on with this output.
        force: whether to start over, whatever the output holds.
        retry: whether lines that failed, or have an answer without a score, are tried again.
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
    parameters = decoding_parameters(llama, options, seed) | {"plan": vars(plan), "scorer": scorer_name}

    def task_of(row: Row) -> dict[str, Any]:
        known = (*PROMPT_KEYS, *SAMPLED)
        if unknown := [name for name in row.fields if name not in known]:
            expected = f"one of {', '.join(KINDS)}; id; metadata; or a decoding option: {', '.join(SAMPLED)}"
            raise ValueError(f"{unknown[0]!r} is not known: expected {expected}")
        kind_of(row.fields)
        given = {name: value for name, value in row.fields.items() if name in SAMPLED}
        if given.get("seed") is None:
            given["seed"] = line_seed(seed, row.id)
        return {"row": _prompt_of(row.fields), "options": given}

    def answer(queue: TaskQueue) -> Iterator[None]:
        def tasks() -> Iterator[Task]:
            while (task := queue.take()) is not None:
                try:
                    if "error" in task:
                        raise ValueError(task["error"])
                    option = DecodingOptions(**options | from_json(task["options"]))
                    check_option(option, plan)
                    llama.check_option(option)
                    yield Task(task["line"], task["row"], prompt_to_sample(llama, task["row"]), option)
                except (ValueError, TypeError) as error:
                    queue.give({"line": task["line"], "error": str(error)})

        for task in draw(llama, tasks(), scorer, plan):
            queue.give({"line": task.key, "seed": task.option.seed, **result(task.answers, plan)})
            yield

    run = Run(task_of, answer, _record_of, KEYS[1:])
    return _write(run, parameters, plan, Files(source, target, force, retry), progress)


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

    Arguments, records and errors as in `sample_files`. What is known of an answer, its `logprob` say, is copied to its
    record; the scorer is given its `text` and `finish_reason`. Of a line that has only the best of what was drawn,
    `n_drawn` says how much that was. `line` is the line's number in the file with the answers.

    Args:
        source: lines with `answers`, each an object with its `text`, or with one answer's `text`.
        prompts: the file with the lines that were answered, for a source that does not repeat them, such as the output
            of `llama batch`; the lines are found by their ids.

    Raises:
        ValueError: also if two lines of `prompts` have the same id.
    """
    parameters = {"scorer": scorer_name, "keep": plan.keep}
    asked: dict[str, dict] = {}
    with parallel.fail_together():
        if prompts is not None and dist.get_rank() == 0:
            check_target(target, prompts)
            rows = Rows(prompts, KEYS[1:])
            try:
                parameters["prompts"] = scan(rows).digest
            except ValueError as error:
                raise ValueError(f"{prompts}: {error}") from None
            asked = {str(row.id): row.fields for row in rows if row.error is None}

    def task_of(row: Row) -> dict[str, Any]:
        if "error" in row.fields:
            raise ValueError(f"it has no answer: {row.fields['error']}")
        if prompts is not None and str(row.id) not in asked:
            raise ValueError(f"{prompts} has no line with the id {row.id!r}")
        prompt = _prompt_of_answers(row.fields, asked.get(str(row.id)))
        if isinstance(scorer, (Logprob, Reward, Judge)):  # what a function of the caller's reads is not known
            try:
                kind_of(prompt)
            except ValueError as error:
                where = f"in {prompts}" if prompts else "pass the file with the lines that were answered as --prompts"
                raise ValueError(f"{error}, which the scorer reads ({where})") from None
        answers, scores = _answers_of(row.fields), row.fields.get("scores")
        n_drawn = row.fields.get("n_drawn", len(scores) if isinstance(scores, list) else 0)
        some = {"n_drawn": n_drawn} if isinstance(n_drawn, int) and n_drawn > len(answers) else {}
        return {"row": prompt, "answers": answers, **some}

    def answer(queue: TaskQueue) -> Iterator[None]:
        group = fairscale_groups.get_model_parallel_group()
        while (task := queue.take()) is not None:
            if "error" not in task:
                shown = ("text", "finish_reason", "score", "error")
                scored = [{name: a[name] for name in shown if name in a} for a in task["answers"]]
                give_scores(scorer, task["row"], scored, group)
                answers = [known | score for known, score in zip(task["answers"], scored)]
                task = {"line": task["line"], **result(answers, plan)}
            queue.give(task)
            yield

    def record_of(row: Row, task: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
        known = {"seed": row.fields["seed"]} if "seed" in row.fields else {}
        known |= {"n_drawn": task["n_drawn"]} if "n_drawn" in task else {}
        return _record_of(row, task, known | said)

    run = Run(
        task_of,
        answer,
        record_of,
        ("answers", "scores", "n_drawn", "turns", "seed", *PROMPT_KEYS[1:], *ANSWER_KEYS[2:]),
    )
    return _write(run, parameters, plan, Files(source, target, force, retry), progress)


def _prompt_of(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a line that a scorer sees, and that a record repeats."""
    return {name: fields[name] for name in PROMPT_KEYS if fields.get(name) is not None}


def _prompt_of_answers(record: dict[str, Any], asked: dict[str, Any] | None) -> dict[str, Any]:
    """As `_prompt_of`, of what the answers of a record answer.

    Args:
        record: a line with answers.
        asked: the line that was answered, if that is known.

    Raises:
        ValueError: the dialog has open turns, and the record does not say what became of them.
    """
    prompt = _prompt_of(record if asked is None else asked)
    filled = record.get("messages")
    if "turns" in record and isinstance(filled, list):  # of `llama batch`: the whole dialog, and its end is the answer
        return prompt | {"messages": filled[:-1]}
    if asked is None and isinstance(record.get("logprobs"), list):
        prompt.pop("tokens", None)  # those of the answer
    if has_open_turns(prompt.get("messages")):
        if not isinstance(filled, list) or has_open_turns(filled):
            raise ValueError(
                "the dialog has open turns, and the record does not say what came of them: expected its `turns` and "
                "`messages`, as `llama batch` writes them"
            )
        prompt["messages"] = filled  # scored before, up to the answer
    return prompt


def _answers_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A record's answers without their scores, and with the error of those that there is nothing to score of."""
    answers = record.get("answers")
    if answers is None and "text" in record:
        answers = [{name: record[name] for name in ANSWER_KEYS if name in record}]
    is_list = isinstance(answers, list) and all(isinstance(a, dict) for a in answers)
    if not is_list or not answers or not all(isinstance(a.get("text"), str) for a in answers):
        raise ValueError("expected `answers`, a list of objects with a `text` each, or a `text`")
    result = []
    for known in answers:
        dropped = ("score",) if known.get("finish_reason") == "error" else ("score", "error")
        result.append({"text": known["text"], "score": None} | {n: v for n, v in known.items() if n not in dropped})
    return result


def _record_of(row: Row, task: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    return {"id": row.id, "line": row.number, **task.get("row", {}), **said}


def _write(run: Run, parameters: dict[str, Any], plan: Plan, files: Files, progress: bool) -> Summary | None:
    """Writes the records, with a bar; returns the summary of all there are, on rank 0."""
    journal = files.write(run, parameters, partial(_shown, progress))
    return None if journal is None else summarize(journal.path, plan)


def _shown(progress: bool, records: Iterator[dict[str, Any]], journal: Journal) -> Iterator[dict[str, Any]]:
    with tqdm(total=journal.n_rows, initial=len(journal.done), unit="line", disable=not progress) as bar:
        for record in records:
            yield record
            bar.update()


def summarize(path: str | os.PathLike, plan: Plan) -> Summary:
    """The summary of a journal's records."""
    summary = Summary(plan.threshold, None if plan.threshold is None else plan.n)
    with open(path, encoding="utf-8") as file:
        for record in map(json.loads, file):
            if "error" in record:
                summary.n_failed += 1
                continue
            summary.groups.append(record["scores"])
            summary.is_selection |= "n_drawn" in record
            errors = [answer["error"] for answer in record["answers"] if "error" in answer]
            summary.first_error = summary.first_error or next(iter(errors), None)
    return summary
