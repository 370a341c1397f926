"""Data sets of prompts: lines in, a record for each out as it is answered, on however many processes.

A line is a dictionary with one of `prompt` (a text), `messages` (a dialog, whose turns may be open) or `tokens` (ids);
it may have an `id`, `logprobs`, `metadata`, which is handed on, and any decoding option. With a template it has the
fields that this names instead. Rank 0 reads, makes tasks of the lines and records of what comes of them; each replica
takes a task whenever it has room, and answers it.

What a line gives is a function of the line, the run's seed and options alone: not of the other lines, nor of their
order, how many processes there are, or what was done before the run was killed and started again.
"""

import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from llama import parallel
from llama.datasets.journal import Journal
from llama.datasets.prompts import KINDS, kind_of, prompt_ids
from llama.datasets.rows import Row, row_of, scan
from llama.datasets.runs import Files, Run, decoding_parameters, line_seed
from llama.datasets.task_queue import TaskQueue
from llama.datasets.task_template import Template, read_template
from llama.decoding.answering import Answer, Job
from llama.generation import Llama
from llama.options import NAMES, DecodingOptions, from_json, per_prompt
from llama.tokenizer.open_turns import OpenDialog

OPTIONS = tuple(name for name in NAMES if name != "logits_processor")  # a file holds no code
KEYS = (*KINDS, "logprobs", "metadata", *OPTIONS)  # of a line, besides its id
N_ERRORS_SHOWN = 10


def run_batch(
    llama: Llama, lines: Iterable[dict], *, template: Any = None, logprobs: bool = False, **options: Any
) -> Iterator[dict]:
    """Answers lines, and yields a record for each as it is done; mistakes in the arguments are raised at once.

    On several processes each calls this and goes through what it yields, to the end: the records, on rank 0; nothing,
    on the others, whose `lines` are not looked at.

    Args:
        llama: who answers.
        lines: dictionaries as described above, taken one after the other, as there is room to answer them.
        template: the content of a template file (llama.datasets.task_template), or the file's path.
        logprobs: whether the log-probability of each token is wanted of all lines.
        options: the decoding options of lines that have none of their own; `seed` is the run's, from which that of each
            line is made, with its id.

    Yields:
        {"id", "line" (its number, from 1), "text", "finish_reason" ("stop", "length" or "error"), "prompt_tokens" and
        "answer_tokens" (how many), "seed"}, and as they apply "error", "answers" (all, where several are asked for; the
        text is the first's), "turns" and "messages" (where turns were open: what came of each, and the whole dialog),
        "tokens", "logprobs", "top_logprobs" (as in `Llama.text_completion`), "token_ids" (for a line of `tokens`),
        "score" (of a beam search), "task", "parsed", "parse_error" and the filled "prompt" or "messages" (with a
        template), "metadata".

    Raises:
        ValueError, TypeError: an option is out of range, the template is malformed, or, of a list, two lines have the
            same id. Nothing has run then. A line that is broken gives a record with an `error` instead.
    """
    run = _Answering(llama, template, logprobs, options).run()
    rows = map(row_of, itertools.count(1), lines)
    with parallel.fail_together():
        if isinstance(lines, (list, tuple)) and dist.get_rank() == 0:
            scan(map(row_of, itertools.count(1), lines))

    def records() -> Iterator[dict]:
        with parallel.fail_at_once():
            yield from run.records(rows)
            parallel.gather_from_replicas([])  # none goes on before all are done

    return records()


@dataclass
class Summary:
    """What a run over files has done: lines in all, answered and failed, those of them earlier; tokens, seconds."""

    n_lines: int
    n_done: int = 0
    n_failed: int = 0
    n_before: int = 0
    n_tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        before = f" ({self.n_before:,} of them before)" if self.n_before else ""
        rate = self.n_tokens / max(self.seconds, 1e-9)
        return (
            f"{self.n_done:,} of {self.n_lines:,} lines done{before}, {self.n_failed:,} of them failed; "
            f"{self.n_tokens:,} tokens in {self.seconds:.1f} s, {rate:,.0f} tokens/s"
        )


