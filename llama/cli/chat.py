"""A conversation with a model, and the terminal it is held in: `llama chat`. Knows nothing of tensors.

Under torchrun each rank holds the same conversation: rank 0 reads the keyboard and passes on every line, and whether
Ctrl-C was pressed after every piece of an answer, so that all ranks run the same steps.
"""

import atexit
import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama import GenerationError, Llama
from llama.tokenizer import Dialog, Message

with suppress(ImportError):
    import readline  # by which `input` gets editing and history, where Python has it

HELP = """\
/reset        forget the conversation; the system prompt stays
/system TEXT  set the system prompt and start a new conversation; without TEXT, show it
/save FILE    write the conversation to a new file, as a JSON list of messages
/help         show this
/quit         leave, as Ctrl-D does
Ctrl-C stops an answer; what was said of it stays in the conversation.
"""
SILENCE = "(I have no answer to that. Please put it another way.)\n"  # such a turn is not kept
CTRL_C = "\x03"
# What a model may not send to a terminal: control characters can do more there than show text.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Conversation:
    """The messages so far, and what each line typed makes of them.

    Args:
        llama: who answers.
        system: the system prompt.
        options: how the answers are decoded, as in `Llama.stream_chat`.
    """

    def __init__(self, llama: Llama, system: str | None = None, **options: Any):
        self.llama, self.system, self.options = llama, system, options
        self.turns: list[Message] = []  # the user's and the assistant's by turns, the assistant's last
        self.ended = False  # by /quit

    def dialog(self, *more: Message) -> Dialog:
        """The system prompt, the turns, and `more`."""
        start: Dialog = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*start, *self.turns, *more]

    def respond(self, line: str) -> Iterator[str]:
        """Yields what to show for a line typed, the answer piece by piece. Closing the iterator stops the answer.

        Of an answer that is stopped, or breaks off, what was said is kept with its question; if that is nothing, both
        are dropped, so that user and assistant always alternate. A ValueError about the message changes nothing.
        """
        command, argument = [*line.strip().split(maxsplit=1), "", ""][:2]
        if not line.startswith("/"):
            if line.strip():
                yield from self._answer({"role": "user", "content": line.strip()})
        elif command == "/reset":
            self.turns = []
            yield "(a new conversation)\n"
        elif command == "/system" and argument:
            self.system, self.turns = argument, []  # the turns so far were under another one
            yield "(the system prompt is set: a new conversation)\n"
        elif command == "/system":
            yield "(no system prompt)\n" if self.system is None else f"{self.system}\n"
        elif command == "/save":
            yield self._save(argument)
        elif command == "/help":
            yield HELP
        elif command == "/quit":
            self.ended = True
        else:
            yield f"(no command {command}: /help lists them; with a space before it, it is a message)\n"

    def _answer(self, message: Message) -> Iterator[str]:
        if n_forgotten := self._make_room(message):
            oldest = "oldest turn is" if n_forgotten == 1 else f"{n_forgotten} oldest turns are"
            yield f"(the context of {self.llama.args.max_seq_len:,} tokens is full: the {oldest} forgotten)\n"
        said = ""
        try:
            with closing(self.llama.stream_chat(self.dialog(message), **self.options)) as pieces:
                for piece in pieces:
                    said += piece
                    yield piece
        finally:
            if said.strip():
                self.turns += [message, {"role": "assistant", "content": said}]
        yield "\n" if said.strip() else SILENCE

    def _make_room(self, message: Message) -> int:
        """Forgets the oldest turns until a quarter of the context, or max_gen_len, is left; returns how many."""
        limit = self.llama.args.max_seq_len
        room = max(1, min(limit // 4, self.options.get("max_gen_len") or limit))
        before = self.turns
        while (n := len(self.llama.formatter.encode_dialog_prompt(self.dialog(message)))) + room > limit and self.turns:
            self.turns = self.turns[2:]
        if n >= limit:
            self.turns = before
            raise ValueError(
                f"the message makes a prompt of {n:,} tokens without any earlier turn: expected at most {limit - 1:,}, "
                f"to leave room for an answer in max_seq_len = {limit:,}"
            )
        return (len(before) - len(self.turns)) // 2

    def _save(self, name: str) -> str:
        if not name:
            return "(/save FILE: which file?)\n"
        if dist.get_rank() > 0:
            return ""
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps(self.dialog(), ensure_ascii=False, indent=2) + "\n")
        except (OSError, ValueError, RuntimeError) as error:  # it exists, has a null byte in it, no such ~user
            return f"(not saved: {error})\n"
        return f"(saved {len(self.dialog())} messages in {name})\n"


class CtrlC(Exception):
    """Ctrl-C was pressed; raised on each rank."""


class Keyboard:
    """Lines from standard input: rank 0's, on each rank.

    In a plain `python` Ctrl-C is a KeyboardInterrupt as always. torchrun takes that signal as the end of the run, so
    there the terminal sends none for Ctrl-C: rank 0 reads it as the character it is, and all ranks are told.
    """

    def __init__(self):
        self.reads = dist.get_rank() == 0
        self.tty = self.reads and sys.stdin.isatty() and sys.stdout.isatty()
        self.launched = "RANK" in os.environ
        # gloo waits for a person as long as it takes, asleep.
        shared = dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if shared else None
        if self.launched and self.tty:
            _read_ctrl_c(sys.stdin.fileno())

    def read(self) -> str | None:
        """The next line, None at the end of the input. Raises CtrlC, KeyboardInterrupt."""
        line = None
        if self.reads:
            with suppress(EOFError):
                line = input("> " if self.tty else "")
        line = self._share(line)
        if line is not None and CTRL_C in line:
            raise CtrlC
        return line

    def read_all(self) -> str:
        """All that is left of the input, without the newline at its end."""
        return self._share(sys.stdin.read().removesuffix("\n") if self.reads else "")

    def check(self) -> None:
        """Raises CtrlC on every rank if it was pressed since the last time."""
        pressed = False
        if self.launched and self.tty:
            while select.select([sys.stdin], [], [], 0)[0] and (typed := os.read(sys.stdin.fileno(), 1024)):
                pressed = pressed or CTRL_C.encode() in typed
        if self._share(pressed):
            raise CtrlC

    def _share(self, value: Any) -> Any:
        values = [value]
        if self._group is not None:
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]


