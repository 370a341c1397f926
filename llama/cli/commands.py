"""The commands: `python -m llama COMMAND`. Arguments become calls, results become text; nothing else happens here."""

import contextlib
import functools
import inspect
import io
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama import Llama, parallel
from llama.checkpoint.open import find_tokenizer
from llama.cli.arguments import run, takes, text_command
from llama.cli.chat import Conversation, Keyboard, show, talk
from llama.cli.finetune import finetune, merge
from llama.datasets.batch import OPTIONS, run_batch_files
from llama.datasets.fingerprint import identity
from llama.datasets.journal import check_target
from llama.datasets.rows import Rows
from llama.datasets.task_template import read_template
from llama.decoding.scoring import least_certain
from llama.options import NAMES, DecodingOptions
from llama.rejection_sampling.best_of_n import Summary, require_matplotlib
from llama.rejection_sampling.draw import Plan, check_option
from llama.rejection_sampling.files import SAMPLED, rescore_files, sample_files
from llama.rejection_sampling.scorers import JUDGE_TEMPLATE, Scorer, check_spec, is_judge, load_scorer
from llama.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "demo" / "checkpoint"
DEMO_SEQ_LEN = 256  # positions past that the embedded model has not seen

# The fields of DecodingOptions that make one answer, which can be shown while it is decided.
STREAMED = (
    *("max_gen_len", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("stop", "logit_bias", "seed"),
)


def info(ckpt_dir: str, tokenizer_path: str | None = None, max_seq_len: int = 2048, max_batch_size: int = 1) -> None:
    """Shows what a checkpoint directory holds, and the memory it needs at a given batch and length.

    Args:
        ckpt_dir: Meta's directory or Hugging Face's.
        tokenizer_path: the tokenizer's file; the directory's own when left out.
        max_seq_len: tokens of a prompt and its answer.
        max_batch_size: sequences at a time.
    """
    from llama.checkpoint.inspect import info

    for name, value in info(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size):
        print(f"{name:20} {value}")


def verify(ckpt_dir: str, tokenizer_path: str | None = None) -> None:
    """Reads all of a checkpoint directory and lists what is wrong with it; the exit code is 1 if anything is.

    Args:
        ckpt_dir: Meta's directory or Hugging Face's.
        tokenizer_path: the tokenizer's file; the directory's own when left out.
    """
    from llama.checkpoint.inspect import bytes_to_verify, verify
    from llama.checkpoint.writer import progress

    with progress(bytes_to_verify(ckpt_dir), "verify") as advance:
        found = verify(ckpt_dir, tokenizer_path, advance)
    for note in found.notes:
        print(f"note: {note}")
    for problem in found.problems:
        print(f"problem: {problem}")
    print(f"{found.n_tensors} tensors, {found.n_bytes / 1e9:.2f} GB read: {len(found.problems) or 'no'} problems")
    if found.problems:
        sys.exit(1)


def convert(src: str, dst: str, to: str, shards: int | None = None, dtype: str | None = None) -> None:
    """Writes a checkpoint directory again, in Meta's format or Hugging Face's.

    Args:
        src: the directory to read, of either format.
        dst: the directory to make.
        to: "meta" or "hf".
        shards: into how many files the weights are cut.
        dtype: of the weights written; the source's when left out.
    """
    from llama.checkpoint.convert import convert

    convert(src, dst, to, shards, dtype)
    print(f"wrote {dst}")


def quantize(src: str, dst: str, to: str) -> None:
    """Writes a checkpoint directory again with its matrices in 8 or 4 bits, for `--ckpt_dir`.

    Args:
        src: the directory to read, Meta's or Hugging Face's.
        dst: the directory to make.
        to: "int8" or "int4".
    """
    from llama.checkpoint.convert import quantize

    quantize(src, dst, to)
    print(f"wrote {dst}")


def load(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    model_parallel_size: int | None = None,
    compile: bool = False,
    quantize: str | None = None,
    draft: str | None = None,
) -> Llama:
    """Builds the model of a command; what there is to say of it goes to stderr.

    Args:
        ckpt_dir: Meta's directory or Hugging Face's; the embedded checkpoint when left out.
        tokenizer_path: the tokenizer's file; the directory's own when left out.
        max_seq_len: tokens of a prompt and its answer; 2048 when left out, 256 with the embedded checkpoint.
        max_batch_size: sequences at a time.
        device: "cuda", "mps" or "cpu"; the first of these that is there when left out.
        dtype: of weights and computation, such as "bfloat16"; the checkpoint's when left out.
        model_parallel_size: over how many processes the model is split; all of them when left out.
        compile: whether to compile the decoding step: a minute the first time, a little faster then.
        quantize: "int8" or "int4" rounds the matrices while they are loaded.
        draft: the directory of a smaller model that proposes tokens, or "ngram": the same answers, sooner.
    """
    if ckpt_dir is None and not DEMO.is_dir():
        raise FileNotFoundError(
            f"there is no embedded checkpoint at {DEMO} (only a clone of the repository has it): "
            "pass --ckpt_dir DIR, a directory with a checkpoint"
        )
    max_seq_len = max_seq_len or (2048 if ckpt_dir else DEMO_SEQ_LEN)
    with contextlib.redirect_stdout(sys.stderr):
        llama = Llama.build(
            *(ckpt_dir or DEMO, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size),
            **{"device": device, "dtype": dtype, "compile": compile, "quantize": quantize, "draft": draft},
        )
    parallel.silence_other_ranks()  # again: the end of the redirection undid it
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    return llama


# The parameters of `load` in commands with a batch size of their own.
LOADED = [name for name in inspect.signature(load).parameters if name != "max_batch_size"]


def _split(options: dict[str, Any]) -> tuple[Llama, dict[str, Any]]:
    """The model and the checked decoding options that a command's options ask for."""
    decoding = {name: options.pop(name) for name in NAMES if name in options}
    checked = DecodingOptions(**decoding)  # before the weights are read
    llama = load(**options)
    llama.answerer.check_option(checked)
    return llama, decoding


def _report_speculation(llama: Llama) -> None:
    """Says on stderr what a draft was good for; nothing where there is none."""
    counters = llama._engine.counters
    counts = counters.speculation
    if counts.steps and dist.get_rank() == 0:
        per_step = counters.decoded / counts.steps
        print(
            f"({per_step:.2f} tokens a step: {counts.accepted} of {counts.proposed} proposals accepted)",
            file=sys.stderr,
        )


@text_command
@takes(DecodingOptions, *STREAMED)
@takes(load)
def chat(*, system: str | None = None, **options: Any) -> None:
    """Talks with a model in the terminal. /help there lists what else can be typed.

    Args:
        system: the system prompt.
    """
    llama, decoding = _split(options)
    keyboard = Keyboard()
    if keyboard.tty:
        show("/help lists the commands, /quit leaves.\n")
    talk(Conversation(llama, system, **decoding), keyboard)
    _report_speculation(llama)


@text_command
@takes(DecodingOptions, *STREAMED)
@takes(load)
def complete(text: str, **options: Any) -> None:
    """Continues a text, and shows what is added while it is decided.

    Args:
        text: the beginning; "-" reads it from standard input, without the newline at its end.
    """
    llama, decoding = _split(options)
    piece = None
    for piece in llama.stream_text(Keyboard().read_all() if text == "-" else text, **decoding):
        show(piece)
    show("\n")
    if piece is None:
        print("(the model adds nothing, or there is no room for more)", file=sys.stderr)
    _report_speculation(llama)


@text_command
@takes(load)
def score(text: str, **options: Any) -> None:
    """Shows how likely a model finds each token of a text, in nats, its perplexity, and the least likely tokens.

    Args:
        text: of any length; "-" reads it from standard input, without the newline at its end.
    """
    llama = load(**options)
    (result,) = llama.score([Keyboard().read_all() if text == "-" else text])
    logprobs = result["logprobs"][1:]  # the first is the begin-of-text token
    if not logprobs:
        raise ValueError("the text is empty: expected some to score")
    for logprob, token in zip(logprobs, result["tokens"][1:]):
        show(f"{logprob:9.4f}  {token!r}\n")
    perplexity = math.exp(-math.fsum(logprobs) / len(logprobs))
    show(f"{len(logprobs)} tokens, perplexity {perplexity:.4f}\nleast certain:\n{least_certain(result)}\n")


@text_command
@takes(DecodingOptions, *OPTIONS)
@takes(load, *LOADED)
def batch(
    source: str,
    target: str,
    *,
    max_batch_size: int = 16,
    template: str | None = None,
    logprobs: bool = False,
    force: bool = False,
    retry: bool = False,
    **options: Any,
) -> None:
    """Answers the lines of a file. Killed and started again, it does what is missing.

    Under torchrun, every replica (see --model_parallel_size) takes a line whenever it has room. docs/guide.md has the
    keys of the lines and of the answers.

    Args:
        source: JSON lines, CSV or Parquet, with a prompt, messages or tokens in each row.
        target: the answers, in one of these formats.
        max_batch_size: lines at a time, of each replica.
        template: a JSON file of task prompts, which are filled with the fields of the lines.
        logprobs: whether to write the log-probability of each token.
        force: starts over, whatever the target holds.
        retry: tries lines again that have failed.
    """
    if os.environ.get("RANK", "0") == "0":  # what can be found out before the weights are read
        _check_files(source, target)
        if template is not None:
            read_template(template)
    llama, decoding = _split({"max_batch_size": max_batch_size, **options})
    given = {"template": template, "logprobs": logprobs, "force": force, "retry": retry}
    started = time.perf_counter()
    try:
        summary = run_batch_files(llama, source, target, progress=True, **given, **decoding)
    except KeyboardInterrupt:
        print(f"stopped: {target} has what was done, and the same command goes on from there", file=sys.stderr)
        raise
    if summary is not None:
        summary.seconds = time.perf_counter() - started
        print(summary, file=sys.stderr)
        if summary.n_failed == summary.n_lines > 0:
            sys.exit(1)


@dataclass
class Scoring:
    """How answers are scored, and what becomes of the scores.

    Attributes:
        scorer: logprob, mean_logprob, reward:DIR, judge, judge:DIR or module:function.
        judge_template: a file with what a judge is asked, {prompt} and {answer} in it.
        judge_answer: what a judge says of a good answer; its log-probability is the score.
        plot: a PNG to write, with a histogram of the scores and the best-of-n curve.
        max_batch_size: answers at a time, of each replica.
        force: starts over, whatever the target holds.
        retry: tries lines again that have failed, or have an answer without a score.
    """

    scorer: str
    judge_template: str | None = None
    judge_answer: str = "Yes"
    plot: str | None = None
    max_batch_size: int = 16
    force: bool = False
    retry: bool = False

    @classmethod
    def of(cls, options: dict[str, Any], source: str, target: str, prompts: str | None = None) -> "Scoring":
        """Takes its options out of a command's, and checks all that can be before any weights are read."""
        how = cls(**{name: options.pop(name) for field in fields(cls) if (name := field.name) in options})
        options["max_batch_size"] = how.max_batch_size
        if int(os.environ.get("RANK", 0)) == 0:
            _check_files(source, target, prompts)
            if how.plot is not None:
                _check_writable(Path(how.plot))
        if how.plot is not None:
            require_matplotlib()
        check_spec(how.scorer, how.template)
        return how

    @functools.cached_property
    def template(self) -> str:
        return JUDGE_TEMPLATE if self.judge_template is None else _read_judge_template(self.judge_template)

    @property
    def known(self) -> dict[str, Any]:
        """What the scorer is known by."""
        judge = {"template": self.template, "answer": self.judge_answer} if is_judge(self.scorer) else {}
        return {"scorer": self.scorer, **judge}

    def load(self, llama: Llama | None, options: dict[str, Any]) -> Scorer:
        """The scorer. A model of its own is loaded as the command's is, on as many processes."""
        own = {name: options[name] for name in ("max_seq_len", "max_batch_size", "device", "dtype") if name in options}
        if llama is not None:
            own |= {"tokenizer": llama.tokenizer, "model_parallel_size": llama.model.tok_embeddings.world_size}
        else:
            own["model_parallel_size"] = options.get("model_parallel_size")
            if path := options.get("tokenizer_path") or options.get("ckpt_dir"):
                own["tokenizer"] = Tokenizer(find_tokenizer(Path(path)) if Path(path).is_dir() else path)
        with contextlib.redirect_stdout(sys.stderr):
            parallel.initialize(own["model_parallel_size"], parallel.pick_device(options.get("device")))
            scorer = load_scorer(self.scorer, llama, self.template, self.judge_answer, **own)
        parallel.silence_other_ranks()
        return scorer

    def run(self, work: Callable[..., Summary | None], *args: Any, **options: Any) -> None:
        """Scores; the summary is shown, and drawn if it is to be."""
        try:
            summary = work(*args, force=self.force, retry=self.retry, progress=True, **options)
        except KeyboardInterrupt:
            print("stopped: the output has what was done, and the same command goes on from there", file=sys.stderr)
            raise
        if summary is None:
            return
        print(summary.text())
        if summary.first_error is not None:
            hint = "(with --retry, the lines in which an answer has no score are done again, and give the same answers)"
            print(hint, file=sys.stderr)
        if self.plot is not None:
            summary.plot(self.plot)
        if not summary.scores and (summary.groups or summary.n_failed):
            sys.exit(1)


@text_command
@takes(DecodingOptions, *SAMPLED)
@takes(load, *LOADED)
@takes(Scoring)
def sample(
    source: str,
    target: str,
    *,
    n: int = 16,
    keep: int | None = None,
    threshold: float | None = None,
    max_samples: int | None = None,
    **options: Any,
) -> None:
    """Draws n answers to each line of a file, scores them, keeps the best. Started again, it does what is missing.

    Args:
        source: lines as those of `llama batch`; a line's metadata is the scorer's.
        target: the answers with their scores: JSON lines, CSV or Parquet.
        n: answers to each line; with a threshold, how many are drawn at a time. (Under torchrun, which takes --n for
            an option of its own, write -n.)
        keep: writes the best so many; all when left out.
        threshold: draws until `keep` answers (one, when that is left out) have this score,
        max_samples: or so many have been drawn.
    """
    plan = Plan(n, keep, threshold, max_samples)
    check_option(DecodingOptions(**{name: options[name] for name in NAMES if name in options}), plan)
    how = Scoring.of(options, source, target)
    loading = dict(options)
    llama, decoding = _split(options)
    how.run(sample_files, llama, source, target, how.load(llama, loading), plan, how.known, **decoding)


@text_command
@takes(load, *LOADED)
@takes(Scoring)
def rescore(source: str, target: str, *, prompts: str | None = None, keep: int | None = None, **options: Any) -> None:
    """Scores the answers that a file has: what `llama sample` or `llama batch` wrote. Goes on like these.

    Args:
        source: lines with answers, or with the text of one.
        target: the same answers with their new scores: JSON lines, CSV or Parquet.
        prompts: the lines that were answered, where the source does not repeat them (as that of `llama batch`).
        keep: writes the best so many; all when left out.
    """
    plan = Plan(sys.maxsize, keep)
    how = Scoring.of(options, source, target, prompts)
    llama, known = None, how.known
    if how.scorer in ("logprob", "mean_logprob", "judge"):  # the others have no use for the model
        llama = load(**options)
        known["model"] = identity(llama)
    how.run(rescore_files, source, target, how.load(llama, options), plan, known, prompts=prompts)


def _check_files(source: str, target: str, *others: str | None) -> None:
    """Raises OSError, ValueError or ImportError where rows cannot be read, or answers to them not be written."""
    inputs = [source, *(path for path in others if path is not None)]
    check_target(target, *inputs)
    for path in inputs:
        next(iter(Rows(path)), None)  # a first one shows what there is to say against the file


def _check_writable(plot: Path) -> None:
    """Raises OSError where a plot could not be written when all is done."""
    if not plot.parent.is_dir():
        raise FileNotFoundError(f"--plot {plot}: there is no directory {plot.parent}: expected one that is there")
    if plot.is_dir() or not os.access(plot if plot.exists() else plot.parent, os.W_OK):
        found = "a directory" if plot.is_dir() else "not to be written on"
        raise OSError(f"--plot {plot}: it is {found}: expected a PNG to write")


def _read_judge_template(path: str) -> str:
    """What a judge is asked. Raises FileNotFoundError or ValueError."""
    expected = "expected a text file of what a judge is asked, with {answer} in it, and {prompt} where it is needed"
    if not Path(path).is_file():
        raise FileNotFoundError(f"--judge_template {path}: there is no such file: {expected}")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--judge_template {path}: not UTF-8 ({error}): {expected}") from None


COMMANDS = {
    "chat": chat,
    "complete": complete,
    "score": score,
    "batch": batch,
    "sample": sample,
    "rescore": rescore,
    "info": info,
    "verify": verify,
    "convert": convert,
    "quantize": quantize,
    "finetune": finetune,
    "merge": merge,
}


def main(argv: list[str] | None = None) -> None:
    """Runs the command of argv, sys.argv's when None, as `run` does."""
    run(COMMANDS, argv)
