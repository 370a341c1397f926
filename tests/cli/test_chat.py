"""The conversation by itself, and the commands in real terminals (tmux), pipes and torchruns.

The models have random weights and a tokenizer of bytes; a logit_bias says what they say.
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

import pytest
from conftest import ROOT

from llama import Llama
from llama.cli import commands as cli
from llama.cli.chat import SILENCE, Conversation, show

A, EOT = ord("a"), 256 + 9
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LLAMA = [sys.executable, "-m", "llama"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "llama"]


@pytest.fixture
def small(write_checkpoint) -> Llama:
    return Llama.build(write_checkpoint(), max_seq_len=256, max_batch_size=1, device="cpu")


def says(letter: int, length: int = 5) -> dict:
    """Options with which a model says one token over and over."""
    return {"logit_bias": {letter: 1e9}, "max_gen_len": length}


def respond(conversation: Conversation, line: str) -> str:
    return "".join(conversation.respond(line))


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


# The conversation


def test_each_answer_is_that_to_the_whole_dialog_so_far(small):
    conversation = Conversation(small, "Be brief.", temperature=0, max_gen_len=8)
    dialog = [{"role": "system", "content": "Be brief."}]
    for question in ("Hello", "And then?"):
        dialog.append(user(question))
        expected = small.chat_completion([dialog], temperature=0, max_gen_len=8)[0]["generation"]
        assert respond(conversation, question) == expected["content"] + "\n"
        dialog.append(expected)
    assert conversation.dialog() == dialog


def test_a_second_turn_prefills_only_what_is_new(small):
    conversation = Conversation(small, "x" * 100, **says(A, 20))
    respond(conversation, "Hello")
    before = small._engine.counters.prefilled
    assert respond(conversation, "again") == "a" * 20 + "\n"
    new = "useragainassistant"  # a byte is a token; two for the ends of turns, and two headers of 4 with their \n\n
    assert small._engine.counters.prefilled - before <= len(new) + 2 + 2 * 4 + 1  # and the last of the answer


def test_of_a_stopped_answer_what_was_said_is_kept(small):
    conversation = Conversation(small, **says(A, 100))
    answer = conversation.respond("Hello")
    said = next(answer) + next(answer)
    answer.close()
    assert said in ("aa", "aaa")
    assert conversation.turns == [user("Hello"), assistant(said)]
    assert not small._engine.running
    conversation.options = says(ord("b"))
    assert respond(conversation, "go on") == "bbbbb\n"


def test_an_answer_of_nothing_is_said_politely_and_not_kept(small):
    conversation = Conversation(small, **says(EOT))
    assert respond(conversation, "Hello") == SILENCE
    assert conversation.turns == []
    conversation.options = says(ord("\n"))  # blank
    assert respond(conversation, "Hello").endswith(SILENCE)
    assert conversation.turns == []
    conversation.options = says(A)
    respond(conversation, "Hello")
    assert conversation.turns == [user("Hello"), assistant("aaaaa")]


def test_a_full_context_forgets_the_oldest_turns_and_says_so(small):
    conversation = Conversation(small, "S", **says(A))
    n_forgotten_before = 0
    notes, questions = [], [str(n) * length for n, length in enumerate([30, 40, 30, 30, 3, 5, 7, 60, 2, 4])]
    for n, question in enumerate(questions):
        shown = respond(conversation, question)
        notes.append("full" in shown)
        assert shown.endswith("aaaaa\n")
        assert conversation.dialog()[0] == {"role": "system", "content": "S"}
        kept = [turn["content"] for turn in conversation.turns[::2]]
        assert kept == questions[n + 1 - len(kept) : n + 1]
        # As many as leave room for the answer: one more would not have.
        older = [m for q in questions[n - len(kept) : n] for m in (user(q), assistant("aaaaa"))]
        dialog = [conversation.dialog()[0], *older, user(question)]
        if len(kept) <= n:
            assert len(small.formatter.encode_dialog_prompt(dialog)) + 5 > 256
        assert len(small.formatter.encode_dialog_prompt(conversation.dialog()[:-1])) + 5 <= 256
        assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * len(kept)
        n_forgotten = n + 1 - len(kept) - n_forgotten_before
        oldest = "oldest turn is" if n_forgotten == 1 else f"{n_forgotten} oldest turns are"
        assert (
            (f"(the context of 256 tokens is full: the {oldest} forgotten)" in shown) == notes[-1] == (n_forgotten > 0)
        )
        n_forgotten_before += n_forgotten
    assert not notes[0] and sum(notes) > 2


def test_a_message_too_long_is_refused_with_the_numbers_and_changes_nothing(small):
    conversation = Conversation(small, **says(A))
    respond(conversation, "Hello")
    dialog = conversation.dialog()
    with pytest.raises(ValueError, match=r"a prompt of 3\d\d tokens .* expected at most 255, .* max_seq_len = 256"):
        respond(conversation, "x" * 300)
    with pytest.raises(ValueError, match="surrogate"):
        respond(conversation, "\ud800")
    assert conversation.dialog() == dialog
    assert respond(conversation, "short") == "aaaaa\n"


def test_the_commands(small, tmp_path):
    conversation = Conversation(small, **says(A))
    assert "no system prompt" in respond(conversation, "/system")
    respond(conversation, "Hello")
    assert "new conversation" in respond(conversation, "/system  Speak up. ")
    assert conversation.dialog() == [{"role": "system", "content": "Speak up."}]
    assert respond(conversation, "/system") == "Speak up.\n"
    respond(conversation, "Hallå")
    file = tmp_path / "my dialog.json"
    assert "saved 3 messages" in respond(conversation, f"/save {file}")
    assert json.loads(file.read_text(encoding="utf-8")) == conversation.dialog()
    assert "exists" in respond(conversation, f"/save {file}")
    assert "not saved" in respond(conversation, f"/save {tmp_path / 'none' / 'x'}")
    assert "not saved" in respond(conversation, "/save ~nobody-of-that-name/x")
    assert "which file" in respond(conversation, "/save")
    assert len(conversation.turns) == 2
    assert "new conversation" in respond(conversation, "/reset")
    assert conversation.dialog() == [{"role": "system", "content": "Speak up."}]
    assert "no command /resett" in respond(conversation, "/resett now")
    assert "/save FILE" in respond(conversation, "/help")
    assert respond(conversation, "   ") == ""
    assert respond(conversation, " /quit") == "aaaaa\n"  # a message
    assert not conversation.ended
    assert respond(conversation, "/quit") == ""
    assert conversation.ended


# The terminal


class Terminal:
    """A real one, of tmux, with a server of its own."""

    def __init__(self, command: list[str], folder: Path):
        self.tmux = ["tmux", "-f", "/dev/null", "-L", f"llama-{uuid.uuid4().hex}"]
        # The shell is sent Ctrl-C too, and is not to end of it.
        line = (
            f"trap : INT; cd {shlex.quote(str(folder))}; {shlex.join(map(str, command))}; echo exit code $?; exec cat"
        )
        size = ["-x", "100", "-y", "200"]
        subprocess.run([*self.tmux, "new-session", "-d", *size, "sh", "-c", line], env=ENV, check=True)

    def type(self, *keys: str) -> None:
        subprocess.run([*self.tmux, "send-keys", *keys], check=True)

    def screen(self) -> str:
        command = [*self.tmux, "capture-pane", "-p", "-J"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def wait(self, pattern: str, timeout: float = 60) -> str:
        """The screen, once it matches; from the start to the end where the pattern says so, blank lines aside."""
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
    options = ["--logit_bias", "{97: 1e9}", "--max_gen_len", "5", "--system", "Be, brief"]
    screen = terminal([*LLAMA, "chat", "--ckpt_dir", write_checkpoint(), "--device", "cpu", *options])
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
    options = ["--logit_bias", "{97: 1e9}", "--max_seq_len", "6000", "--device", "cpu"]
    screen = terminal([*launcher, "chat", "--ckpt_dir", write_checkpoint(), *options])
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
    screen.type("C-c")  # again a signal, which ends `cat` and with it the terminal
    deadline = time.monotonic() + 20
    while subprocess.run([*screen.tmux, "list-sessions"], capture_output=True, check=False).returncode == 0:
        assert time.monotonic() < deadline, "Ctrl-C is no signal any more after the program"
        time.sleep(0.05)


def test_a_terminal_gets_no_control_characters_from_a_model(monkeypatch, capsys):
    show("\x1b[2J")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show("a\n\tb\x1b[2J\r\x9b")
    assert capsys.readouterr().out == "\x1b[2J" + "a\n\tb\ufffd[2J\ufffd\ufffd"


# Pipes and processes


def run(command: list[str], stdin: str = "") -> subprocess.CompletedProcess:
    command = list(map(str, command))
    return subprocess.run(command, env=ENV, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_two_processes_hold_the_conversation_of_one(small, write_checkpoint, tmp_path):
    lines = ["Hello", "/system Be brief", "x" * 400, "Who\u00e9?", f"/save {tmp_path}/talk.json", "y" * 100, "z" * 100]
    conversation = Conversation(small, temperature=0, max_gen_len=30)
    expected = ""
    for line in lines:
        try:
            expected += respond(conversation, line)
        except ValueError as error:
            expected += f"({error})\n"
    (tmp_path / "talk.json").unlink()
    options = ["--temperature", 0, "--max_gen_len", 30, "--max_seq_len", 256, "--device", "cpu"]
    result = run([*TORCHRUN, "chat", "--ckpt_dir", tmp_path / "ckpt", *options], "\n".join(lines))
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected
    assert "is forgotten" in expected and "expected at most 255" in expected and "saved 3" in expected


def test_complete_streams_what_text_completion_gives(small, tmp_path, capfd):
    capfd.readouterr()
    expected = small.text_completion(["Once, (upon)"], temperature=0.9, max_gen_len=50, seed=4)[0]["generation"] + "\n"
    options = ["--ckpt_dir", tmp_path / "ckpt", "--max_seq_len", 256, "--device", "cpu", "--max_gen_len", 50]
    options += ["--temperature", 0.9, "--seed", 4]
    cli.main(["complete", "Once, (upon)", *map(str, options)])
    assert capfd.readouterr().out == expected
    result = run([*LLAMA, "complete", "-", *options, "--stop", '["e", 98]'], "Once, (upon)\n")
    stopped = small.text_completion(["Once, (upon)"], temperature=0.9, max_gen_len=50, seed=4, stop=["e", 98])
    assert (result.returncode, result.stdout) == (0, stopped[0]["generation"] + "\n"), result.stderr


def test_score_shows_each_token_once_on_two_processes(small, tmp_path):
    (score,), (perplexity,) = small.score(["Hello"]), small.perplexity(["Hello"])
    result = run([*TORCHRUN, "score", "Hello", "--ckpt_dir", tmp_path / "ckpt", "--device", "cpu"])
    assert result.returncode == 0, result.stderr
    *tokens, summary = result.stdout.partition("least certain:\n")[0].splitlines()
    assert [line.split()[1] for line in tokens] == [repr(letter) for letter in "Hello"]
    assert [float(line.split()[0]) for line in tokens] == pytest.approx(score["logprobs"][1:], abs=1e-3)
    assert summary.startswith("5 tokens, perplexity ")
    assert float(summary.split()[-1]) == pytest.approx(perplexity, rel=1e-3)
    worst = min(range(1, 6), key=lambda i: score["logprobs"][i])
    assert re.search(rf"least certain:\n +-[\d.]+ +token +{worst} ", result.stdout)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("chat --temperature -1", "temperature = -1: expected a finite number of at least 0"),
        ("complete hi --min_p 2", "min_p = 2"),
        ("chat --ckpt_dir /nowhere", "/nowhere"),
        ("chat --tempratur 1", "--tempratur"),
        ("complete", "text"),
        ("complete two words", "words"),
        ("chatt", "chatt"),
        ("chat --ckpt_dir CKPT --max_seq_len none", "max_seq_len = 'none'"),
        ("complete hi --ckpt_dir CKPT --logit_bias {9999:1}", "9999"),
        ("complete too-long --ckpt_dir CKPT --max_seq_len 8", "has 9 tokens: expected at most max_seq_len = 8"),
        ("complete hi --device abacus --ckpt_dir CKPT", "abacus"),
        ("score --ckpt_dir CKPT --text=", "empty"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, expected, write_checkpoint, capfd):
    if "CKPT" in arguments:
        arguments = arguments.replace("CKPT", str(write_checkpoint()))
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments.split())
    assert exit.value.code == 2
    out, err = capfd.readouterr()
    (line,) = (line for line in err.splitlines() if not line.startswith("Loaded"))
    assert line.startswith("llama: ") and expected in line
    assert out == ""


def test_a_mistake_in_a_real_process():
    result = run([*LLAMA, "complete", "x", "--top_p", "0"])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "llama: top_p = 0: expected a number in (0, 1]\n"


def test_without_the_embedded_checkpoint_it_says_what_to_pass(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "DEMO", tmp_path / "demo")
    with pytest.raises(SystemExit):
        cli.main(["chat"])
    assert "pass --ckpt_dir DIR" in capsys.readouterr().err


def test_help_lists_commands_and_the_meaning_of_options(capsys):
    cli.main(["--help"])
    commands = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert re.search(rf"^ +{name}\n +\S.*\S$", commands, re.M)
    cli.main(["chat", "-h"])
    options = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--temperature=TEMPERATURE Default: 0.6 divides the logits before sampling" in options
    assert "every token of the prompt and the answer so far" in options  # its second line
    assert "FIRE_METADATA" not in options