def _read_ctrl_c(terminal: int) -> None:
    """Has a terminal deliver Ctrl-C as a character, and each as it is typed, until this process exits."""
    import termios  # not on Windows

    before, now = termios.tcgetattr(terminal), termios.tcgetattr(terminal)
    atexit.register(termios.tcsetattr, terminal, termios.TCSADRAIN, before)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # torchrun's way to end a rank: through atexit
    now[3] &= ~termios.ICANON
    now[6][termios.VMIN], now[6][termios.VTIME] = 1, 0
    now[6][termios.VINTR] = os.fpathconf(terminal, "PC_VDISABLE")  # not ISIG, which readline sets again
    termios.tcsetattr(terminal, termios.TCSADRAIN, now)
    if "readline" in sys.modules:  # clear the line, and enter one of Ctrl-C alone
        readline.parse_and_bind(r'"\C-c": "\C-a\C-k\C-v\C-c\C-m"')


def show(text: str) -> None:
    """Prints a piece of text at once; on a terminal, without control characters."""
    print(text.translate(CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)


def talk(conversation: Conversation, keyboard: Keyboard) -> None:
    """Reads lines and shows what the conversation makes of them, to the end of the input or /quit."""
    while not conversation.ended:
        at_prompt = True
        try:
            if (line := keyboard.read()) is None:
                return show("\n" if keyboard.tty else "")
            at_prompt = False
            with closing(conversation.respond(line)) as pieces:
                for piece in pieces:
                    show(piece)
                    keyboard.check()
        except (ValueError, GenerationError) as error:
            show(f"({error})\n")
        except (KeyboardInterrupt, CtrlC) as interrupt:
            # From a launcher, or where there is nobody to go on, the signal means the program.
            if isinstance(interrupt, KeyboardInterrupt) and (keyboard.launched or (at_prompt and not keyboard.tty)):
                raise
            show("\n(/quit or Ctrl-D leaves)\n" if at_prompt else "\n(stopped)\n")
