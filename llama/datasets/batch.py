"""Batches: answers rows on any number of processes, and yields or writes a record of each.

A row is a dictionary with one of `prompt` (a text), `messages` (a dialog, whose turns may be open) or `tokens` (ids).
It may also have an `id`, `logprobs`, `metadata` (copied to its record) and any decoding option. With a template, it has
the fields that the template names instead.

A row's record depends only on the row, the run's seed and the options: not on the other rows or their order, the number
of processes, or whether the run was killed and started again.
"""

import contextlib
import functools
import itertools
import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch.distributed as dist

from llama import parallel
from llama.datasets.prompts import KEYS, KINDS, OPTIONS, check_names, kind_of, prompt_ids
from llama.datasets.rows import Row, row_of, scan
from llama.datasets.runs import RemoteModel, Result, Run, Summary, Task, decoding_parameters
from llama.datasets.task_template import Template, read_template
from llama.decoding.answering import Answer, Job
from llama.decoding.predictions import details
from llama.decoding.rollouts import Rollout, Rollouts
from llama.generation import Llama
from llama.options import check_flags
from llama.tokenizer.open_turns import OpenDialog


def run_batch(
    llama: Llama | RemoteModel | str | dict[str, Any],
    lines: Iterable[dict],
    *,
    template: Any = None,
    logprobs: bool = False,
    replicas: int | None = None,
    **options: Any,
) -> Iterator[dict]:
    """Answers rows, and yields a record of each as soon as it is done.

    Each of several processes calls this and iterates to the end. Rank 0 gets the records; the others get nothing, and
    their `lines` are ignored.

    Args:
        llama: the model. With `replicas`, a checkpoint's directory or a dictionary of `Llama.build`'s arguments.
        replicas: the number of replicas on a Ray cluster (`parallel.actors`) that answer the rows; None for this model.
        lines: dictionaries as described above, taken one at a time, whenever there is room for another.
        template: the content of a template file (llama.datasets.task_template), or the file's path.
        logprobs: whether to record the log-probability of each token, for rows without `logprobs`.
        options: the decoding options, for rows without their own. A row's seed is a function of `seed` and its id.

    Yields:
        {"id", "line" (the row's number, from 1), "text", "finish_reason" ("stop", "length" or "error"), "prompt_tokens"
        and "answer_tokens" (their numbers), "seed"}, and if they apply "error", "answers" (all of several; the text is
        the first's), "turns" and "messages" (of open turns: each answer, and the whole dialog), "tokens", "logprobs",
        "top_logprobs" (as in `Llama.text_completion`), "token_ids" (for a row of `tokens`), "score" (of a beam search),
        "task", "parsed", "parse_error" and the filled "prompt" or "messages" (with a template), "metadata".

    Raises:
        ValueError, TypeError: at once, if an option is out of range, the template is malformed, or two rows of a list
            have the same id. A broken row does not raise: its record has an `error`.
    """
    with contextlib.ExitStack() as closing:
        llama = closing.enter_context(_on_replicas(llama, replicas))
        run = _batch(llama, template, logprobs, options)
        with parallel.fail_together():
            if dist.get_rank() == 0:
                if isinstance(lines, (str, os.PathLike, dict)) or not isinstance(lines, Iterable):
                    hint = " (`run_batch_files` reads files)" if isinstance(lines, (str, os.PathLike)) else ""
                    raise TypeError(f"lines is a {type(lines).__name__}: expected dictionaries, one for each row{hint}")
                if isinstance(lines, (list, tuple)):
                    scan(map(row_of, itertools.count(1), lines))
        still_open = closing.pop_all()

    def records() -> Iterator[dict]:  # only this part is a generator, so that mistakes are raised at once
        with still_open, parallel.fail_at_once():
            yield from run.records(map(row_of, itertools.count(1), lines))
            parallel.gather_from_replicas([])  # waits until all processes are done

    found = records()
    weakref.finalize(found, still_open.close)  # for a generator that is never started
    return found


def run_batch_files(
    llama: Llama | RemoteModel | str | dict[str, Any],
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    template: Any = None,
    logprobs: bool = False,
    force: bool = False,
    retry: bool = False,
    progress: bool = False,
    indent: int | None = None,
    replicas: int | None = None,
    **options: Any,
) -> Summary | None:
    """`run_batch` from file to file, for the rows that have no record in the target yet. Arguments as in `Run.write`.

    If the run is stopped, the target has the answers so far, and the same call goes on from there.
    """
    with _on_replicas(llama, replicas) as llama:
        run = _batch(llama, template, logprobs, options)
        parameters = decoding_parameters(llama, run.options, run.seed)
        parameters |= {"logprobs": logprobs, "template": run.template and run.template.content}
        return run.write(source, target, parameters, force, retry, progress, indent)


def _on_replicas(model: Any, replicas: int | None) -> contextlib.AbstractContextManager:
    """The model itself, or with `replicas` a `RemoteModel` that is closed at the end."""
    if replicas is None:
        return contextlib.nullcontext(model)
    if not isinstance(model, (str, os.PathLike, dict)):
        found = f"replicas = {replicas} with a {type(model).__name__} of this process"
        raise TypeError(f"{found}: expected the checkpoint's directory, or a dictionary of Llama.build's arguments")
    return RemoteModel(model, replicas)


def _batch(llama: Llama | RemoteModel, template: Any, logprobs: bool, options: dict[str, Any]) -> "_Batch":
    check_flags(logprobs=logprobs)
    if not hasattr(llama, "answerer"):
        raise TypeError(f"llama is a {type(llama).__name__}: expected a Llama, or `replicas` and a directory")
    run = _Batch(llama, template, logprobs, options)
    content = run.template and run.template.content
    run.remote = functools.partial(_Batch, template=content, logprobs=logprobs, options=options)
    return run


