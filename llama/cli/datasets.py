"""The commands for files of rows: batch, sample, rescore. Killed and started again, each does the missing rows.

Knows nothing of how rows are read, answered or scored. Checks everything it can before any weights are read.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
from tyro.conf import Positional, arg

from llama import DecodingOptions, Llama, parallel
from llama.checkpoint.open import find_tokenizer
from llama.cli.arguments import BatchLoading, Decoding, OneAnswer, is_first_rank
from llama.datasets.batch import run_batch_files
from llama.datasets.fingerprint import fingerprint as fingerprint_of
from llama.datasets.journal import check_target
from llama.datasets.rows import Rows
from llama.datasets.runs import RemoteModel, check_indent, check_stream
from llama.datasets.task_template import read_template, report_of, table_of
from llama.rejection_sampling.best_of_n import Summary, require_matplotlib
from llama.rejection_sampling.draw import Plan, check_option
from llama.rejection_sampling.files import RemoteScorer, rescore_files, sample_files
from llama.rejection_sampling.scorers import JUDGE_TEMPLATE, Scorer, check_spec, is_judge, load_scorer
from llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Files:
    """The files to read and to write."""

    source: Positional[str]  # the rows: JSON lines or an array, CSV or Parquet; for `batch`, "-" is standard input
    target: Positional[str]  # the answers, in one of these formats; for `batch`, "-" is standard output, as JSON lines
    force: bool = False  # starts over, whatever the target has
    retry: bool = False  # tries rows again that failed, or that have an answer without a score
    indent: int | None = None  # spaces by which the records of a .json target are indented

    def check(self, *others: str | None, streams: bool = False) -> None:
        """Raises OSError, ValueError or ImportError if rows cannot be read, or answers cannot be written.

        `streams`: whether "-" may be the target.
        """
        check_stream(self.target, streams)
        check_indent(self.indent, self.target)
        if is_first_rank():
            inputs = [self.source, *(path for path in others if path is not None)]
            if self.target != "-":
                check_target(self.target, *inputs)
            for path in inputs:
                next(iter(Rows(path)), None)  # reading the first row finds what is wrong with the file

    @contextlib.contextmanager
    def opened(self) -> Iterator["Files"]:
        """These files; if the source is standard input, it is read into a file first."""
        if self.source != "-":
            yield self
            return
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
            if is_first_rank():
                shutil.copyfileobj(sys.stdin.buffer, file)
                file.flush()
            yield replace(self, source=file.name)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """After Ctrl-C, prints that nothing is lost."""
        try:
            yield
        except KeyboardInterrupt:
            hint = "has the answers so far, and the same command goes on from there"
            print(f"stopped: {self.target} {hint}", file=sys.stderr)
            raise


def batch(
    files: Files,
    loading: BatchLoading,
    decoding: Decoding,
    *,
    template: str | None = None,
    logprobs: bool = False,
    report: str | None = None,
) -> None:
    """Answers the rows of a file, each with a prompt, messages or tokens. Started again, it does the missing rows.

    Under torchrun, every replica (see --model_parallel_size) takes a row whenever it has room. docs/guide.md describes
    the rows and the answers.

    Args:
        template: a JSON file of task prompts, which are filled with the fields of the rows.
        logprobs: whether to write the log-probability of each token.
        report: a JSON file to write, with the failures and the mean metric of each task of a template.
    """
    if report is not None and (template is None or files.target == "-"):
        raise ValueError(f"--report {report}: expected a --template, and a file as the target")
    if report is not None and is_first_rank():
        check_report(Path(report), files)
    with files.opened() as files:
        files.check(streams=True)
        if template is not None and is_first_rank():
            read_template(template)
        options = {"template": template, "logprobs": logprobs, "force": files.force, "retry": files.retry}
        with _model(loading, decoding) as llama, files.interruptible():
            summary = run_batch_files(
                llama, files.source, files.target, progress=True, indent=files.indent, **options, **decoding.given()
            )
    if summary is not None:
        print(summary, file=sys.stderr)
        if template is not None and files.target != "-":
            with summary.path.open(encoding="utf-8") as lines:
                found = report_of(map(json.loads, lines))
            print(table_of(found))
            if report is not None:
                Path(report).parent.mkdir(parents=True, exist_ok=True)
                Path(report).write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if summary.n_failed == summary.n_lines > 0:
            sys.exit(1)


@dataclass(frozen=True)
class Scoring:
    """How answers are scored."""

    scorer: str  # logprob, mean_logprob, reward:DIR, judge, judge:DIR or module:function
    judge_template: str | None = None  # a file with the question to a judge, with {prompt} and {answer} in it
    judge_answer: str = "Yes"  # a judge's reply to a good answer; its log-probability is the score
    plot: str | None = None  # a PNG to write, with a histogram of the scores and the best-of-n curve

    @functools.cached_property
    def template(self) -> str:
        """The question to a judge. Raises FileNotFoundError or ValueError."""
        return JUDGE_TEMPLATE if self.judge_template is None else _read_judge_template(self.judge_template)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The scorer's fingerprint, as JSON."""
        judge = {"template": self.template, "answer": self.judge_answer} if is_judge(self.scorer) else {}
        return {"scorer": self.scorer, **judge}

    def check(self) -> None:
        """Raises OSError, ValueError or ImportError for what is wrong, as far as can be seen without any weights."""
        if self.plot is not None:
            require_matplotlib()
            if is_first_rank():
                _check_plot(Path(self.plot))
        check_spec(self.scorer, self.template)

    def load(self, llama: Llama | None, loading: BatchLoading) -> Scorer:
        """The scorer. If it has its own model, that is loaded like the command's, on as many processes."""
        names = ("max_seq_len", "max_batch_size", "model_parallel_size", "device", "dtype")
        own = {name: value for name in names if (value := getattr(loading, name)) is not None}
        if llama is not None:
            n_ranks = dist.get_world_size() // parallel.n_replicas()
            own |= {"tokenizer": llama.tokenizer, "model_parallel_size": n_ranks}
        elif path := loading.tokenizer_path or loading.ckpt_dir:
            own["tokenizer"] = Tokenizer(find_tokenizer(Path(path)) if Path(path).is_dir() else path)
        with contextlib.redirect_stdout(sys.stderr):
            parallel.initialize(own.get("model_parallel_size"), parallel.pick_device(loading.device))
            scorer = load_scorer(self.scorer, llama, self.template, self.judge_answer, **own)
        parallel.silence_other_ranks()
        return scorer

    def scorer_for(self, llama: Llama | RemoteModel | None, loading: BatchLoading) -> Scorer | RemoteScorer:
        """The scorer, or a RemoteScorer that loads it in each replica."""
        if not isinstance(llama, RemoteModel):
            return self.load(llama, loading)
        reads_prompt = ":" not in self.scorer or self.scorer.startswith(("reward:", "judge:"))
        return RemoteScorer(functools.partial(self.load, loading=loading), reads_prompt)

    def run(self, score: Callable[..., Summary | None], files: Files, *args: Any, **options: Any) -> None:
        """Calls `sample_files` or `rescore_files`, prints the summary, and plots it for --plot."""
        with files.interruptible():
            summary = score(*args, force=files.force, retry=files.retry, progress=True, indent=files.indent, **options)
        if summary is None:
            return
        print(summary.text())
        if summary.first_error is not None:
            hint = "(--retry scores rows again if an answer has no score; the answers stay the same)"
            print(hint, file=sys.stderr)
        if self.plot is not None:
            Path(self.plot).parent.mkdir(parents=True, exist_ok=True)
            summary.plot(self.plot)
        if not summary.scores and (summary.groups or summary.n_failed):
            sys.exit(1)


