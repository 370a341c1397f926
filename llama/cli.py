"""The commands: `python -m llama COMMAND`. Arguments become calls, results become text; nothing else happens here."""

import contextlib
import functools
import inspect
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import torch.distributed as dist
from fire.decorators import SetParseFns

from llama import GenerationError, Llama, parallel
from llama.batch import OPTIONS, run_batch_files
from llama.best_of_n import require_matplotlib
from llama.chat import Conversation, Keyboard, show, talk
from llama.huggingface import find_tokenizer
from llama.identity import identity
from llama.options import NAMES, DecodingOptions
from llama.output import check_target
from llama.rejection_sampling import Plan, check_option
from llama.rows import Rows
from llama.sample_files import SAMPLED, rescore_files, sample_files
from llama.scorers import JUDGE_TEMPLATE, check_spec, is_judge, load_scorer
from llama.scoring import least_certain
from llama.task_template import read_template
from llama.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"
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
    from llama.inspect_checkpoint import info

    for name, value in info(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size):
        print(f"{name:20} {value}")


def verify(ckpt_dir: str, tokenizer_path: str | None = None) -> None:
    """Reads all of a checkpoint directory and lists what is wrong with it; the exit code is 1 if anything is.

    Args:
        ckpt_dir: Meta's directory or Hugging Face's.
        tokenizer_path: the tokenizer's file; the directory's own when left out.
    """
    from llama.checkpoint_writer import progress
    from llama.inspect_checkpoint import bytes_to_verify, verify

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
    from llama.convert import convert

    convert(src, dst, to, shards, dtype)
    print(f"wrote {dst}")


def quantize(src: str, dst: str, to: str) -> None:
    """Writes a checkpoint directory again with its matrices in 8 or 4 bits, for `--ckpt_dir`.

    Args:
        src: the directory to read, Meta's or Hugging Face's.
        dst: the directory to make.
        to: "int8" or "int4".
    """
    from llama.convert import quantize

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


def _takes(source: Callable, *names: str) -> Callable[[Callable], Callable]:
    """Gives a command that has **options the parameters of `source` (these, or all), in its signature and its help."""

    def extend(command: Callable) -> Callable:
        parameters = list(inspect.signature(command).parameters.values())
        theirs = inspect.signature(source).parameters
        bare = {"kind": inspect.Parameter.KEYWORD_ONLY, "annotation": inspect.Parameter.empty}  # fire cuts types short
        new = [theirs[name].replace(**bare) for name in names or theirs]
        command.__signature__ = inspect.Signature([*parameters[:-1], *new, parameters[-1]])
        command.__doc__ = inspect.getdoc(command)
        for name in names or theirs:  # its line among the Args or Attributes, and those further in
            command.__doc__ += "\n" + re.search(rf"^    {name}: .*(\n {{8}}.*)*", inspect.getdoc(source), re.M)[0]
        return command

    return extend


def _text_command(command: Callable) -> Callable:
    """The last touch: no more **options, and what is text is not read as Python, as fire would read 12 or (a, b)."""
    parameters = list(inspect.signature(command).parameters.values())
    command.__signature__ = inspect.Signature(parameters[:-1])
    texts = ("scorer", "prompts", "judge_template", "judge_answer", "plot")
    texts += (
        "text",
        "source",
        "target",
        "template",
        "system",
        "ckpt_dir",
        "tokenizer_path",
        "device",
        "dtype",
        "draft",
        "quantize",
    )
    return SetParseFns(str, stop=_stops, **dict.fromkeys(texts, str))(command)


def _stops(value: str) -> Any:
    """A list in JSON, the id of a token, or else a string."""
    with contextlib.suppress(ValueError):
        if value.isdigit() or value.startswith("["):
            return json.loads(value)
    return value


def _split(options: dict[str, Any]) -> tuple[Llama, dict[str, Any]]:
    """The model and the checked decoding options that a command's options ask for."""
    decoding = {name: options.pop(name) for name in NAMES if name in options}
    checked = DecodingOptions(**decoding)  # before the weights are read
    llama = load(**options)
    checked.check_vocabulary(llama.model.args.vocab_size)
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


@_text_command
@_takes(DecodingOptions, *STREAMED)
@_takes(load)
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


@_text_command
@_takes(DecodingOptions, *STREAMED)
@_takes(load)
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


@_text_command
@_takes(load)
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


@_text_command
@_takes(DecodingOptions, *OPTIONS)
@_takes(load, *(name for name in inspect.signature(load).parameters if name != "max_batch_size"))
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


