"""The example scripts. (The Python and the commands of the README are in test_guide.py.)"""

import os
import re
import subprocess

import forks
import pytest
from conftest import ROOT, ranks, torchrun

CHAT, TEXT = ROOT / "example_chat_completion.py", ROOT / "example_text_completion.py"
SAMPLING = ROOT / "example_rejection_sampling.py"


def run(script, *args: str) -> subprocess.CompletedProcess:
    return forks.run([script, *args], {**os.environ, "PYTHONPATH": str(ROOT)})


LINE = "\n\n==================================\n\n"


def test_the_chat_example_prints_four_dialogs_and_answers_as_metas_does():
    result = run(CHAT, "--temperature", "0")
    assert result.returncode == 0, result.stderr
    *parts, rest = result.stdout.split(LINE)
    assert len(parts) == 4 and rest == ""
    recipe, tower, haiku, emojis = (part.rpartition("\n> Assistant: ")[2] for part in parts)
    assert "egg yolk" in recipe
    assert "Eiffel Tower" in tower
    assert len(haiku.splitlines()) == 3 and "Paris" in haiku
    assert not re.search(r"\w", emojis) and emojis
    assert parts[0].endswith(f"\nUser: what is the recipe of mayonnaise?\n\n> Assistant: {recipe}")
    roles = [re.findall(r"^(> )?(System|User|Assistant): ", part, re.M) for part in parts]
    assert roles[1] == [("", "User"), ("", "Assistant"), ("", "User"), ("> ", "Assistant")]
    assert roles[3] == [("", "System"), ("", "User"), ("> ", "Assistant")]


@pytest.mark.parametrize(("script", "n_processes", "start"), [(TEXT, 1, ranks), (TEXT, 4, ranks), (CHAT, 2, torchrun)])
def test_the_examples_run_under_torchrun_as_in_a_plain_python(script, n_processes, start):
    plain = run(script, "--temperature", "0", "--max_gen_len", "12")
    assert plain.returncode == 0 and plain.stdout.count("\n> ") == plain.stdout.count(LINE) == 4, plain.stderr
    parallel = start(n_processes, script, "--temperature", "0", "--max_gen_len", "12")
    assert parallel.returncode == 0, parallel.stderr
    assert parallel.stdout.count("\n> ") == 4  # rank 0 alone prints
    if n_processes == 1:
        assert parallel.stdout.splitlines()[1:] == plain.stdout.splitlines()[1:]


@pytest.mark.parametrize("n_processes", [1, 2])
def test_the_rejection_sampling_example_draws_a_rising_curve(n_processes):
    args = ("--n", "8", "--n_prompts", "12")
    result = run(SAMPLING, *args) if n_processes == 1 else ranks(n_processes, SAMPLING, "-n", *args[1:])
    assert result.returncode == 0, result.stderr
    curve = [float(value) for value in re.findall(r"^ +[1248] \| ([\d.]+) ±", result.stdout, re.M)]
    assert len(curve) == 4 and curve == sorted(curve) and curve[0] < 0.75 < curve[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ckpt_dir", "/nowhere"], "FileNotFoundError: ckpt_dir /nowhere does not exist: expected a directory with "),
        (["--temperature", "-1"], "ValueError: temperature = -1: expected a number of at least 0"),
        (["--max_seq_len", "20"], "ValueError: prompt 0 has 22 tokens: expected at most max_seq_len = 20"),
        (
            ["--max_seq_len", "99999999999"],
            "MemoryError: not enough memory on cpu for this checkpoint with max_seq_len",
        ),
    ],
)
def test_the_last_line_names_a_mistake(args, message):
    result = run(CHAT, *args)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]


def test_an_unknown_flag_is_named():
    result = run(TEXT, "--max_gen_len", "1", "--bogus", "1")
    assert result.returncode == 2
    assert "ERROR: Could not consume arg: --bogus" in result.stderr and "Traceback" not in result.stderr