def run_batch_files(
    llama: Llama,
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    template: Any = None,
    logprobs: bool = False,
    force: bool = False,
    retry: bool = False,
    progress: bool = False,
    **options: Any,
) -> Summary | None:
    """`run_batch` from file to file (.jsonl, .csv or .parquet), which only does what the output does not have yet.

    Only rank 0 needs the files. What was answered is in the output whatever happens; the same call goes on from there.

    Args:
        source: the lines.
        target: the records; CSV and Parquet files are made once all lines are done.
        force: whether to start over, whatever the output holds.
        retry: whether lines that failed are tried again; if not, they count as done.
        progress: whether to show a bar, and the first lines that fail, on stderr.
        llama, template, logprobs, options: as in `run_batch`.

    Returns:
        on rank 0, what was done.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `run_batch`, `Rows` and `Journal`. Nothing has run then.
        BlockingIOError: another run is writing the output.
        OSError: the output cannot be written.
    """
    answering = _Answering(llama, template, logprobs, options)
    summary = Summary(0)
    files = Files(source, target, force, retry)
    journal = files.write(answering.run(), answering.parameters(), partial(_shown, summary, progress))
    return None if journal is None else summary


def _shown(summary: Summary, progress: bool, records: Iterator[dict], journal: Journal) -> Iterator[dict]:
    """The records, which are counted as they are written, and a bar."""
    summary.n_lines, summary.n_failed = journal.n_rows, journal.n_failed
    summary.n_done = summary.n_before = len(journal.done)
    started = time.perf_counter()
    with tqdm(total=summary.n_lines, initial=summary.n_done, unit="line", disable=not progress) as bar:
        for record in records:
            yield record
            summary.n_done += 1
            summary.n_tokens += record.get("answer_tokens", 0)
            summary.seconds = time.perf_counter() - started
            if "error" in record:
                summary.n_failed += 1
                if progress and summary.n_failed <= N_ERRORS_SHOWN:
                    more = " (failures after this one are not shown)" if summary.n_failed == N_ERRORS_SHOWN else ""
                    tqdm.write(f"line {record['line']}: {record['error']}{more}", file=sys.stderr)
            rate = summary.n_tokens / summary.seconds
            bar.set_postfix_str(f"{summary.n_failed} failed, {rate:.0f} tokens/s", refresh=False)
            bar.update()


@dataclass(eq=False)
class _Line:
    """A task that is being answered: its dialog, if it is one, and the turns so far."""

    task: dict
    option: DecodingOptions
    dialog: OpenDialog | None = None
    turns: list[dict] = field(default_factory=list)


