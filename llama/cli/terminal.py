"""The terminal of a conversation: typed messages, and Ctrl-C. Knows nothing of models.

Under torchrun every rank has the same conversation. Rank 0 reads the keyboard. It sends the others each message, and
after each piece of an answer whether Ctrl-C was pressed, so that all ranks run the same steps.
"""

import atexit
import os
import select
import signal
import sys
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama import GenerationError
from llama.cli.chat import Conversation

try:
    import readline  # gives `input` editing and history
except ImportError:  # Windows
    readline = None

CTRL_C = "\x03"
# A model may not send control characters to a terminal: they do more than show text.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
HISTORY_SIZE = 1000  # lines


class CtrlC(Exception):
    """Ctrl-C was pressed; raised on each rank."""


class Keyboard:
    """Messages from rank 0's standard input, on each rank.

    In a plain `python`, Ctrl-C is a KeyboardInterrupt as always. torchrun would end the run at that signal, so under
    torchrun the terminal sends none: rank 0 reads Ctrl-C as a character and tells all ranks.
    """

    def __init__(self):
        self.reads = dist.get_rank() == 0
        self.tty = self.reads and sys.stdin.isatty() and sys.stdout.isatty()
        self.launched = "RANK" in os.environ
        # gloo waits until a person has typed, however long that takes.
        shared = dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if shared else None
        if self.launched and self.tty:
            _read_ctrl_c(sys.stdin.fileno())

    def read(self) -> str | None:
        """The next message, None at the end of the input. Raises CtrlC, KeyboardInterrupt."""
        message = self._share(self._read_message() if self.reads else None)
        if message is not None and CTRL_C in message:
            raise CtrlC
        return message

    def read_all(self) -> str:
        """The rest of the input, without the newline at its end."""
        return self._share(sys.stdin.read().removesuffix("\n") if self.reads else "")

    def check(self) -> None:
        """Raises CtrlC on every rank if it was pressed since the last call."""
        pressed = False
        if self.launched and self.tty:
            while select.select([sys.stdin], [], [], 0)[0] and (typed := os.read(sys.stdin.fileno(), 1024)):
                pressed = pressed or CTRL_C.encode() in typed
        if self._share(pressed):
            raise CtrlC

    def _read_message(self) -> str | None:
        """A line; in a terminal, also the next line after each line that ends in a backslash."""
        lines = []
        with suppress(EOFError):
            lines.append(input("> " if self.tty else ""))
            while self.tty and lines[-1].endswith("\\") and CTRL_C not in lines[-1]:
                lines[-1] = lines[-1][:-1]
                lines.append(input("... "))
        return "\n".join(lines) if lines else None

    def _share(self, value: Any) -> Any:
        values = [value]
        if self._group is not None:
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]


def set_up_editing() -> None:
    """Makes pasted lines one message, and lets the arrow keys bring back lines of earlier chats; saves them at exit."""
    if readline is None:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_history_length(HISTORY_SIZE)
    with suppress(OSError, RuntimeError):  # without a home, or a place to write, the history has only this chat
        folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "llama"
        folder.mkdir(parents=True, exist_ok=True)
        (path := folder / "chat_history").touch(mode=0o600)
        readline.read_history_file(path)
        atexit.register(_append_history, path, readline.get_current_history_length())


def _append_history(path: Path, n_before: int) -> None:
    with suppress(OSError):
        readline.append_history_file(readline.get_current_history_length() - n_before, path)


def _read_ctrl_c(terminal: int) -> None:
    """Until this process exits, a terminal sends Ctrl-C as a character, and each character when it is typed."""
    import termios  # not on Windows

    before, now = termios.tcgetattr(terminal), termios.tcgetattr(terminal)
    atexit.register(termios.tcsetattr, terminal, termios.TCSADRAIN, before)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # torchrun ends a rank with SIGTERM; now atexit runs
    now[3] &= ~termios.ICANON
    now[6][termios.VMIN], now[6][termios.VTIME] = 1, 0
    now[6][termios.VINTR] = os.fpathconf(terminal, "PC_VDISABLE")  # not ISIG, which readline sets again
    termios.tcsetattr(terminal, termios.TCSADRAIN, now)
    if readline is not None:  # Ctrl-C clears the line, and enters a line of only Ctrl-C
        readline.parse_and_bind(r'"\C-c": "\C-a\C-k\C-v\C-c\C-m"')


def show(text: str) -> None:
    """Prints a piece of text at once; on a terminal, without control characters."""
    print(text.translate(CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)


def talk(conversation: Conversation, keyboard: Keyboard) -> None:
    """Reads messages and shows the responses, until the input or the conversation ends."""
    while not conversation.ended:
        at_prompt = True
        try:
            if (message := keyboard.read()) is None:
                return show("\n" if keyboard.tty else "")
            at_prompt = False
            with closing(conversation.respond(message)) as pieces:
                for piece in pieces:
                    show(piece)
                    keyboard.check()
        except (ValueError, GenerationError) as error:
            show(f"({error})\n")
        except (KeyboardInterrupt, CtrlC) as interrupt:
            # A signal from a launcher ends the program, as does one at the prompt without a terminal.
            if isinstance(interrupt, KeyboardInterrupt) and (keyboard.launched or (at_prompt and not keyboard.tty)):
                raise
            show("\n(/quit or Ctrl-D leaves)\n" if at_prompt else "\n(stopped)\n")
