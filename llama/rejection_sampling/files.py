"""Rejection sampling from file to file, and scores for the answers in a file: on any number of replicas.

Rows and their seeds are those of `llama.datasets.batch`; the output is locked, and a killed run goes on where it was.
"""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama import parallel
from llama.datasets.journal import check_target
from llama.datasets.prompts import KEYS, KINDS, OPTIONS, check_names, kind_of
from llama.datasets.rows import Row, Rows, scan
from llama.datasets.runs import RemoteModel, Result, Run, Task, decoding_parameters
from llama.datasets.task_template import Task as TaskTemplate
from llama.datasets.task_template import read_template
from llama.decoding.answering import Answer, Job
from llama.generation import Llama
from llama.options import shown
from llama.rejection_sampling.best_of_n import Summary
from llama.rejection_sampling.draw import Plan, check_option, drawing_of, prompt_to_sample
from llama.rejection_sampling.scorers import Judge, Logprob, Reward, Scorer, add_scores, named_scorer
from llama.tokenizer.open_turns import PLACEHOLDER, has_open_turns

# The decoding options for sampled answers: all but these.
NOT_SAMPLED = ("num_return_sequences", "num_beams", "length_penalty", "early_stopping", "top_logprobs")
SAMPLED = tuple(name for name in OPTIONS if name not in NOT_SAMPLED)
PROMPT_KEYS = (*KINDS, "metadata")  # the fields of a row that its record repeats, and that a scorer reads
# The fields of the answer in a record of `llama batch` with one answer.
ANSWER_KEYS = ("text", "finish_reason", "answer_tokens", "token_ids", "tokens", "logprobs", "top_logprobs")


@dataclass(frozen=True)
class RemoteScorer:
    """A scorer that each replica of a `RemoteModel` loads for itself."""

    load: Callable[[Llama | None], Scorer]  # called with the replica's model
    reads_prompt: bool = True  # whether it needs rows with a prompt

    @classmethod
    def sampling(cls, llama: Llama, options: dict[str, Any], scorer: "RemoteScorer", plan: Plan) -> "_Sampling":
        """The run on a replica."""
        return _Sampling(llama, options, scorer.load(llama), plan)

    @classmethod
    def rescoring(cls, llama: Llama | None, scorer: "RemoteScorer", plan: Plan) -> "_Rescoring":
        """The run on a replica."""
        return _Rescoring(scorer.load(llama), plan, None)


def sample_files(
    llama: Llama | RemoteModel,
    source: str | os.PathLike,
    target: str | os.PathLike,
    scorer: Scorer | RemoteScorer,
    plan: Plan,
    scorer_name: Any,
    *,
    force: bool = False,
    retry: bool = False,
    progress: bool = False,
    indent: int | None = None,
    template: str | os.PathLike | None = None,
    **options: Any,
) -> Summary | None:
    """Draws and scores answers to the rows of a file that have none in the target yet, and keeps the best.

    The rows are those of `llama.datasets.batch`. The `metadata` of a row has what the scorer needs besides the prompt,
    such as the right answer. A record is {"id", "line", the prompt, "metadata", "seed"} and what `rejection_sample`
    returns, or an "error". Returns on rank 0 a summary of all rows, including those of earlier runs.

    Args:
        source, target, force, progress, indent: as in `Run.write`, as are the errors.
        scorer: as in `rejection_sample`; a RemoteScorer if `llama` is a RemoteModel.
        scorer_name: the scorer's fingerprint, as JSON; a target with another one is refused.
        retry: whether rows that failed, or have an answer without a score, are done again.
        template: a file of task prompts (llama.datasets.task_template); a scorer finds the row's fields in `metadata`.
        options: the decoding options, for rows without their own; `seed` is the run's.
    """
    if not isinstance(scorer, RemoteScorer):
        scorer = named_scorer(scorer, llama)
    run = _Sampling(llama, options, scorer, plan, template)
    run.remote = functools.partial(RemoteScorer.sampling, options=options, scorer=scorer, plan=plan)
    parameters = decoding_parameters(llama, run.options, run.seed) | {"plan": vars(plan), "scorer": scorer_name}
    if template is not None:
        parameters["template"] = run.template and run.template.content
    written = run.write(source, target, parameters, force, retry, progress, indent)
    return written and _summary(written.path, plan)