@dataclass(frozen=True)
class Drawing(Plan):
    """How many answers are drawn and kept."""

    n: Annotated[int, arg(aliases=("-n",))] = 16  # how many are drawn; with a threshold, how many at a time

    def __post_init__(self):
        """Checks nothing: `plan` does, and its errors are one line instead of tyro's box."""

    def plan(self) -> Plan:
        """The plan, checked. Raises ValueError."""
        return Plan(**vars(self))


def sample(
    files: Files,
    loading: BatchLoading,
    decoding: OneAnswer,
    scoring: Scoring,
    drawing: Drawing,
    *,
    template: str | None = None,
) -> None:
    """Draws n answers to each row of a file, scores them, keeps the best. Started again, it does the missing rows.

    Rows are as for `llama batch`; the scorer reads their metadata. Under torchrun write -n, because torchrun has an
    option --n of its own.

    Args:
        template: a JSON file of task prompts, which are filled with the fields of the rows.
    """
    plan = drawing.plan()
    check_option(DecodingOptions(**decoding.given()), plan)
    files.check()
    if template is not None and is_first_rank():
        read_template(template)
    scoring.check()
    with _model(loading, decoding) as llama:
        arguments = (llama, files.source, files.target, scoring.scorer_for(llama, loading), plan, scoring.fingerprint)
        scoring.run(sample_files, files, *arguments, template=template, **decoding.given())


