"""The commands and the Python of README.md and docs/guide.md run, and print what the pages say, on stderr too."""

import contextlib
import functools
import io
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import DEMO, ROOT

from llama.cli import commands as cli

GUIDE, README = ROOT / "docs" / "guide.md", ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def sessions() -> list[tuple[str, str]]:
    """The commands of the guide in order, each with the output that it shows."""
    blocks = re.findall(r"^    \$ .*\n(?:(?:    .*)?\n)*", GUIDE.read_text(), re.M)
    text = "".join(line[4:] + "\n" for block in blocks for line in block.rstrip().splitlines())
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.M)


def without_times(text: str) -> str:
    """What a terminal keeps on the screen, without the times, which the guide leaves out too."""
    kept = []
    for line in text.split("\n"):
        is_rewritten, last = "\r" in line, line.rpartition("\r")[2].rstrip()
        if not (is_rewritten and not last) and not re.match(r"Loaded in |.*\d+%\|.*\|", last):
            kept.append(re.sub(r"; [\d,]+ tokens? in .* tokens/s$", "", last))
    return "\n".join(kept).strip("\n")


def printed(call) -> str:
    """Both streams of a call, as a terminal shows them."""
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        call()
    return without_times(screen.getvalue())


@pytest.mark.parametrize(("page", "n_blocks"), [(README, 1), (GUIDE, 2)], ids=["README", "guide"])
def test_the_python_of_the_pages_prints_what_they_say(page, n_blocks, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S) if '"demo/' in block]
    assert len(blocks) == n_blocks
    for block in blocks:
        shown = printed(functools.partial(exec, block, {"__name__": "page"})).splitlines()
        assert len(shown) > 2 and [f"# {line}" for line in shown] == re.findall(r"^# (?!Transformers: ).*", block, re.M)


def run(command: str) -> None:
    if not command.startswith("python -m llama "):
        program, target = command.removeprefix("python ").split(" > ")
        with open(target, "w") as file:
            subprocess.run([sys.executable, program], stdout=file, check=True)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        try:
            needs_device = not re.match(r"python -m llama (info|verify|convert|quantize) ", command)
            device = ["--device", "cpu"] if needs_device else []
            cli.main([*shlex.split(command.removeprefix("python -m llama ")), *device])
        except SystemExit as end:
            assert end.code == 2 and command.endswith(MISTAKEN)
        finally:
            sys.modules.pop("my_scorers", None)  # which other tests have of their own


MISTAKEN = ("--temperature 0.9",)  # how the commands end that the guide shows for their message


@pytest.mark.skipif(not DEMO.is_dir(), reason="only a clone has the embedded checkpoint")
def test_the_commands_of_the_guide_print_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    n_shown = 0
    for command, shown in sessions():
        if command.startswith("cat ") and not (path := tmp_path / command.removeprefix("cat ")).exists():
            path.write_text(shown)
        elif command.startswith("cat "):
            assert path.read_text() == shown
            n_shown += 1
        else:
            said = printed(functools.partial(run, command)), shown.strip("\n")
            # A model trained here has the machine's last digits; how often a draft is asked is a matter of time.
            if "reward:steps" in command or "--draft" in command:
                said = [re.sub(r" *-?\d+\.\d+|\d+ of \d+ proposals", " NUMBER", text) for text in said]
            assert said[0] == said[1], command
    assert n_shown == 4
    (scored,) = json.loads((tmp_path / "rewards.json").read_text())
    assert scored["best"].startswith("Ones: ") and scored["scores"][0] < 0 < scored["scores"][1]


@pytest.mark.skipif(not DEMO.is_dir(), reason="only a clone has the embedded checkpoint")
def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IN.jsonl").write_text('{"prompt": "One day", "max_gen_len": 5}\n')
    for name in ("SRC", "CKPT_DIR"):
        (tmp_path / name).symlink_to(DEMO)
    ours = ("complete", "score", "info", "verify", "convert", "quantize", "batch")  # of the others each has its page
    commands = re.findall(r"^    (python -m llama (\w+) .*?)(?: {2,}#.*)?$", README.read_text(), re.M)
    said = {}
    for command, name in commands:
        if name in ours and name not in said:
            said[name] = printed(functools.partial(run, command.replace("SRC DST", f"SRC {name}")))
    assert set(ours) == said.keys()
    assert said["complete"].startswith(", ") and "least certain:" in said["score"]
    assert "looks like" in said["info"] and "no problems" in said["verify"]
    assert (said["convert"], said["quantize"]) == ("wrote convert", "wrote quantize")
    assert said["batch"] == "1 of 1 line done, 0 of them failed"


def test_every_command_of_the_pages_is_understood(monkeypatch):
    """The command's own parser reads each line. Nothing runs."""
    called = []

    def unrun(command):
        return functools.wraps(command)(lambda *args, **kwargs: called.append(command.__name__))

    monkeypatch.setattr(cli, "COMMANDS", tuple(map(unrun, cli.COMMANDS)))
    lines = [line for page in PAGES for line in re.findall(r"^ {4}.*?-m llama (\w[^…\n]*)$", page.read_text(), re.M)]
    for line in lines:
        cli.main(shlex.split(line, comments=True))
    assert len(called) == len(lines) > 30 and set(called) == {command.__name__ for command in cli.COMMANDS}
