"""What is installed, under which name and version, and with which Python."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_python

import llama

SETUP = (ROOT / "setup.py").read_text()
FOLDERS = ("llama", "tests", "docs", "demo", "benchmarks", ".ci")
TEXTS = [path for path in ROOT.iterdir() if path.suffix in (".md", ".py", ".sh", ".txt") or path.name == "Makefile"]
TEXTS += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py", ".ipynb")]


def test_nothing_tells_a_user_to_install_the_other_package_named_llama():
    assert len(TEXTS) > 100
    for path in set(TEXTS) - {Path(__file__)}:
        for command in re.findall(r"pip(?:3)? (?:install|download)[^`\n]*", path.read_text(encoding="utf-8")):
            assert not re.search(r"""[\s'"]llama(?![-.\w])""", command), f"{path}: {command}"


def test_the_distributions_name_is_its_own_and_the_version_stands_once():
    name, version = subprocess.run(
        [sys.executable, "setup.py", "-q", "--name", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert name == re.search(r'name="(.*)"', SETUP)[1] == "llama-textbook"
    assert version == llama.__version__


def test_the_changelog_begins_with_this_version():
    assert re.search(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == llama.__version__


@pytest.mark.parametrize("code", ["import llama", "import runpy; runpy.run_path('setup.py')"])
def test_an_old_python_gets_a_sentence(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = run_python(f"import sys; sys.version_info = (3, 9, 18)\n{code}", is_forked=False)
    expected = "llama needs Python 3.10 or newer, and this is 3.9.18: use another one, such as python3.12"
    assert result.returncode == 1 and result.stderr.splitlines()[-1].endswith(expected)


def test_every_tool_that_the_makefile_runs_is_in_an_extra_and_in_the_constraints():
    constraints = {re.split("[=;]", line)[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    extras = re.findall(r'^ +"([\w-]+)"', SETUP[SETUP.index("extras_require") :], re.M)
    for name in [*extras, *re.findall(r'": \["([\w-]+)"', SETUP)]:
        assert name in constraints | set(re.findall(r'^ +"(\w+)": \[', SETUP, re.M)), name


def test_files_that_a_clone_does_not_have_may_lie_anywhere(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setenv("LLAMA_TEST_FILES", str(tmp_path))
    shared = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["shared"]
    assert shared("checkpoints") == tmp_path / "checkpoints"
    with pytest.raises(pytest.skip.Exception, match=r"CONTRIBUTING\.md says what belongs there, and LLAMA_TEST_FILES"):
        shared("tokenizers")
    for name in ("tokenizers/llama3/tokenizer.model", "tokenizers/llama2/tokenizer.model", "checkpoints/stories260K/"):
        assert f"`{name}`" in (ROOT / "CONTRIBUTING.md").read_text()


def test_issue_templates_ask_for_the_version():
    asked = {path.stem: path.read_text() for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md")}
    assert asked.keys() >= {"idea", "message", "wrong-answer"}
    assert all(re.match(r"---\nname: .+\nabout: .+\n---\n", text) for text in asked.values())
    assert "python -m llama --version" in asked["wrong-answer"]


def test_make_docs_writes_a_reference_without_a_warning(tmp_path):
    pytest.importorskip("pdoc", reason="pip install pdoc to make the reference")
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    options = re.search(r"^\t\$\(VENV\)/bin/python (.* -m pdoc .*) -o docs/reference ", makefile, re.M)[1]
    modules = re.search(r"^REFERENCE := (.*)", makefile, re.M)[1].split()
    command = [sys.executable, *options.split(), "-o", str(tmp_path), *modules]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    for module in modules:
        assert (tmp_path / f"{module.replace('.', '/')}.html").exists(), module
    assert "A piece is new text only" in (tmp_path / "llama.html").read_text()
    assert "max_new_tokens" in (tmp_path / "llama" / "keywords.html").read_text()
