"""A command line to a call: fire reads it, nothing runs before all of it is understood, and a mistake is one line.

Knows nothing of what the commands do.
"""

import contextlib
import functools
import inspect
import io
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import fire
from fire.decorators import SetParseFns

from llama import GenerationError, parallel

MISTAKES = (OSError, ValueError, ImportError, MemoryError, GenerationError, parallel.RankFailed)
# The parameters that are text.
TEXTS = (
    "text",
    "source",
    "target",
    "prompts",
    "template",
    "system",
    "scorer",
    "judge_template",
    "judge_answer",
    "plot",
)
TEXTS += ("ckpt_dir", "tokenizer_path", "device", "dtype", "draft", "quantize")
TEXTS += ("host", "model_name", "api_key", "api_key_file", "cors_origins", "json_schema", "regex", "grammar")


def takes(source: Callable, *names: str) -> Callable[[Callable], Callable]:
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


def text_command(command: Callable) -> Callable:
    """The last touch: no more **options, and what is text is not read as Python, as fire would read 12 or (a, b)."""
    parameters = list(inspect.signature(command).parameters.values())
    command.__signature__ = inspect.Signature(parameters[:-1])
    return SetParseFns(str, stop=_stops, **dict.fromkeys(TEXTS, str))(command)


def _stops(value: str) -> Any:
    """A list in JSON, the id of a token, or else a string."""
    with contextlib.suppress(ValueError):
        if value.isdigit() or value.startswith("["):
            return json.loads(value)
    return value


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