@dataclass(eq=False)
class _OpenTask:
    """A task that is being answered."""

    task: Task
    rollouts: Rollouts | None = None  # of a dialog


class _Batch(Run):
    """Runs a job for each row; for a dialog with open turns, one for each turn of each rollout."""

    streams = True

    def __init__(self, llama: Llama, template: Any, logprobs: bool, options: dict[str, Any]):
        super().__init__(llama, options)
        self.logprobs = logprobs
        self.template: Template | None = None
        with parallel.fail_together():
            if template is not None and dist.get_rank() == 0:
                is_path = isinstance(template, (str, os.PathLike))
                self.template = read_template(template) if is_path else Template(template)
                self.template.check_options(self.option_of)

    def task_of(self, row: Row) -> Task:
        if self.template is None:
            check_names(row.fields, ("logprobs", "metadata"), OPTIONS)
            given, options = row.fields, {}
            prompt = {(kind := kind_of(given)): given[kind]}
        else:
            task = self.template.task_of(row.fields)
            prompt, options = task.render({"id": row.id, **row.fields}), task.options
            task.measure("", {}, row.fields)  # raises if the row has no right answer
            taken = {*KINDS, *task.fields, task.gold, self.template.column}  # the template's fields are no options
            given = {name: value for name, value in row.fields.items() if name in KEYS and name not in taken}
        logprobs = given.get("logprobs", self.logprobs)
        if not isinstance(logprobs, bool):
            raise ValueError(f"logprobs = {logprobs!r}: expected true or false")
        options = options | {name: value for name, value in given.items() if name in OPTIONS}
        return {**prompt, "logprobs": logprobs, "options": self.with_seed(options, row)}

    def begin(self, task: Task) -> list[Job] | Result:
        option, key = self.option_of(task["options"]), _OpenTask(task)
        if "messages" in task:
            dialog = OpenDialog(task["messages"], self.llama.formatter)
            key.rollouts = Rollouts(dialog, option, lambda dialog: prompt_ids(self.llama, {"messages": dialog}, option))
            return [key.rollouts.first(key, logprobs=task["logprobs"])]
        return [Job(key, prompt_ids(self.llama, task, option), option, logprobs=task["logprobs"])]

    def go_on(self, job: Job, answers: list[Answer]) -> list[Job] | Result:
        rollouts = job.key.rollouts
        if rollouts is None or not rollouts.dialog.has_placeholders:
            return self._result(job, [self._fields_of(job, job.prompt, answer) for answer in answers])
        jobs = rollouts.go_on(job, answers)
        if rollouts.n_open:
            return jobs
        return self._result(job, [self._fields_of_rollout(job, rollout) for rollout in rollouts.rollouts])

    def record_of(self, row: Row, task: Task, result: Result) -> dict[str, Any]:
        failed = {"text": "", "finish_reason": "error"} if "error" in result else {}
        record = super().record_of(row, task, failed | result)
        if not failed and self.template is not None:
            template = self.template.task_of(row.fields)
            read = template.read(record["text"])
            record |= {"task": template.name, **read, **template.measure(record["text"], read, row.fields)}
            for answer in record.get("answers", ()):
                read = template.read(answer["text"])
                answer |= read | template.measure(answer["text"], read, row.fields)
            if "answers" in record and template.metric is not None:  # the row's metric is the mean of its answers'
                record[template.metric] = fmean(answer[template.metric] for answer in record["answers"])
            record |= {kind: task[kind] for kind in KINDS if kind in task}  # the row does not have the filled prompt
        if row.error is None and "metadata" in row.fields:
            record["metadata"] = row.fields["metadata"]
        return record

    def _result(self, job: Job, answers: list[dict]) -> Result:
        """The fields of a row's record, from the fields of each answer."""
        result = {"line": job.key.task["line"], **answers[0]}
        filled = {name: result.pop(name) for name in ("turns", "messages") if name in result}
        n_tokens = sum(answer["answer_tokens"] for answer in answers)
        result |= {"answer_tokens": n_tokens, "seed": job.option.seed, **filled}
        if len(answers) > 1:
            result["answers"] = [{n: v for n, v in answer.items() if n != "prompt_tokens"} for answer in answers]
        if errors := [answer["error"] for answer in answers if "error" in answer]:
            result |= {"finish_reason": "error", "error": errors[0]}
        return result

    def _fields_of(self, job: Job, prompt: list[int], answer: Answer) -> dict:
        """The fields of one answer."""
        fields = {"text": answer.text, "finish_reason": answer.finish_reason, "answer_tokens": len(answer.tokens)}
        fields["prompt_tokens"] = len(prompt)
        if "tokens" in job.key.task:
            fields["token_ids"] = answer.tokens
        fields |= {} if answer.error is None else {"error": answer.error}
        top = {"top_logprobs": job.option.top_logprobs}
        return fields | details(self.llama.answerer, prompt, answer, job.logprobs, False, top)

    def _fields_of_rollout(self, job: Job, rollout: Rollout) -> dict:
        """The fields of a rollout's last answer, with all its turns."""
        turns = [self._fields_of(job, prompt, answer) for prompt, answer in rollout.turns]
        fields = turns[-1] | {"turns": turns, "messages": rollout.dialog.messages}
        fields["answer_tokens"] = sum(turn["answer_tokens"] for turn in turns)
        return fields if rollout.error is None else fields | {"finish_reason": "error", "error": rollout.error}