def rescore_files(
    source: str | os.PathLike,
    target: str | os.PathLike,
    scorer: Scorer | RemoteScorer,
    plan: Plan,
    scorer_name: Any,
    *,
    llama: RemoteModel | None = None,
    prompts: str | os.PathLike | None = None,
    force: bool = False,
    retry: bool = False,
    progress: bool = False,
    indent: int | None = None,
) -> Summary | None:
    """Scores the answers in a file: the output of `llama sample`, or of `llama batch`.

    Arguments, records and errors as in `sample_files`. The scorer reads an answer's `text` and `finish_reason`; the
    answer's other fields, such as `logprob`, are copied to its record. `line` is the number of the row in the source.
    If a row has only the best of the answers drawn, `n_drawn` of its record is the number drawn.

    Args:
        llama: its replicas score, with a RemoteScorer.
        source: rows with `answers`, each a text or an object with its `text`; with the `text` of one answer; or with
            `messages` that end with the assistant's, whose content is an answer or a list of answers.
        prompts: the file with the rows that were answered, matched by id, for a source that does not repeat them, such
            as the output of `llama batch`.
    """
    if not isinstance(scorer, RemoteScorer):
        scorer = named_scorer(scorer, None)
    parameters = {"scorer": scorer_name, "keep": plan.keep}
    run = _Rescoring(scorer, plan, prompts, llama)
    run.remote = functools.partial(RemoteScorer.rescoring, scorer=scorer, plan=plan)
    with parallel.fail_together():
        if prompts is not None and dist.get_rank() == 0:
            check_target(target, prompts)
            rows = Rows(prompts, KEYS[1:])
            try:
                parameters["prompts"] = scan(rows).digest
            except ValueError as error:
                raise ValueError(f"{prompts}: {error}") from None
            run.answered = {str(row.id): row.fields for row in rows if row.error is None}
    written = run.write(source, target, parameters, force, retry, progress, indent)
    return written and _summary(written.path, plan)


class _Sampling(Run):
    """Makes a drawing for each row."""

    def __init__(self, llama: Llama, options: dict[str, Any], scorer: Scorer, plan: Plan, template: Any = None):
        super().__init__(llama, options)
        self.scorer, self.plan, self.template = scorer, plan, None
        check_option(self.option_of({}), plan)
        with parallel.fail_together():
            if template is not None and dist.get_rank() == 0:
                self.template = read_template(template)
                self.template.check_options(self._check_options)

    def task_of(self, row: Row) -> Task:
        if self.template is not None:
            return self._task_of_template(row, self.template.task_of(row.fields))
        check_names(row.fields, ("metadata",), SAMPLED)
        kind_of(row.fields)
        options = {name: value for name, value in row.fields.items() if name in SAMPLED}
        return {"row": _prompt_of(row.fields), "options": self.with_seed(options, row)}

    def _task_of_template(self, row: Row, template: TaskTemplate) -> Task:
        """The task that a template makes of a row. The scorer finds all fields of the row in `metadata`."""
        taken = {*template.fields, template.gold, self.template.column}  # the template's fields are no options
        given = {name: value for name, value in row.fields.items() if name in SAMPLED and name not in taken}
        data = {name: value for name, value in row.fields.items() if name not in given}
        metadata = data.get("metadata", data)
        filled = template.render({"id": row.id, **row.fields}) | {"metadata": metadata, "task": template.name}
        return {"row": filled, "options": self.with_seed(template.options | given, row)}

    def _check_options(self, options: dict[str, Any]) -> None:
        """Checks the options of a template's task before anything runs."""
        if wrong := sorted(options.keys() - set(SAMPLED)):
            raise ValueError(f"{wrong[0]} has no part in rejection sampling: n says how many answers are drawn")
        check_option(self.option_of(options), self.plan)

    def begin(self, task: Task) -> list[Job] | Result:
        option = self.option_of(task["options"])
        job = Job(task["line"], prompt_to_sample(self.llama, task["row"], option), option)
        return drawing_of(self.llama, job, task["row"], self.plan, self.scorer).next_jobs()

    def go_on(self, job: Job, answers: list[Answer]) -> list[Job] | Result:
        drawing = job.key
        if (jobs := drawing.go_on(job, answers)) is not None:
            return jobs
        return {"line": drawing.job.key, "seed": job.option.seed, **self.plan.result(drawing.answers)}


