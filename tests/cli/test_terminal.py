"""The chat in real terminals (tmux), pipes and torchruns.

The models have random weights and a tokenizer of bytes; a logit_bias chooses what they say.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import pytest
from conftest import ROOT, ranks

from llama import Llama
from llama.cli.chat import Conversation
from llama.cli.terminal import HISTORY_SIZE, show

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LLAMA = [sys.executable, "-m", "llama"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "llama"]
SAYS_A = ["--logit_bias", "{97: 1e9}", "--device", "cpu"]


@pytest.fixture
def small(write_checkpoint) -> Llama:
    return Llama.build(write_checkpoint(), max_seq_len=256, max_batch_size=1, device="cpu")


class Terminal:
    """A real one, of tmux, with a server of its own."""

    def __init__(self, command: list[str], folder: Path):
        self.tmux = ["tmux", "-f", "/dev/null", "-L", f"llama-{uuid.uuid4().hex}"]
        env = {**ENV, "XDG_STATE_HOME": str(folder / "state")}
        # The shell gets Ctrl-C too, and must survive it.
        line = (
            f"trap : INT; cd {shlex.quote(str(folder))}; {shlex.join(map(str, command))}; echo exit code $?; exec cat"
        )
        size = ["-x", "100", "-y", "200"]
        subprocess.run([*self.tmux, "new-session", "-d", *size, "sh", "-c", line], env=env, check=True)

    def type(self, *keys: str) -> None:
        subprocess.run([*self.tmux, "send-keys", *keys], check=True)

    def paste(self, text: str) -> None:
        """Pastes like a terminal: in brackets, if the program has asked for them."""
        subprocess.run([*self.tmux, "set-buffer", text], check=True)
        subprocess.run([*self.tmux, "paste-buffer", "-p"], check=True)

    def screen(self) -> str:
        command = [*self.tmux, "capture-pane", "-p", "-J"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def wait(self, pattern: str, timeout: float = 180) -> str:
        """The screen, once it matches, without blank lines; `^` and `$` are its start and end."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, (screen := self.screen()).rstrip(), re.S):
            assert time.monotonic() < deadline, f"never saw {pattern!r} in\n{screen.rstrip()}"
            time.sleep(0.05)
        return screen

    def close(self) -> None:
        subprocess.run([*self.tmux, "kill-server"], check=False)


@pytest.fixture
def terminal(tmp_path) -> Iterator[Callable[..., Terminal]]:
    if shutil.which("tmux") is None:
        pytest.skip("no tmux here")
    opened = []

    def open_terminal(command: list[str]) -> Terminal:
        opened.append(Terminal(command, tmp_path))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_a_chat_in_a_terminal(terminal, write_checkpoint, tmp_path):
    options = ["--max_gen_len", "5", "--system", "Be, brief"]
    screen = terminal([*LLAMA, "chat", "--ckpt_dir", write_checkpoint(), *SAYS_A, *options])
    screen.wait(">$")
    screen.type("Helo", "Left", "l", "Enter")  # readline edits
    screen.wait("> Hello\naaaaa\n>$")
    screen.type("C-c")
    screen.wait("/quit or Ctrl-D leaves.*>$")
    screen.type("Again?", "Enter")
    screen.wait("> Again\\?\naaaaa\n>$")
    screen.type("/save talk.json", "Enter")
    screen.wait("saved 5 messages.*>$")
    screen.type("/system", "Enter")
    screen.wait("Be, brief\n>$")
    screen.type("/reset", "Enter")
    screen.wait("a new conversation.*>$")
    screen.type("x" * 3000, "Enter")
    screen.wait(r"expected at most 2,047.*>$")
    screen.type("Up", "C-u", "C-d")
    screen.wait("exit code 0$")
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert [m["content"] for m in messages] == ["Be, brief", "Hello", "aaaaa", "Again?", "aaaaa"]


@pytest.mark.parametrize("launcher", [LLAMA, TORCHRUN], ids=["python", "torchrun"])
def test_ctrl_c_stops_the_answer_and_not_the_program(launcher, terminal, write_checkpoint, tmp_path):
    screen = terminal([*launcher, "chat", "--ckpt_dir", write_checkpoint(), *SAYS_A, "--max_seq_len", "6000"])
    screen.wait(">$")
    for question in ("one", "two"):
        screen.type(question, "Enter")
        screen.wait(f"> {question}\na{{20}}")
        screen.type("C-c")
        screen.wait(rf"> {question}\na+(\^C)?a*\n\(stopped\)\n>$")
    screen.type("half a li", "C-c")
    screen.wait("leaves.\n>$")
    screen.type("/save talk.json", "Enter")
    screen.wait("saved 4 messages.*>$")
    screen.type("/quit", "Enter")
    screen.wait("exit code 0$")
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert [m["content"][:3] for m in messages] == ["one", "aaa", "two", "aaa"]
    assert len(messages[1]["content"]) < 5900
    # Ctrl-C is a signal again, which ends `cat` and so the terminal; the shell ignores it until `cat` runs.
    deadline = time.monotonic() + 20
    while subprocess.run([*screen.tmux, "send-keys", "C-c"], capture_output=True, check=False).returncode == 0:
        assert time.monotonic() < deadline, "Ctrl-C is no signal any more after the program"
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", [LLAMA, TORCHRUN], ids=["python", "torchrun"])
def test_pasted_lines_and_lines_that_end_in_a_backslash_are_one_message(launcher, terminal, write_checkpoint, tmp_path):
    options = ["--max_gen_len", "5"]
    screen = terminal([*launcher, "chat", "--ckpt_dir", write_checkpoint(), *SAYS_A, *options])
    screen.wait(">$")
    screen.paste("def f():\n    return 1\n\nexplain")
    screen.wait("explain$")  # nothing is sent before Enter
    assert "aaa" not in screen.screen()
    screen.type("Enter")
    screen.wait("explain\naaaaa\n>$")
    screen.type("one\\", "Enter")
    screen.wait(r"\.\.\.$")
    screen.type("two\\", "Enter", "three", "Enter")
    screen.wait("three\naaaaa\n>$")
    screen.type("half\\", "Enter", "a message", "C-c")
    screen.wait("leaves.\n>$")
    screen.type("/save talk.json", "Enter")
    screen.wait("saved 4 messages.*>$")
    screen.type("exit", "Enter")
    screen.wait("exit code 0$")
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert [m["content"] for m in messages[::2]] == ["def f():\n    return 1\n\nexplain", "one\ntwo\nthree"]