class _Answering:
    """What the lines of a run have in common. The first half is rank 0's, the second that of every process."""

    def __init__(self, llama: Llama, template: Any, logprobs: bool, options: dict[str, Any]):
        self.llama, self.logprobs = llama, logprobs
        per_prompt(1, **options)
        self.seed = llama.seed if options.get("seed") is None else options["seed"]
        self.options = {name: value for name, value in options.items() if name != "seed"}
        self._check_option(self.options)
        self.template: Template | None = None
        with parallel.fail_together():
            if template is not None and dist.get_rank() == 0:
                is_path = isinstance(template, (str, os.PathLike))
                self.template = read_template(template) if is_path else Template(template)
                for name, task in self.template.tasks.items():
                    try:
                        self._check_option(self.options | task.options)
                    except ValueError as error:
                        raise ValueError(f"task {name!r} of the template: {error}") from None

    def run(self) -> Run:
        return Run(self._task_of, self._answers, self._record_of, KEYS[1:])

    def parameters(self) -> dict[str, Any]:
        """All that the answers depend on besides the lines; every process has part in it."""
        template = None if self.template is None else self.template.content
        run = {"logprobs": self.logprobs, "template": template}
        return decoding_parameters(self.llama, self.options, self.seed) | run

    def _task_of(self, row: Row) -> dict:
        """What a replica has to know of a line."""
        task: dict[str, Any] = {}
        given, options = row.fields, {}
        if self.template is not None:
            known = self.template.task_of(row.fields)
            task |= known.render({"id": row.id, **row.fields})
            options = known.options
            taken = {*known.fields, *KINDS}
            given = {name: value for name, value in given.items() if name in KEYS and name not in taken}
        elif unknown := [name for name in given if name not in KEYS]:
            expected = f"one of {', '.join(KINDS)}; id, logprobs, metadata; or a decoding option: {', '.join(OPTIONS)}"
            raise ValueError(f"{unknown[0]!r} is not known: expected {expected}")
        else:
            task[kind_of(given)] = given[kind_of(given)]
        task["logprobs"] = given.get("logprobs", self.logprobs)
        if not isinstance(task["logprobs"], bool):
            raise ValueError(f"logprobs = {task['logprobs']!r}: expected true or false")
        options = options | from_json({name: value for name, value in given.items() if name in OPTIONS})
        if options.get("seed") is None:
            options["seed"] = line_seed(self.seed, row.id)
        task["options"] = options
        return task

    def _record_of(self, row: Row, task: dict, result: dict) -> dict:
        record = {"id": row.id, **result}
        if "error" in result:
            record = {"id": row.id, "line": row.number, "text": "", "finish_reason": "error"} | result
        elif self.template is not None:
            known = self.template.task_of(row.fields)
            record |= {"task": known.name, **known.read(record["text"])}
            for answer in record.get("answers", ()):
                answer |= known.read(answer["text"])
            record |= {kind: task[kind] for kind in KINDS if kind in task}  # the line does not say what was asked
        if row.error is None and "metadata" in row.fields:
            record["metadata"] = row.fields["metadata"]
        return record

    def _check_option(self, options: dict[str, Any]) -> DecodingOptions:
        option = DecodingOptions(**options)
        self.llama.check_option(option)
        return option

    # What every process does

    def _answers(self, queue: TaskQueue) -> Iterator[None]:
        """Answers tasks as long as there are any, and gives word of each; yields whenever one is done."""
        next_turns: deque[Job] = deque()  # of dialogs whose last turn was filled just now
        n_rolling = 0  # dialogs that have been begun and may have a next turn

        def jobs() -> Iterator[Job | None]:
            nonlocal n_rolling
            more = True
            while more or n_rolling:
                if next_turns:
                    yield next_turns.popleft()
                elif not more:
                    yield None
                elif (task := queue.take()) is None:
                    more = False
                else:
                    try:
                        job = self._job(self._line(task))
                    except (ValueError, TypeError) as error:
                        queue.give({"line": task["line"], "error": str(error)})
                        continue
                    n_rolling += job.key.dialog is not None
                    yield job

        for job, answers in self.llama.answer_jobs(jobs()):
            line, result = job.key, self._result(job, answers)
            if line.dialog is not None:
                n_rolling -= 1
                line.dialog.fill(result["text"])
                if line.dialog.has_placeholders:
                    line.turns.append({name: value for name, value in result.items() if name not in ("line", "seed")})
                    if not line.dialog.is_done and "error" not in result:
                        try:
                            next_turns.append(self._job(line))
                            n_rolling += 1
                            continue
                        except ValueError as error:  # the dialog has become too long
                            result |= {"finish_reason": "error", "error": str(error)}
                    result |= {"turns": line.turns, "messages": line.dialog.messages}
                    result["answer_tokens"] = sum(turn["answer_tokens"] for turn in line.turns)
            queue.give(result)
            yield

    def _line(self, task: dict) -> _Line:
        """A task, checked. Raises ValueError or TypeError."""
        if "error" in task:
            raise ValueError(task["error"])
        options = task["options"]
        if "logit_bias" in options:  # through JSON its ids have become strings again
            options = from_json(options)
        line = _Line(task, self._check_option(self.options | options))
        if "messages" in task:
            line.dialog = OpenDialog(task["messages"], self.llama.formatter)
            if line.dialog.has_placeholders and line.option.num_return_sequences > 1:
                n = line.option.num_return_sequences
                raise ValueError(f"num_return_sequences = {n}: expected 1 where there are open turns")
        return line

    def _job(self, line: _Line) -> Job:
        """The next answer of a line that is wanted. Raises ValueError or TypeError."""
        row = line.task if line.dialog is None else {"messages": line.dialog.prompt}
        return Job(line, prompt_ids(self.llama, row), line.option, logprobs=line.task["logprobs"])

    def _result(self, job: Job, answers: list[Answer]) -> dict:
        """What a record says of a job."""
        shown = [self._answer(job, answer) for answer in answers]
        line = {"line": job.key.task["line"], **shown[0], "prompt_tokens": len(job.prompt)}
        line |= {"answer_tokens": sum(len(answer.tokens) for answer in answers), "seed": job.option.seed}
        if len(answers) > 1:
            line["answers"] = shown
        if errors := [answer.error for answer in answers if answer.error is not None]:
            line |= {"finish_reason": "error", "error": errors[0]}
        return line

    def _answer(self, job: Job, answer: Answer) -> dict:
        shown = {"text": answer.text, "finish_reason": answer.finish_reason, "answer_tokens": len(answer.tokens)}
        if "tokens" in job.key.task:
            shown["token_ids"] = answer.tokens
        if answer.score is not None:
            shown["score"] = answer.score
        options = {"top_logprobs": job.option.top_logprobs}
        return shown | self.llama.details(job.prompt, answer, job.logprobs, False, options)
