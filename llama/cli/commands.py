"""The command line: `python -m llama COMMAND`. Finds the command and reports mistakes; other files do the work.

tyro makes flags, types, help and suggestions from the commands' annotations and docstrings.
"""

import os
import re
import sys
from dataclasses import fields

import tyro

from llama import __version__
from llama.cli.arguments import MISTAKES, BatchLoading, is_first_rank
from llama.cli.checkpoints import convert, info, quantize, verify
from llama.cli.datasets import batch, rescore, sample
from llama.cli.finetune import finetune, merge
from llama.cli.serve import serve
from llama.cli.texts import chat, complete, score
from llama.keywords import ANSWERS, PORTED, PORTED_BUILD
from llama.options import NAMES
from llama.parallel import RankFailed

COMMANDS = (chat, complete, score, batch, sample, rescore, finetune, merge, info, verify, convert, quantize, serve)

FLAGS = (*NAMES, *(field.name for field in fields(BatchLoading)))

CONFIG = (
    tyro.conf.OmitArgPrefixes,  # --device, not --loading.device
    tyro.conf.FlagCreatePairsOff,  # --compile, without a --no-compile
    tyro.conf.DisallowNone,  # INT, not {None}|INT
    tyro.conf.SuppressFixed,  # no line for an option that a terminal cannot give, such as a Python function
    tyro.conf.PositionalMetavarFromFieldName,
)


def main(argv: list[str] | None = None) -> None:
    """Runs one command.

    Nothing runs before all arguments are parsed. A user's mistake ends the process with exit code 2 and its reason on
    stderr, Ctrl-C with 130.

    Args:
        argv: the command and its arguments; `sys.argv[1:]` when None.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            _call(argv)
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be handled
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails again
        sys.exit(0)
    except RankFailed as error:
        error.tell()
        sys.exit(2)
    except MISTAKES as error:
        print(f"llama: {_as_typed(str(error), argv)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _call(argv: list[str]) -> None:
    """Parses the arguments and runs the command. Raises SystemExit for help, or if they are not valid."""
    if argv == ["--version"]:
        print(f"llama {__version__}")
        return
    app = tyro.extras.SubcommandApp()
    for command in COMMANDS:
        app.command(command)
    try:
        app.cli(
            prog="llama",
            description=f"Llama inference, version {__version__}. `llama COMMAND --help` explains a command.",
            args=argv or ["--help"],
            use_underscores=True,
            console_outputs=is_first_rank(),  # under torchrun every process parses the same arguments
            config=CONFIG,
        )
    except SystemExit as end:
        if end.code == 2 and is_first_rank():
            _name_ported(argv)
        raise


def _name_ported(argv: list[str]) -> None:
    """Prints on stderr our names for flags of other programs."""
    for word in argv:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        if not word.startswith("--") or (name == "n" and argv[0] == "sample"):
            continue
        ported = "-n here" if argv[0] == "sample" and name in ANSWERS else {**PORTED_BUILD, **PORTED}.get(name)
        if ported is not None and ported.startswith((*FLAGS, "-n ")):
            print(f"llama: --{name} is {'--' * (not ported.startswith('-'))}{ported}", file=sys.stderr)


def _as_typed(message: str, argv: list[str]) -> str:
    """A message of the package with flags instead of keyword arguments."""
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("-")}
    if (first := re.match(r"\w+", message)) and first[0] in given:
        message = f"--{message}"
    message = re.sub(rf"(?<![-\w])({'|'.join(FLAGS)})(?= = )", r"--\1", message)
    return message.replace(", which `Llama.build` sets", "").replace("`Llama.build`", "the command line")