def rescore(
    files: Files, loading: BatchLoading, scoring: Scoring, *, prompts: str | None = None, keep: int | None = None
) -> None:
    """Scores the answers in a file, such as the target of `llama batch`. Started again, it does the missing rows.

    Args:
        prompts: the file of the rows that were answered, if the source does not repeat them (`llama batch` does not).
        keep: how many of the best to write; all when left out.
    """
    plan = Plan(sys.maxsize, keep)
    files.check(prompts)
    scoring.check()
    fingerprint = scoring.fingerprint
    has_model = scoring.scorer in ("logprob", "mean_logprob", "judge")  # the others do not use the model
    with _model(loading, None, has_model) as llama:
        if has_model:
            fingerprint["model"] = fingerprint_of(llama)
        arguments = (files.source, files.target, scoring.scorer_for(llama, loading), plan, fingerprint)
        remote = {"llama": llama} if loading.is_remote else {}
        scoring.run(rescore_files, files, *arguments, prompts=prompts, **remote)


@contextlib.contextmanager
def _model(
    loading: BatchLoading, decoding: Decoding | None, has_model: bool = True
) -> Iterator[Llama | RemoteModel | None]:
    """The model of a command: in this process, or on replicas that are closed at the end."""
    if loading.is_remote:
        with loading.remote(decoding, has_model) as remote:
            yield remote
    else:
        yield loading.build(decoding) if has_model else None


def check_report(path: Path, files: Files) -> None:
    """Raises OSError or ValueError if a report could not be written at the end of the run."""
    if path.is_dir() or not _folder_of(path).is_dir():
        raise FileNotFoundError(f"--report {path}: expected the name of a file to write")
    if path.exists() and any(Path(f).exists() and path.samefile(f) for f in (files.source, files.target)):
        raise ValueError(f"--report {path} is the source or the target: expected another file")


def _folder_of(path: Path) -> Path:
    """The nearest folder above a file that exists. Writing the file makes the missing ones."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _check_plot(path: Path) -> None:
    """Raises OSError if a plot could not be written at the end of the run."""
    if not (folder := _folder_of(path)).is_dir():
        raise NotADirectoryError(f"--plot {path}: {folder} is a file: expected a directory for the PNG")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        found = "a directory" if path.is_dir() else "not writable"
        raise OSError(f"--plot {path} is {found}: expected a PNG to write")


def _read_judge_template(path: str) -> str:
    expected = "expected a text file with the question to a judge, with {answer} in it, and {prompt} if it is needed"
    if not Path(path).is_file():
        raise FileNotFoundError(f"--judge_template {path}: there is no such file: {expected}")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--judge_template {path}: not UTF-8 ({error}): {expected}") from None
