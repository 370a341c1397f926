"""`llama sample` and `llama rescore`: real processes, real kills, and the same lines whatever happened on the way."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO, ROOT
from test_reward_model import write_reward_model

SCORERS = """
import os, re
def total(row, answers):
    found = [re.findall(r"\\d+", a["text"]) for a in answers]
    return [float(bool(f) and int(f[-1]) == row["metadata"]["sum"]) for f in found]
def picky(row, answers):
    if any("5" in a["text"] for a in answers):
        raise KeyError("five")
    return [1.0] * len(answers)
"""
SAMPLE = ["sample", "in.jsonl", "out.jsonl", "--scorer", "scorers:total", "--dtype", "float32", "--max_batch_size", "8"]
SAMPLE += ["--temperature", "1.8", "--top_p", "1.0", "--max_gen_len", "60"]


def command(folder: Path, *args: str, n_processes: int = 0) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = [sys.executable, "-m"]
    if n_processes:
        start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}", "-m"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*start, "llama", *args], cwd=folder, env=env, **pipes)


def run(folder: Path, *args: str, n_processes: int = 0) -> subprocess.CompletedProcess:
    process = command(folder, *args, n_processes=n_processes)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def read(path: Path) -> dict:
    """The records by id, without the last digits of the log-probabilities, which depend on what shares a batch."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        for answer in record.get("answers", ()):
            if "logprob" in answer:
                answer["logprob"] = pytest.approx(answer["logprob"], abs=1e-3)
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


@pytest.fixture
def folder(tmp_path):
    """A data set of sums with a broken line in it, and scorers."""
    lines = []
    for a in range(12, 36):
        dialog = [{"role": "user", "content": f"What is {a} + 34?"}]
        lines.append(json.dumps({"id": f"sum{a}", "messages": dialog, "metadata": {"sum": a + 34}}))
    lines[5] = '{"id": "broken", "prompt": "x", "temprature": 1}'
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "scorers.py").write_text(SCORERS)
    return tmp_path


def test_killed_and_started_again_on_replicas_too_it_gives_the_lines_of_an_undisturbed_run(folder):
    undisturbed = run(folder, *SAMPLE, "-n", "8")
    assert undisturbed.returncode == 0, undisturbed.stderr
    expected, summary = read(folder / "out.jsonl"), undisturbed.stdout
    assert len(expected) == 24 and "23 prompts, 184 answers, 0 without a score; 1 lines failed" in summary
    assert "'temprature' is not known: expected one of prompt, messages, tokens" in expected["broken"]["error"]
    record = expected["sum12"]
    assert record["metadata"] == {"sum": 46} and record["messages"][0]["content"] == "What is 12 + 34?"
    assert record["best"] == record["answers"][record["scores"].index(1.0)]["text"]

    args = [word.replace("out.jsonl", "killed.jsonl") for word in [*SAMPLE, "-n", "8"]]
    for n_processes in (0, 2):
        process = command(folder, *args, *["--model_parallel_size", "1"][:n_processes], n_processes=n_processes)
        out = folder / "killed.jsonl"
        before = out.read_bytes().count(b"\n") if out.exists() else 0
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < before + 3):
            pass
        assert process.poll() is None, process.communicate()[1]
        if n_processes:  # the writer: torchrun then ends the others
            writer = json.loads((folder / "killed.jsonl.run.json").read_text())["writer"]["pid"]
            os.kill(writer, signal.SIGKILL)
        else:
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert 0 < out.read_bytes().count(b"\n") < 24
    with (folder / "killed.jsonl").open("a") as file:
        file.write('{"id": "sum30", "li')  # a line cut off by a power failure
    last = run(folder, *args)
    assert last.returncode == 0, last.stderr
    assert read(folder / "killed.jsonl") == expected
    assert last.stdout == summary  # of all lines, those of the killed runs included


def test_an_output_of_other_parameters_is_refused_and_says_what_differs(folder):
    assert run(folder, *SAMPLE, "--n", "2").returncode == 0
    before = (folder / "out.jsonl").read_bytes()
    for args, message in (
        (["--n", "3"], "plan.n was 2, and is 3"),
        (["--n", "2", "--scorer", "scorers:picky"], 'scorer.scorer was "scorers:total", and is "scorers:picky"'),
        (["--n", "2", "--seed", "7"], "seed was 1, and is 7"),
    ):
        refused = run(folder, *SAMPLE, *args)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
        assert (folder / "out.jsonl").read_bytes() == before
    again = run(folder, *SAMPLE, "--n", "2")
    assert again.returncode == 0 and (folder / "out.jsonl").read_bytes() == before