@_text_command
@_takes(DecodingOptions, *SAMPLED)
@_takes(load, *(name for name in inspect.signature(load).parameters if name != "max_batch_size"))
def sample(
    source: str,
    target: str,
    *,
    scorer: str,
    max_batch_size: int = 16,
    n: int = 16,
    keep: int | None = None,
    threshold: float | None = None,
    max_samples: int | None = None,
    judge_template: str | None = None,
    judge_answer: str = "Yes",
    plot: str | None = None,
    force: bool = False,
    retry: bool = False,
    **options: Any,
) -> None:
    """Draws n answers to each line of a file, scores them, keeps the best. Started again, it does what is missing.

    Args:
        source: lines as those of `llama batch`; a line's metadata is the scorer's.
        target: the answers with their scores: JSON lines, CSV or Parquet.
        scorer: logprob, mean_logprob, reward:DIR, judge, judge:DIR or module:function.
        max_batch_size: answers at a time, of each replica.
        n: answers to each line; with a threshold, how many are drawn at a time. (Under torchrun, which takes --n for
            an option of its own, write -n.)
        keep: writes the best so many; all when left out.
        threshold: draws until `keep` answers (one, when that is left out) have this score,
        max_samples: or so many have been drawn.
        judge_template: a file with what a judge is asked, {prompt} and {answer} in it.
        judge_answer: what a judge says of a good answer; its log-probability is the score.
        plot: a PNG to write, with a histogram of the scores and the best-of-n curve.
        force: starts over, whatever the target holds.
        retry: tries lines again that have failed, or have an answer without a score.
    """
    plan = Plan(n, keep, threshold, max_samples)
    check_option(DecodingOptions(**{name: options[name] for name in NAMES if name in options}), plan)
    name = _check_scoring(source, target, None, scorer, judge_template, judge_answer, plot)
    options["max_batch_size"] = max_batch_size
    settings = dict(options)
    llama, decoding = _split(options)
    with contextlib.redirect_stdout(sys.stderr):
        asked = load_scorer(scorer, llama, name.get("template"), judge_answer, **_scorers_own(settings, llama))
    parallel.silence_other_ranks()
    how = {"force": force, "retry": retry, "progress": True}
    _summarize(functools.partial(sample_files, llama, source, target, asked, plan, name, **how, **decoding), plot)


@_text_command
@_takes(load, *(name for name in inspect.signature(load).parameters if name != "max_batch_size"))
def rescore(
    source: str,
    target: str,
    *,
    scorer: str,
    max_batch_size: int = 16,
    prompts: str | None = None,
    keep: int | None = None,
    judge_template: str | None = None,
    judge_answer: str = "Yes",
    plot: str | None = None,
    force: bool = False,
    retry: bool = False,
    **options: Any,
) -> None:
    """Scores the answers that a file has: what `llama sample` or `llama batch` wrote. Goes on like these.

    Args:
        source: lines with answers, or with the text of one.
        target: the same answers with their new scores: JSON lines, CSV or Parquet.
        scorer: logprob, mean_logprob, reward:DIR, judge, judge:DIR or module:function.
        max_batch_size: answers at a time, of each replica.
        prompts: the lines that were answered, where the source does not repeat them (as that of `llama batch`).
        keep: writes the best so many; all when left out.
        judge_template: a file with what a judge is asked, {prompt} and {answer} in it.
        judge_answer: what a judge says of a good answer; its log-probability is the score.
        plot: a PNG to write, with a histogram of the scores and the best-of-n curve.
        force: starts over, whatever the target holds.
        retry: tries lines again that have failed, or have an answer without a score.
    """
    plan = Plan(sys.maxsize, keep)
    name = _check_scoring(source, target, prompts, scorer, judge_template, judge_answer, plot)
    options["max_batch_size"] = max_batch_size
    llama = None
    if scorer in ("logprob", "mean_logprob", "judge"):  # the others have no use for the model
        llama = load(**options)
        name["model"] = identity(llama)
    with contextlib.redirect_stdout(sys.stderr):
        parallel.initialize(options.get("model_parallel_size"), parallel.pick_device(options.get("device")))
        asked = load_scorer(scorer, llama, name.get("template"), judge_answer, **_scorers_own(options, llama))
    parallel.silence_other_ranks()
    how = {"prompts": prompts, "force": force, "retry": retry, "progress": True}
    _summarize(functools.partial(rescore_files, source, target, asked, plan, name, **how), plot)


