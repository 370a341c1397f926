"""Batches: rows in, a record of each out as it is answered, on any number of processes.

A row is a dictionary with one of `prompt` (a text), `messages` (a dialog, whose turns may be open) or `tokens` (ids).
It may have an `id`, `logprobs`, `metadata`, which is copied to its record, and any decoding option. With a template it
has the fields that the template names instead.

The record of a row is a function of the row, the run's seed and the options alone: not of the other rows, nor of their
order, the number of processes, or what was done before the run was killed and started again.
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
    """Answers rows, and yields a record of each as it is done.

    On several processes each one calls this and iterates to the end. Rank 0 gets the records; the others get nothing,
    and their `lines` are ignored.

    Args:
        llama: the model. With `replicas`, a checkpoint's directory or a dictionary of `Llama.build`'s arguments.
        replicas: on how many replicas of a Ray cluster (`parallel.actors`) the rows are answered; none when None.
        lines: dictionaries as described above, taken one at a time, as there is room to answer them.
        template: the content of a template file (llama.datasets.task_template), or the file's path.
        logprobs: whether to record the log-probability of each token, for rows that do not say.
        options: the decoding options of rows that have none of their own; a row's seed is made of `seed` and its id.

    Yields:
        {"id", "line" (its number, from 1), "text", "finish_reason" ("stop", "length" or "error"), "prompt_tokens" and
        "answer_tokens" (how many), "seed"}, and where they apply "error", "answers" (all, where several are asked for;
        the text is the first's), "turns" and "messages" (where turns were open: the answer in each, and the whole
        dialog), "tokens", "logprobs", "top_logprobs" (as in `Llama.text_completion`), "token_ids" (for a row of
        `tokens`), "score" (of a beam search), "task", "parsed", "parse_error" and the filled "prompt" or "messages"
        (with a template), "metadata".

    Raises:
        ValueError, TypeError: at once, if an option is out of range, the template is malformed, or two rows of a list
            have the same id. A row that is broken gives a record with an `error` instead.
    """
    with contextlib.ExitStack() as closing:
        if replicas is not None:
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

    def records() -> Iterator[dict]:  # a generator of its own, so that mistakes are raised at once
        with still_open, parallel.fail_at_once():
            yield from run.records(map(row_of, itertools.count(1), lines))
            parallel.gather_from_replicas([])  # none goes on before all are done

    found = records()
    weakref.finalize(found, still_open.close)  # one that is never begun closes nothing itself
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
    """`run_batch` from file to file, for the rows that have no record in the target yet. More is in `Run.write`.

    Whatever happens, the target has what was answered, and the same call goes on from there.
    """
    if replicas is not None:
        with _on_replicas(llama, replicas) as remote:
            return run_batch_files(
                remote,
                source,
                target,
                template=template,
                logprobs=logprobs,
                force=force,
                retry=retry,
                progress=progress,
                indent=indent,
                **options,
            )
    run = _batch(llama, template, logprobs, options)
    parameters = decoding_parameters(llama, run.options, run.seed)
    parameters |= {"logprobs": logprobs, "template": run.template and run.template.content}
    return run.write(source, target, parameters, force, retry, progress, indent)


def _on_replicas(model: Any, replicas: int) -> RemoteModel:
    if not isinstance(model, (str, os.PathLike, dict)):
        found = f"replicas = {replicas} with a {type(model).__name__} that is built here"
        raise TypeError(f"{found}: expected the checkpoint's directory, or a dictionary of Llama.build's arguments")
    return RemoteModel(model, replicas)


def _batch(llama: Llama | RemoteModel, template: Any, logprobs: bool, options: dict[str, Any]) -> "_Batch":
    check_flags(logprobs=logprobs)
    if not hasattr(llama, "answerer"):
        raise TypeError(f"llama is a {type(llama).__name__}: expected a Llama; a directory goes with `replicas`")
    run = _Batch(llama, template, logprobs, options)
    content = run.template and run.template.content
    run.remote = functools.partial(_Batch, template=content, logprobs=logprobs, options=options)
    return run


@dataclass(eq=False)
class _Line:
    """A task that is being answered."""

    task: Task
    rollouts: Rollouts | None = None  # of a dialog


class _Batch(Run):
    """A job for each row; where turns are open, one for each turn of each rollout."""

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
            asked = {(kind := kind_of(given)): given[kind]}
        else:
            task = self.template.task_of(row.fields)
            asked, options = task.render({"id": row.id, **row.fields}), task.options
            task.measure("", {}, row.fields)  # raises where there is no right answer
            taken = {*KINDS, *task.fields, task.gold, self.template.column}  # a right answer is no option
            given = {name: value for name, value in row.fields.items() if name in KEYS and name not in taken}
        logprobs = given.get("logprobs", self.logprobs)
        if not isinstance(logprobs, bool):
            raise ValueError(f"logprobs = {logprobs!r}: expected true or false")
        options = options | {name: value for name, value in given.items() if name in OPTIONS}
        return {**asked, "logprobs": logprobs, "options": self.with_seed(options, row)}

    def begin(self, task: Task) -> list[Job] | Result:
        option, line = self.option_of(task["options"]), _Line(task)
        if "messages" in task:
            dialog = OpenDialog(task["messages"], self.llama.formatter)
            line.rollouts = Rollouts(
                dialog, option, lambda dialog: prompt_ids(self.llama, {"messages": dialog}, option)
            )
            return [line.rollouts.first(line, logprobs=task["logprobs"])]
        return [Job(line, prompt_ids(self.llama, task, option), option, logprobs=task["logprobs"])]

    def go_on(self, job: Job, answers: list[Answer]) -> list[Job] | Result:
        line = job.key
        if line.rollouts is None or not line.rollouts.dialog.has_placeholders:
            return self._result(job, [self._shown(job, job.prompt, answer) for answer in answers])
        jobs = line.rollouts.go_on(job, answers)
        if line.rollouts.n_open:
            return jobs
        return self._result(job, [self._shown_rollout(job, rollout) for rollout in line.rollouts.rollouts])

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
            if "answers" in record and template.metric is not None:  # that of the row is the mean of its answers'
                record[template.metric] = fmean(answer[template.metric] for answer in record["answers"])
            record |= {kind: task[kind] for kind in KINDS if kind in task}  # the row does not say what was asked
        if row.error is None and "metadata" in row.fields:
            record["metadata"] = row.fields["metadata"]
        return record

    def _result(self, job: Job, shown: list[dict]) -> Result:
        """What the record says of the answers to a row."""
        result = {"line": job.key.task["line"], **shown[0]}
        filled = {name: result.pop(name) for name in ("turns", "messages") if name in result}
        result |= {"answer_tokens": sum(answer["answer_tokens"] for answer in shown), "seed": job.option.seed, **filled}
        if len(shown) > 1:
            result["answers"] = [{n: v for n, v in answer.items() if n != "prompt_tokens"} for answer in shown]
        if errors := [answer["error"] for answer in shown if "error" in answer]:
            result |= {"finish_reason": "error", "error": errors[0]}
        return result

    def _shown(self, job: Job, prompt: list[int], answer: Answer) -> dict:
        """One answer, as a record has it."""
        shown = {"text": answer.text, "finish_reason": answer.finish_reason, "answer_tokens": len(answer.tokens)}
        shown["prompt_tokens"] = len(prompt)
        if "tokens" in job.key.task:
            shown["token_ids"] = answer.tokens
        shown |= {} if answer.error is None else {"error": answer.error}
        top = {"top_logprobs": job.option.top_logprobs}
        return shown | details(self.llama.answerer, prompt, answer, job.logprobs, False, top)

    def _shown_rollout(self, job: Job, rollout: Rollout) -> dict:
        """The last answer of a dialog, and those before it as its turns."""
        turns = [self._shown(job, prompt, answer) for prompt, answer in rollout.turns]
        shown = turns[-1] | {"turns": turns, "messages": rollout.dialog.messages}
        shown["answer_tokens"] = sum(turn["answer_tokens"] for turn in turns)
        return shown if rollout.error is None else shown | {"finish_reason": "error", "error": rollout.error}
