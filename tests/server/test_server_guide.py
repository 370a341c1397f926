"""The commands of docs/server.md run, and show what it says."""

import io
import re
import subprocess
from contextlib import redirect_stdout

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("openai")
pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")

from conftest import ROOT
from running import Server

TEXT = (ROOT / "docs" / "server.md").read_text()


def test_the_commands_of_the_servers_guide_show_what_it_says():
    (session,) = re.findall(r"```console\n(.*?)```", TEXT, re.S)
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    with Server("--no_web", is_forked=False) as server:
        here = lambda text: text.replace("http://127.0.0.1:8000", server.url)  # noqa: E731
        steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", session, re.M)
        assert len(steps) == 4
        for command, shown in steps:
            run = subprocess.run(["bash", "-c", here(command)], capture_output=True, text=True, timeout=120)
            for line in shown.splitlines():
                assert line in run.stdout, run.stdout
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(here(program), "docs/server.md", "exec"), {})
        assert printed.getvalue().startswith("Ones: 1 + 4 = 5. Tens: 2 + 3 = 5. So 21 + 34 = 55.")
        assert re.search(r'\{"sum": \d+\}\n$', printed.getvalue())
        server.process.terminate()
        assert server.process.wait(60) == 0