def test_the_arrow_keys_bring_back_what_was_typed_in_an_earlier_chat(terminal, write_checkpoint, tmp_path):
    history = tmp_path / "state" / "llama" / "chat_history"
    history.parent.mkdir(parents=True)
    history.write_text("".join(f"old {n}\n" for n in range(HISTORY_SIZE + 500)))
    command = [*LLAMA, "chat", "--ckpt_dir", write_checkpoint(), *SAYS_A, "--max_gen_len", "5"]
    first = terminal(command)
    first.wait(">$")
    first.type("Hello", "Enter")
    first.wait("aaaaa\n>$")
    second = terminal(command)  # beside the first; it has the history from before it began
    second.wait(">$")
    second.type("Up")
    second.wait(f"> old {HISTORY_SIZE + 499}$")
    second.type("C-u", "And", "Enter")
    second.wait("> And *\naaaaa\n>$")  # blanks where the longer line was
    for screen in (first, second):
        screen.type("C-d")
        screen.wait("exit code 0$")
    lines = history.read_text().splitlines()
    assert lines[-3:] == [f"old {HISTORY_SIZE + 499}", "Hello", "And"]
    assert len(lines) == HISTORY_SIZE
    third = terminal(command)
    third.wait(">$")
    third.type("Up", "Up", "Enter")
    third.wait("> Hello *\naaaaa\n>$")


def test_without_a_place_for_its_history_or_without_a_terminal_a_chat_goes_on(terminal, write_checkpoint, tmp_path):
    command = [*LLAMA, "chat", "--ckpt_dir", write_checkpoint(), *SAYS_A, "--max_gen_len", "5"]
    result = run(command, "Hello\n", XDG_STATE_HOME=tmp_path / "other")
    assert (result.returncode, result.stdout) == (0, "aaaaa\n"), result.stderr
    assert not (tmp_path / "other").exists()
    (tmp_path / "state").write_text("a file, not a directory")
    screen = terminal(command)
    screen.wait(">$")
    screen.type("Hello", "Enter")
    screen.wait("> Hello\naaaaa\n>$")
    screen.type("Up", "C-u", "C-d")
    screen.wait("exit code 0$")


def test_a_terminal_gets_no_control_characters_from_a_model(monkeypatch, capsys):
    show("\x1b[2J")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show("a\n\tb\x1b[2J\r\x9b")
    assert capsys.readouterr().out == "\x1b[2J" + "a\n\tb\ufffd[2J\ufffd\ufffd"


# Pipes and processes


def run(command: list[str], stdin: str = "", **variables: object) -> subprocess.CompletedProcess:
    return forks.run(command[1:], ENV | {name: str(value) for name, value in variables.items()}, stdin)


def test_two_processes_hold_the_conversation_of_one(small, write_checkpoint, tmp_path):
    lines = ["Hello", "/system Be brief", "x" * 400, "Who\u00e9?", f"/save {tmp_path}/talk.json", "y" * 100, "z" * 100]
    conversation = Conversation(small, temperature=0, max_gen_len=30)
    expected = ""
    for line in lines:
        try:
            expected += "".join(conversation.respond(line))
        except ValueError as error:
            expected += f"({error})\n"
    (tmp_path / "talk.json").unlink()
    options = ["--temperature", 0, "--max_gen_len", 30, "--max_seq_len", 256, "--device", "cpu"]
    result = ranks(2, "-m", "llama", "chat", "--ckpt_dir", tmp_path / "ckpt", *options, input="\n".join(lines))
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected
    assert "is forgotten" in expected and "expected at most 255" in expected and "saved 3" in expected


def test_in_a_pipe_a_backslash_is_a_character_like_any_other(write_checkpoint, tmp_path):
    command = [*LLAMA, "chat", "--ckpt_dir", write_checkpoint(), *SAYS_A, "--max_gen_len", "5"]
    result = run(command, f"one\\\ntwo\n/save {tmp_path}/talk.json\nquit\nnever read\n")
    assert result.returncode == 0 and result.stdout.startswith("aaaaa\naaaaa\n(saved 4"), result.stderr
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert [m["content"] for m in messages[::2]] == ["one\\", "two"]