def _check_files(source: str, target: str, *others: str | None) -> None:
    """Raises OSError, ValueError or ImportError where rows cannot be read, or answers to them not be written."""
    inputs = [source, *(path for path in others if path is not None)]
    check_target(target, *inputs)
    for path in inputs:
        next(iter(Rows(path)), None)  # a first one shows what there is to say against the file


def _check_scoring(
    source: str,
    target: str,
    prompts: str | None,
    scorer: str,
    template: str | None,
    verdict: str,
    plot: str | None,
) -> dict[str, Any]:
    """What can be found out of a scoring command before any weights are read; what its scorer is known by."""
    if int(os.environ.get("RANK", 0)) == 0:
        _check_files(source, target, prompts)
        if plot is not None:
            _check_writable(Path(plot))
    if plot is not None:
        require_matplotlib()
    text = JUDGE_TEMPLATE if template is None else _read_judge_template(template)
    check_spec(scorer, text)
    return {"scorer": scorer, **({"template": text, "answer": verdict} if is_judge(scorer) else {})}


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


def _scorers_own(options: dict[str, Any], llama: Llama | None) -> dict[str, Any]:
    """How a scorer's own model is loaded: as the command's, on as many processes."""
    own = {name: options[name] for name in ("max_seq_len", "max_batch_size", "device", "dtype") if name in options}
    if llama is not None:
        own |= {"tokenizer": llama.tokenizer, "model_parallel_size": llama.model.tok_embeddings.world_size}
    else:
        own["model_parallel_size"] = options.get("model_parallel_size")
        if path := options.get("tokenizer_path") or options.get("ckpt_dir"):
            own["tokenizer"] = Tokenizer(find_tokenizer(Path(path)) if Path(path).is_dir() else path)
    return own


def _summarize(run: Callable[[], Any], plot: str | None) -> None:
    """Runs a scoring command to its summary, which is shown, and drawn if it is to be."""
    try:
        summary = run()
    except KeyboardInterrupt:
        print("stopped: the output has what was done, and the same command goes on from there", file=sys.stderr)
        raise
    if summary is not None:
        print(summary.text())
        if summary.first_error is not None:
            hint = "(with --retry, the lines in which an answer has no score are done again, and give the same answers)"
            print(hint, file=sys.stderr)
        if plot is not None:
            summary.plot(plot)
        if not summary.scores and (summary.groups or summary.n_failed):
            sys.exit(1)


MISTAKES = (OSError, ValueError, ImportError, MemoryError, GenerationError, parallel.RankFailed)
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
}


def main(argv: list[str] | None = None) -> None:
    """Runs the command of argv, sys.argv's when None, as `run` does."""
    run(COMMANDS, argv)


def run(component: Callable | dict[str, Callable], argv: list[str] | None = None, name: str = "llama") -> None:
    """Calls a function, or one of several by its name, with the arguments of a command line, sys.argv's when None.

    As fire.Fire, but the arguments are checked before anything runs, and a user's mistake is one line on stderr and
    exit code 2.
    """
    try:
        for call in _read(component, sys.argv[1:] if argv is None else argv, name):
            call()
    except BrokenPipeError:  # whoever was reading has seen enough
        sys.stderr.close()
        sys.exit(0)
    except MISTAKES as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _read(component: Callable | dict[str, Callable], argv: list[str], name: str) -> list[Callable[[], None]]:
    """The call that the arguments ask for; none where they ask for help, which is shown.

    By itself fire runs a command first and says afterwards which of its arguments there are not.
    """
    calls: list[Callable[[], None]] = []

    def later(command: Callable) -> Callable:
        @functools.wraps(command)
        def note(*args: Any, **kwargs: Any) -> None:
            calls.append(functools.partial(command, *args, **kwargs))

        return note

    # Fire's separator of chained calls is "-", which here is standard input.
    flags = [] if "--" in argv else ["--"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if isinstance(component, dict):
                noted = {word: later(command) for word, command in component.items()}
            else:
                noted = later(component)
            fire.Fire(noted, [*argv, *flags, "--separator", "\0"], name=name)
    except fire.core.FireExit as exit:
        if exit.code:
            problem = exit.trace.elements[-1].ErrorAsStr()
            command = f"{name} {argv[0]}" if isinstance(component, dict) and argv and argv[0] in component else name
            raise ValueError(f"{problem} ({command} --help lists what there is)") from None
        # Without its note on how it was called, and without its own marks, which it takes for subcommands.
        print(re.sub(r"^INFO: .*\n+| GROUP \|| +Type: Optional\[\]\n|\n\nGROUPS\n(.*\n)*", "", said.getvalue()))
        return []
    return calls
