"""The commands: `python -m llama COMMAND`. Arguments become calls, results become text; nothing else happens here."""

import contextlib
import functools
import inspect
import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import torch.distributed as dist
from fire.decorators import SetParseFns

from llama import GenerationError, Llama, parallel
from llama.chat import Conversation, Keyboard, show, talk
from llama.options import DecodingOptions
from llama.scoring import least_certain

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


def load(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int = 1,
    device: str | None = None,
    dtype: str | None = None,
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
            ckpt_dir or DEMO, tokenizer_path, max_seq_len, max_batch_size, device=device, dtype=dtype, draft=draft
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
    texts = ("text", "system", "ckpt_dir", "tokenizer_path", "device", "dtype", "draft")
    return SetParseFns(str, stop=_stops, **dict.fromkeys(texts, str))(command)


def _stops(value: str) -> Any:
    """A list in JSON, the id of a token, or else a string."""
    with contextlib.suppress(ValueError):
        if value.isdigit() or value.startswith("["):
            return json.loads(value)
    return value


def _split(options: dict[str, Any]) -> tuple[Llama, dict[str, Any]]:
    """The model and the checked decoding options that a command's options ask for."""
    decoding = {name: options.pop(name) for name in STREAMED if name in options}
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


MISTAKES = (OSError, ValueError, ImportError, MemoryError, GenerationError, parallel.RankFailed)
COMMANDS = {"chat": chat, "complete": complete, "score": score, "info": info, "verify": verify, "convert": convert}


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
