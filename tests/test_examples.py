"""What a newcomer runs first: the examples and the README's Python."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_python, torchrun

CHAT, TEXT = ROOT / "example_chat_completion.py", ROOT / "example_text_completion.py"
SAMPLING = ROOT / "example_rejection_sampling.py"


def run(script, *args: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(script), *args], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_chat_example_answers_its_four_dialogs():
    result = run(CHAT, "--temperature", "0")
    assert result.returncode == 0, result.stderr
    answers = [part.rsplit("Assistant: ", 1)[1].strip() for part in result.stdout.split("=" * 34)[:4]]
    recipe, tower, haiku, emojis = answers
    assert "egg yolk" in recipe
    assert "Eiffel Tower" in tower
    assert len(haiku.splitlines()) == 3 and "Paris" in haiku
    assert not re.search(r"\w", emojis) and emojis


@pytest.mark.parametrize("n_processes", [1, 2, 4])
def test_the_text_example_runs_under_torchrun_as_in_a_plain_python(n_processes):
    plain = run(TEXT, "--temperature", "0", "--max_gen_len", "12")
    assert plain.returncode == 0 and plain.stdout.count("\n> ") == 4, plain.stderr
    parallel = torchrun(n_processes, TEXT, "--temperature", "0", "--max_gen_len", "12")
    assert parallel.returncode == 0, parallel.stderr
    assert parallel.stdout.count("\n> ") == 4  # rank 0 alone prints
    if n_processes == 1:
        assert parallel.stdout.splitlines()[1:] == plain.stdout.splitlines()[1:]


@pytest.mark.parametrize("n_processes", [1, 2])
def test_the_rejection_sampling_example_draws_a_rising_curve(n_processes):
    args = ("--n", "8", "--n_prompts", "12")
    result = run(SAMPLING, *args) if n_processes == 1 else torchrun(n_processes, SAMPLING, "-n", *args[1:])
    assert result.returncode == 0, result.stderr
    curve = [float(value) for value in re.findall(r"^ +[1248] \| ([\d.]+) ±", result.stdout, re.M)]
    assert len(curve) == 4 and curve == sorted(curve) and curve[0] < 0.75 < curve[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ckpt_dir", "/nowhere"], "ckpt_dir /nowhere does not exist: expected a directory with params.json"),
        (["--temperature", "-1"], "temperature = -1: expected a finite number of at least 0"),
        (["--bogus", "1"], "Could not consume arg: --bogus (example_chat_completion.py --help lists what there is)"),
        (["--max_seq_len", "20"], "expected at most max_seq_len = 20"),
    ],
)
def test_a_mistake_is_one_line(args, message):
    result = run(CHAT, *args)
    assert result.returncode == 2
    assert result.stderr.startswith("example_chat_completion.py: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_context_that_no_memory_holds_is_refused_with_what_to_do():
    result = run(CHAT, "--max_seq_len", "99999999999")
    assert result.returncode == 2
    assert "not enough memory on cpu for this checkpoint with max_seq_len = 99999999999" in result.stderr


def test_the_readmes_python_prints_what_it_says():
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    result = run_python(f"import os; os.chdir({str(ROOT)!r})\n{block}")
    assert result.returncode == 0, result.stderr
    assert "So 21 + 34 = 55." in result.stdout and "8 ['generation', 'tokens', 'logprobs']" in result.stdout