class _Rescoring(Run):
    """Scores the answers of each row. It has no jobs."""

    as_json = ("answers", "scores", "n_drawn", "turns", "seed", *PROMPT_KEYS[1:], *ANSWER_KEYS[2:])

    def __init__(
        self,
        scorer: Scorer | RemoteScorer,
        plan: Plan,
        prompts: str | os.PathLike | None,
        llama: RemoteModel | None = None,
    ):
        super().__init__()
        self.llama = llama
        # A function of the caller's may not read the prompt.
        self.reads_prompt = getattr(scorer, "reads_prompt", isinstance(scorer, (Logprob, Reward, Judge)))
        self.scorer, self.plan, self.prompts = scorer, plan, prompts
        self.answered: dict[str, dict] = {}  # the rows of `prompts`, by their ids

    def task_of(self, row: Row) -> Task:
        fields = _with_answers(row.fields)
        if "error" in fields:
            raise ValueError(f"it has no answer: {fields['error']}")
        if self.prompts is not None and str(row.id) not in self.answered:
            raise ValueError(f"{self.prompts} has no line with the id {row.id!r}")
        prompt = _prompt_of_answers(fields, self.answered.get(str(row.id)))
        try:
            if self.reads_prompt:
                kind_of(prompt)
        except ValueError as error:
            hint = "pass the file with the lines that were answered as --prompts"
            where = f"in {self.prompts}" if self.prompts else hint
            raise ValueError(f"{error}, which the scorer reads ({where})") from None
        return {"row": prompt, "answers": _answers_of(fields)}

    def begin(self, task: Task) -> Job | Result:
        read = ("text", "finish_reason", "score", "error", "messages")
        scored = [{name: answer[name] for name in read if name in answer} for answer in task["answers"]]
        add_scores(self.scorer, task["row"], scored)
        answers = [answer | score for answer, score in zip(task["answers"], scored)]
        return {"line": task["line"], **self.plan.result(answers)}

    def record_of(self, row: Row, task: Task, result: Result) -> dict[str, Any]:
        copied = {"seed": row.fields["seed"]} if "seed" in row.fields else {}
        if "answers" in task:
            scores = row.fields.get("scores")
            n_drawn = row.fields.get("n_drawn", len(scores) if isinstance(scores, list) else 0)
            if isinstance(n_drawn, int) and n_drawn > len(task["answers"]):
                copied["n_drawn"] = n_drawn
        return super().record_of(row, task, copied | result)


def _prompt_of(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row in PROMPT_KEYS."""
    return {name: fields[name] for name in PROMPT_KEYS if fields.get(name) is not None}


def _prompt_of_answers(record: dict[str, Any], row: dict[str, Any] | None) -> dict[str, Any]:
    """As `_prompt_of`, for the row that was answered: `row`, or the record itself if that is None.

    Raises:
        ValueError: the dialog has open turns, and the record does not have the answers in them.
    """
    prompt = _prompt_of(record if row is None else row)
    filled = record.get("messages")
    if "turns" in record and isinstance(filled, list):  # of `llama batch`: the whole dialog, ending with the answer
        return prompt | {"messages": filled[:-1]}
    if row is None and isinstance(record.get("logprobs"), list):
        prompt.pop("tokens", None)  # these are the answer's
    own = [a.get("messages") for a in record.get("answers") or () if isinstance(a, dict)]
    has_own = own and all(isinstance(messages, list) and not has_open_turns(messages) for messages in own)
    if has_open_turns(prompt.get("messages")) and not has_own:  # rollouts have their own filled dialogs
        if not isinstance(filled, list) or has_open_turns(filled):
            found = "the dialog has open turns, and the record does not have the answers in them"
            raise ValueError(f"{found}: expected its `turns` and `messages`, as `llama batch` writes them")
        prompt["messages"] = filled  # of a file that was scored before: the dialog up to the answer
    return prompt


def _with_answers(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row. If its dialog ends with answers (the last `content` is a text or a list), as `answers`."""
    messages = fields.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or (content := last.get("content")) == PLACEHOLDER:
        return fields
    if named := fields.keys() & {"answers", "text", "error"}:
        if isinstance(content, list):
            raise ValueError(f"found {named.pop()} and a dialog that ends with a list of answers: expected one of them")
        return fields
    return {**fields, "messages": messages[:-1], "answers": content if isinstance(content, list) else [content]}


def _answers_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A record's answers without their scores. A failed answer keeps its error, and is not scored."""
    answers = record.get("answers")
    if answers is None and "text" in record:
        answers = [{name: record[name] for name in ANSWER_KEYS if name in record}]
    if isinstance(answers, list):
        answers = [{"text": answer} if isinstance(answer, str) else answer for answer in answers]
    is_list = isinstance(answers, list) and all(isinstance(a, dict) for a in answers)
    if not is_list or not answers or not all(isinstance(a.get("text"), str) for a in answers):
        fields = f"answers = {shown(answers)}" if "answers" in record else f"no answers in {', '.join(sorted(record))}"
        expected = "a list of texts or of objects with a `text` each; a `text`; or messages that end with them"
        raise ValueError(f"found {fields}: expected `answers`, {expected}")
    result = []
    for answer in answers:
        dropped = ("score",) if answer.get("finish_reason") == "error" else ("score", "error")
        kept = {name: value for name, value in answer.items() if name not in dropped}
        result.append({"text": answer["text"], "score": None} | kept)
    return result


def _summary(journal: Path, plan: Plan) -> Summary:
    """The summary of all records of a journal."""
    summary = Summary(plan.threshold, None if plan.threshold is None else plan.n)
    with journal.open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            if "error" in record:
                summary.n_failed += 1
                continue
            summary.groups.append(record["scores"])
            summary.is_selection |= "n_drawn" in record
            errors = [answer["error"] for answer in record["answers"] if "error" in answer]
            summary.first_error = summary.first_error or next(iter(errors), None)
    return summary
