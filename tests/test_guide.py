"""The commands of docs/guide.md run, and print what it says."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import DEMO, ROOT

from llama.cli import commands as cli

GUIDE = ROOT / "docs" / "guide.md"


def sessions() -> list[tuple[str, str]]:
    """The commands of the guide in their order, each with what it shows."""
    blocks = re.findall(r"^    \$ .*\n(?:(?:    .*)?\n)*", GUIDE.read_text(), re.M)
    text = "".join(line[4:] + "\n" for block in blocks for line in block.rstrip().splitlines())
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.M)


def test_the_python_of_the_guide_prints_what_it_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S) if '"demo/' in block]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {"__name__": "guide"})
        shown = capsys.readouterr().out.splitlines()[1:]  # after the line on loading
        assert len(shown) > 2 and [f"# {line}" for line in shown] == re.findall(r"^# [-\[{O].*", block, re.M)


def run(command: str) -> None:
    if not command.startswith("python -m llama "):
        program, target = command.removeprefix("python ").split(" > ")
        with open(target, "w") as file:
            subprocess.run([sys.executable, program], stdout=file, check=True)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        try:
            cli.main([*shlex.split(command.removeprefix("python -m llama ")), "--device", "cpu"])
        finally:
            sys.modules.pop("my_scorers", None)  # which other tests have of their own


@pytest.mark.skipif(not DEMO.is_dir(), reason="only a clone has the embedded checkpoint")
def test_the_commands_of_the_guide_print_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    n_shown = 0
    for command, shown in sessions():
        if command.startswith("cat ") and not (path := tmp_path / command.removeprefix("cat ")).exists():
            path.write_text(shown)
        elif command.startswith("cat "):
            assert path.read_text() == shown
            n_shown += 1
        else:
            if shown.startswith("llama: "):
                with pytest.raises(SystemExit):
                    run(command)
            else:
                run(command)
            said = "".join(capsys.readouterr())
            assert all(line in said for line in shown.splitlines()), said
    assert n_shown == 4
