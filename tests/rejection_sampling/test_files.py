"""`llama sample` and `llama rescore`: real processes, real kills, and the same lines after them."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT
from test_reward_model import write_reward_model

from llama import Llama
from llama.cli import commands as cli
from llama.datasets.batch import run_batch_files
from llama.datasets.runs import line_seed
from llama.rejection_sampling.draw import Plan, rejection_sample
from llama.rejection_sampling.files import rescore_files, sample_files
from llama.rejection_sampling.scorers import Judge, Logprob

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
    """Runs a command to its end: in this process, or in others."""
    if n_processes:
        process = command(folder, *args, n_processes=n_processes)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(args, process.returncode, out, err)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        try:
            cli.main([*args, "--device", "cpu"])
        except SystemExit as end:
            code = end.code
        finally:
            sys.modules.pop("scorers", None)  # the next one may be another
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


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
    assert "line 6: 'temprature' is not a field of a row" in undisturbed.stderr
    expected, summary = read(folder / "out.jsonl"), undisturbed.stdout
    assert len(expected) == 24 and "23 prompts, 184 answers, 0 without a score; 1 line failed" in summary
    assert (
        "'temprature' is not a field of a row: did you mean temperature? expected one of prompt, messages, tokens"
        in expected["broken"]["error"]
    )
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
    assert "it has no answer: 'temprature' is not a field of a row" in again["broken"]["error"]

    assert run(folder, "batch", "in.jsonl", "batch.jsonl", "--max_gen_len", "60").returncode == 0
    args = ["rescore", "batch.jsonl", "scored.csv", "--scorer", "scorers:total", "--prompts", "in.jsonl"]
    refused = run(folder, *[word.replace("scored.csv", "in.jsonl") for word in args], "--force")
    assert refused.returncode == 2 and "in.jsonl is the input: expected another file" in refused.stderr
    result = run(folder, *args)
    assert result.returncode == 0, result.stderr
    scored = read(folder / "scored.csv.jsonl")
    answered = read(folder / "batch.jsonl")
    for name in scored.keys() - {"broken"}:
        right = answered[name]["text"].endswith(f"= {int(name[3:]) + 34}.")
        assert scored[name]["best"] == answered[name]["text"] and scored[name]["scores"] == [float(right)]
    assert (folder / "scored.csv").read_text().startswith('"id","line",')


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
    result = run(folder, *args, "--n", "4", "--plot", "plots/out.png")
    assert result.returncode == 0, result.stderr
    n = sum(s is None for r in read(folder / "out.jsonl").values() for s in r.get("scores", []))
    assert n > 0 and f"92 answers, {n} without a score (the first: KeyError: 'five')" in result.stdout
    assert (folder / "plots" / "out.png").read_bytes().startswith(b"\x89PNG")

    fixed = (folder / "scorers.py").read_text().replace('raise KeyError("five")', "pass")
    (folder / "scorers.py").write_text(fixed)
    before = read(folder / "out.jsonl")
    result = run(folder, *args, "--n", "4", "--retry")
    assert "92 answers, 0 without a score" in result.stdout, result.stderr
    after = read(folder / "out.jsonl")
    assert [a["text"] for r in before.values() for a in r.get("answers", ())] == [
        a["text"] for id in before for a in after[id].get("answers", ())
    ]


def test_a_run_in_which_every_line_fails_ends_with_another_exit_code(folder):
    write_lines(folder / "in.jsonl", {"text": "a"}, {"text": "b"})
    for args in (SAMPLE, ["batch", "in.jsonl", "batch.jsonl"]):
        result = run(folder, *args)
        assert result.returncode == 1 and "2" in result.stdout + result.stderr, result.stderr
    assert len(read(folder / "out.jsonl")) == len(read(folder / "batch.jsonl")) == 2


# Without processes


def write_lines(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(path: Path) -> dict:
    return {record["id"]: record for record in map(json.loads, path.read_text().splitlines())}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def length(row, answers):
    return [float(len(answer["text"])) for answer in answers]


P, DIALOG = assistant("<PLACEHOLDER>"), [user("What is 21 + 34?")]
HOT = {"temperature": 1.8, "top_p": 1.0, "max_gen_len": 8}


def test_a_line_without_a_seed_draws_with_that_of_its_id_and_the_runs(demo, tmp_path):
    lines = [{"prompt": "One day"}, {"prompt": "One day", "seed": None}, {"prompt": "One day", "seed": 9}]
    write_lines(tmp_path / "in.jsonl", *({"id": f"{i}", **line} for i, line in enumerate(lines)))
    sample_files(demo, tmp_path / "in.jsonl", tmp_path / "out.jsonl", length, Plan(2), "length", seed=3, **HOT)
    found = records(tmp_path / "out.jsonl")
    seeds = {"0": line_seed(3, "0"), "1": line_seed(3, "1"), "2": 9}
    assert {name: record["seed"] for name, record in found.items()} == seeds
    for name, seed in seeds.items():
        (expected,) = rejection_sample(demo, ["One day"], length, n=2, seed=seed, **HOT)
        assert [a["text"] for a in found[name]["answers"]] == [a["text"] for a in expected["answers"]]
    assert len({record["answers"][0]["text"] for record in found.values()}) == 3


def test_a_line_that_cannot_be_sampled_is_an_error_that_says_why(demo, tmp_path):
    broken = {
        "open": ({"messages": [P, *DIALOG]}, "message 0 is open: a dialog is a list of one or more messages"),
        "no token": ({"prompt": "x", "stop": [10**6]}, "stop names token 1000000: expected ids from 0 to"),
        "greedy": ({"prompt": "x", "temperature": 0}, "temperature = 0 with n = 2: expected more than 0"),
        "beams": ({"prompt": "x", "num_beams": 2}, "'num_beams' is not a field of a row"),
        "logprobs": ({"prompt": "x", "logprobs": True}, "'logprobs' is not a field of a row"),
    }
    write_lines(tmp_path / "in.jsonl", *({"id": name, **line} for name, (line, _) in broken.items()))
    summary = sample_files(demo, tmp_path / "in.jsonl", tmp_path / "out.jsonl", length, Plan(2), "length", **HOT)
    found = records(tmp_path / "out.jsonl")
    assert summary.n_failed == len(broken)
    for name, (_, message) in broken.items():
        assert message in found[name]["error"], name


def test_it_goes_on_with_the_same_options_however_written_and_with_no_other_model(demo, tmp_path):
    files = write_lines(tmp_path / "in.jsonl", {"prompt": "One day"}), tmp_path / "out.jsonl"

    def louder(ids, logits):
        return logits * 2

    def sample(llama=demo, **options):
        sample_files(
            llama, *files, length, Plan(2), "length", **{"max_gen_len": 4, "logits_processor": louder} | options
        )

    sample()
    before = files[1].read_bytes()
    sample(temperature=0.6, stop=None, seed=demo.answerer.seed)
    assert files[1].read_bytes() == before
    with pytest.raises(ValueError, match=r"options.logits_processor was \"test_it.*, and is null"):
        sample(logits_processor=None)
    with pytest.raises(ValueError, match=r"options.top_k was null, and is 5"):
        sample(top_k=5)
    other = Llama.build(DEMO, max_seq_len=512, device="cpu", dtype="float32")
    with torch.no_grad():
        other.model.layers[1].attention.wv.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r'model.weights was "\w+", and is "\w+"'):
        sample(other)


def test_of_a_dialog_with_open_turns_the_last_answer_is_scored_after_all_that_came_before(demo, tmp_path):
    dialogs = {"between": [*DIALOG, P, user("What is 12 + 7?")], "at the end": [*DIALOG, P], "none": DIALOG}
    source = write_lines(tmp_path / "in.jsonl", *({"id": i, "messages": d} for i, d in dialogs.items()))
    run_batch_files(demo, source, tmp_path / "filled.jsonl", temperature=0, max_gen_len=40, logprobs=True)
    filled = records(tmp_path / "filled.jsonl")
    seen = {}

    def scorer(row, answers):
        seen[json.dumps(row["messages"])] = [answer["text"] for answer in answers]
        return [1.0]

    expected = {
        json.dumps(filled[i].get("messages", [*dialog, None])[:-1]): [filled[i]["text"]]
        for i, dialog in dialogs.items()
    }
    assert filled["between"]["messages"][-1]["content"] == filled["between"]["text"] != filled["at the end"]["text"]
    rescore_files(tmp_path / "filled.jsonl", tmp_path / "asked.jsonl", scorer, Plan(9), "seen", prompts=source)
    assert seen == expected
    seen.clear()
    write_lines(tmp_path / "open.jsonl", filled["between"], filled["at the end"])
    rescore_files(tmp_path / "open.jsonl", tmp_path / "alone.jsonl", scorer, Plan(9), "seen")
    assert len(seen) == 2 and seen.items() <= expected.items()

    rescore_files(tmp_path / "filled.jsonl", tmp_path / "logprob.jsonl", Logprob(demo), Plan(9), "l", prompts=source)
    for name, record in records(tmp_path / "logprob.jsonl").items():  # the text is the tokens it was drawn in
        assert record["scores"] == [pytest.approx(math.fsum(filled[name]["logprobs"]), abs=1e-2)], name
    seen.clear()
    rescore_files(tmp_path / "logprob.jsonl", tmp_path / "again.jsonl", scorer, Plan(9), "seen", prompts=source)
    assert seen == expected


def test_an_open_turn_that_nothing_fills_is_an_error(demo, tmp_path):
    dialog = [*DIALOG, P, user("What is 12 + 7?")]
    source = write_lines(tmp_path / "in.jsonl", {"id": 1, "messages": dialog})
    scored = write_lines(tmp_path / "scored.jsonl", {"id": 1, "text": "19"})
    whole = write_lines(tmp_path / "whole.jsonl", {"id": 1, "messages": dialog, "text": "19"})
    for name, answers, prompts in (("a", scored, source), ("b", whole, None), ("c", whole, source)):
        rescore_files(answers, tmp_path / f"{name}.jsonl", length, Plan(9), "length", prompts=prompts)
        error = records(tmp_path / f"{name}.jsonl")[1]["error"]
        assert "the dialog has open turns, and the record does not have the answers in them: expected its" in error


def test_another_file_of_prompts_is_refused_and_so_is_one_with_an_id_twice(tmp_path):
    answers = write_lines(tmp_path / "answers.jsonl", {"id": 1, "text": "a"})
    prompts = write_lines(tmp_path / "in.jsonl", {"id": 1, "prompt": "x"})
    files = answers, tmp_path / "out.jsonl"
    rescore_files(*files, length, Plan(9), "length", prompts=prompts)
    before = files[1].read_bytes()
    rescore_files(*files, length, Plan(9), "length", prompts=prompts.rename(tmp_path / "renamed.jsonl"))
    write_lines(prompts, {"id": 1, "prompt": "y"})
    with pytest.raises(ValueError, match=r'prompts was "\w+…, and is "\w+…'):
        rescore_files(*files, length, Plan(9), "length", prompts=prompts)
    with pytest.raises(ValueError, match=r'prompts was "\w+…, and is null'):
        rescore_files(*files, length, Plan(9), "length")
    write_lines(prompts, {"id": 1, "prompt": "x"}, {"id": "1", "prompt": "y"})
    with pytest.raises(ValueError, match=r"in.jsonl: line 2 has the id '1', and so has line 1"):
        rescore_files(*files, length, Plan(9), "length", prompts=prompts)
    assert files[1].read_bytes() == before


def test_a_scored_record_keeps_the_other_fields_of_its_answers(demo, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", {"id": "a", "prompt": "One day"})
    sample_files(demo, source, tmp_path / "drawn.jsonl", length, Plan(3), "length", **HOT)
    rescore_files(tmp_path / "drawn.jsonl", tmp_path / "again.jsonl", Logprob(demo), Plan(9), "logprob")
    drawn, again = (records(tmp_path / f"{name}.jsonl")["a"] for name in ("drawn", "again"))
    assert drawn["seed"] == again["seed"] and drawn.keys() == again.keys()
    for before, after in zip(drawn["answers"], again["answers"], strict=True):
        assert after == before | {"score": after["score"]} and after["score"] != before["score"]

    run_batch_files(demo, source, tmp_path / "batch.csv", logprobs=True, **HOT)
    rescore_files(tmp_path / "batch.csv", tmp_path / "out.jsonl", length, Plan(9), "length")
    answered, scored = records(tmp_path / "batch.csv.jsonl")["a"], records(tmp_path / "out.jsonl")["a"]
    known = {n: answered[n] for n in ("text", "finish_reason", "answer_tokens", "tokens", "logprobs")}
    assert scored["answers"] == [known | {"score": len(answered["text"])}] and scored["seed"] == answered["seed"]
    assert "tokens" not in scored  # they are not the prompt's


def test_an_answer_to_a_template_is_scored_with_the_filled_prompt(demo, tmp_path):
    template = {"tasks": {"t": {"user": "What is {a} + 2?", "options": {"max_gen_len": 5}}}}
    source = write_lines(tmp_path / "in.jsonl", {"id": 1, "a": 7})
    run_batch_files(demo, source, tmp_path / "read.jsonl", template=template)
    rescore_files(tmp_path / "read.jsonl", tmp_path / "out.jsonl", Logprob(demo), Plan(9), "logprob")
    assert records(tmp_path / "out.jsonl")[1]["messages"] == [user("What is 7 + 2?")]
    assert records(tmp_path / "out.jsonl")[1]["scores"][0] < 0


def test_the_summary_of_kept_answers_has_no_curve(demo, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", {"id": "a", "prompt": "One day"})
    plan = Plan(4, keep=2)
    assert len(sample_files(demo, source, tmp_path / "drawn.jsonl", length, plan, "length", **HOT).curve) == 3
    for before, after in (("drawn", "again"), ("again", "last")):
        files = tmp_path / f"{before}.jsonl", tmp_path / f"{after}.jsonl"
        assert rescore_files(*files, length, Plan(9), "length").curve == []
        assert records(files[1])["a"]["n_drawn"] == 4


def test_an_answer_that_failed_stays_failed_and_one_that_could_not_be_scored_is_scored_now(tmp_path):
    failed = {"text": "x", "score": None, "finish_reason": "error", "error": "nan"}
    unscored = {"text": "y", "score": None, "finish_reason": "stop", "error": "KeyError: 'sum'"}
    source = write_lines(tmp_path / "in.jsonl", {"id": 1, "prompt": "x", "answers": [failed, unscored]})
    rescore_files(source, tmp_path / "out.jsonl", length, Plan(9), "length")
    assert records(tmp_path / "out.jsonl")[1]["answers"] == [
        failed,
        {"text": "y", "score": 1.0, "finish_reason": "stop"},
    ]


def test_a_scorer_that_needs_the_prompts_says_where_they_may_be(demo, tmp_path):
    answers = write_lines(tmp_path / "answers.jsonl", {"id": 1, "text": "a"})
    nothing = write_lines(tmp_path / "in.jsonl", {"id": 1, "metadata": {}})
    for number, scorer in enumerate((Logprob(demo), Judge(demo))):
        rescore_files(answers, tmp_path / f"{number}.jsonl", scorer, Plan(9), "it")
        error = records(tmp_path / f"{number}.jsonl")[1]["error"]
        assert error.startswith("found none of prompt, messages, tokens: expected one of them, which the scorer reads")
        assert error.endswith("(pass the file with the lines that were answered as --prompts)")
    rescore_files(answers, tmp_path / "named.jsonl", Judge(demo), Plan(9), "it", prompts=nothing)
    assert records(tmp_path / "named.jsonl")[1]["error"].endswith(f"which the scorer reads (in {nothing})")
    rescore_files(answers, tmp_path / "own.jsonl", length, Plan(9), "it")  # a function may do without
    assert records(tmp_path / "own.jsonl")[1]["scores"] == [1.0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--scorer", "scorers:nothing"], "scorers.py has no such name: expected a function (row, answers)"),
        (["--scorer", "best"], "scorer 'best': expected one of logprob, mean_logprob, reward:DIR, judge"),
        (["--scorer", "reward:nowhere"], "there is no directory nowhere: expected a model's"),
        (["--scorer", f"reward:{DEMO}"], "has Meta's checkpoint of a language model: expected config.json and"),
        (["--scorer", "reward:rm"], "says vocab_size 512, but the tokenizer has 2304 tokens"),
        (["--temperature", "0"], "--temperature = 0 with n = 16"),
        (["--threshold", "0.5"], "--threshold = 0.5 without max_samples"),
        (["--keep", "17"], "--keep = 17: expected at most 16, the number"),
        (["--judge_template", "nope"], "--judge_template nope: there is no such file: expected a text file with"),
        (["--plot", "in.jsonl/x.png"], "in.jsonl is a file: expected a directory for the PNG"),
        (["--plot", "."], "--plot . is a directory: expected a PNG to write"),
        (["out.jsonl -> in.jsonl/out.jsonl"], "in.jsonl is a file: expected a directory for out.jsonl"),
        (["in.jsonl -> scorers.py"], "scorers.py: expected a name that ends in .jsonl"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(folder, args, message):
    if "reward:rm" in args:
        write_reward_model(folder / "rm", tokenizer=False)
        from llama import Tokenizer

        message = message.replace("2304", str(Tokenizer(DEMO / "tokenizer.model").n_words))
    old, arrow, new = args[0].partition(" -> ")  # another file, or further options
    result = run(folder, *(new if arrow and word == old else word for word in SAMPLE), *(() if arrow else args))
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert not (folder / "out.jsonl").exists()
    if "reward:" in str(args):  # whose directory is read after the model
        result.stderr = re.sub(r"^Loaded .*\n", "", result.stderr)
    assert result.stderr.count("\n") == 1