def test_answers_that_are_in_a_file_are_scored_with_or_without_their_prompts(folder):
    assert run(folder, *SAMPLE, "--n", "2").returncode == 0
    result = run(folder, "rescore", "out.jsonl", "again.jsonl", "--scorer", "scorers:total")
    assert result.returncode == 0, result.stderr
    drawn, again = read(folder / "out.jsonl"), read(folder / "again.jsonl")
    for name in drawn.keys() - {"broken"}:
        assert [a["text"] for a in again[name]["answers"]] == [a["text"] for a in drawn[name]["answers"]]
        assert again[name]["scores"] == drawn[name]["scores"] and again[name]["best"] == drawn[name]["best"]
    assert "it has no answer: 'temprature' is not known" in again["broken"]["error"]

    assert run(folder, "batch", "in.jsonl", "batch.jsonl", "--max_gen_len", "60").returncode == 0
    args = ["rescore", "batch.jsonl", "scored.csv", "--scorer", "scorers:total", "--prompts", "in.jsonl"]
    result = run(folder, *args)
    assert result.returncode == 0, result.stderr
    scored = read(folder / "scored.csv.jsonl")
    answered = read(folder / "batch.jsonl")
    for name in scored.keys() - {"broken"}:
        right = answered[name]["text"].endswith(f"= {int(name[3:]) + 34}.")
        assert scored[name]["best"] == answered[name]["text"] and scored[name]["scores"] == [float(right)]
    assert (folder / "scored.csv").read_text().startswith("id,line,")


def test_a_reward_model_and_a_judge_score_on_replicas_as_on_one_process(folder):
    (folder / "answers.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"Say {i}", "answers": [{"text": "a" * i}, {"text": "b"}]}) + "\n" for i in range(6)
        )
    )
    write_reward_model(folder / "rm", max_seq_len=256)
    for scorer in ("reward:rm", f"judge:{DEMO}", "logprob"):
        outs = []
        for n_processes in (0, 2):
            out = folder / f"{len(outs)}-{scorer[:5]}.jsonl"
            args = ["rescore", "answers.jsonl", out.name, "--scorer", scorer, "--max_seq_len", "256"]
            args += ["--dtype", "float32", "--model_parallel_size", "1"]
            result = run(folder, *args, n_processes=n_processes)
            assert result.returncode == 0, result.stderr
            outs.append(read(out))
        assert outs[0].keys() == outs[1].keys() == set(range(1, 7))
        for number, record in outs[0].items():
            assert record["scores"] == pytest.approx(outs[1][number]["scores"], abs=1e-4)
            assert len(set(record["scores"])) == 2 or number == 2


def test_an_answer_that_the_scorer_raises_on_is_marked_counted_and_plotted_over(folder):
    pytest.importorskip("matplotlib", reason="pip install matplotlib to plot")
    args = [word.replace("scorers:total", "scorers:picky") for word in SAMPLE]
    result = run(folder, *args, "--n", "4", "--plot", "out.png")
    assert result.returncode == 0, result.stderr
    n = sum(s is None for r in read(folder / "out.jsonl").values() for s in r.get("scores", []))
    assert n > 0 and f"92 answers, {n} without a score (the first: KeyError: 'five')" in result.stdout
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--scorer", "scorers:nothing"], "scorers.py has no such name: expected a function (row, answers)"),
        (["--scorer", "best"], "scorer 'best': expected one of logprob, mean_logprob, reward:DIR, judge"),
        (["--scorer", "reward:nowhere"], "there is no directory nowhere: expected a model's"),
        (["--scorer", f"reward:{DEMO}"], "has Meta's checkpoint of a language model: expected a reward model's"),
        (["--scorer", "reward:rm"], "says vocab_size 512, but the tokenizer has 2304 tokens"),
        (["--temperature", "0"], "temperature = 0 with n = 16"),
        (["--threshold", "0.5"], "threshold = 0.5 without max_samples"),
        (["--keep", "17"], "keep = 17: expected at most the 16 answers"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(folder, args, message):
    if "reward:rm" in args:
        write_reward_model(folder / "rm", tokenizer=False)
        from llama import Tokenizer

        message = message.replace("2304", str(Tokenizer(DEMO / "tokenizer.model").n_words))
    result = run(folder, *SAMPLE, *args)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert re.sub(r"^Loaded .*\n", "", result.stderr).count("\n") == 1 and not (folder / "out.jsonl").exists()
