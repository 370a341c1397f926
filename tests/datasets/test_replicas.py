"""Rows answered by replicas on a Ray cluster: the records of one process, from Python and by the commands."""

import json
import re

import pytest
from conftest import ROOT, run_python

from llama import Llama
from llama.datasets.batch import run_batch

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


DIALOG = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "<PLACEHOLDER>"}]
ROWS = [
    row
    for i in range(5)
    for row in (
        {"prompt": f"{i}", "max_gen_len": 5 + i},
        {"messages": [*DIALOG, {"role": "user", "content": f"{i}"}], "max_gen_len": 4},
        {"tokens": [i, 7], "num_return_sequences": 2, "logprobs": True, "max_gen_len": 3},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "max_gen_len": "10"},
    )
]


@pytest.mark.parametrize(("replicas", "size"), [(2, 1), (1, 2)])
def test_the_records_are_those_of_one_process(write_checkpoint, replicas, size):
    arguments = {"ckpt_dir": str(write_checkpoint()), "max_seq_len": 256, "max_batch_size": 4, "device": "cpu"}
    seed = {"seed": 3} if size > 1 else {}  # without one, the same is drawn too: a killed run goes on
    expected = list(run_batch(Llama.build(**arguments), ROWS, **seed))
    found = list(run_batch(arguments | {"model_parallel_size": size}, ROWS, **seed, replicas=replicas))
    by_line = {record["line"]: record for record in found}
    assert len(found) == len(by_line) == len(ROWS)
    for record in expected:
        assert near(by_line[record["line"]], record)


def near(a: object, b: object) -> bool:
    """Equal, log-probabilities up to how sums are rounded where a matrix is split."""
    if isinstance(a, float):
        return abs(a - b) < 2e-4
    if isinstance(a, list):
        return len(a) == len(b) and all(map(near, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[name], b[name]) for name in a)
    return a == b


def test_a_model_that_is_built_here_is_refused(write_checkpoint):
    llama = Llama.build(write_checkpoint(), None, 256, 4, device="cpu")
    with pytest.raises(TypeError, match=r"replicas = 2 with a Llama that is built here: expected the checkpoint's dir"):
        run_batch(llama, ROWS, replicas=2)


def test_a_directory_that_is_not_there_and_a_wrong_option_are_one_error(tmp_path, write_checkpoint):
    with pytest.raises(FileNotFoundError, match=r"ckpt_dir .*nowhere does not exist"):
        run_batch(str(tmp_path / "nowhere"), ROWS, replicas=1)
    with pytest.raises(ValueError, match="top_p = 2"):
        run_batch({"ckpt_dir": str(write_checkpoint()), "device": "cpu"}, ROWS, replicas=1, top_p=2)


COMMAND = "import sys; from llama.cli.commands import main; main(sys.argv[1:])"


def test_the_commands_write_what_one_process_writes(write_checkpoint, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(6)))
    common = [f"--ckpt_dir={write_checkpoint()}", "--max_seq_len=256", "--max_batch_size=2", "--device=cpu"]
    drawing = ["--scorer=logprob", "-n=2", "--max_gen_len=3", "--seed=1"]
    ray_options = ["--replicas=2", f"--ray={ray.get_runtime_context().gcs_address}"]
    for name, options in (("one", []), ("two", ray_options)):
        sampled, scored = tmp_path / f"{name}.jsonl", tmp_path / f"{name} again.jsonl"
        result = run_python(COMMAND, "sample", source, sampled, *common, *drawing, *options)
        assert result.returncode == 0, result.stderr
        result = run_python(COMMAND, "rescore", sampled, scored, *common, "--scorer=mean_logprob", *options)
        assert result.returncode == 0, result.stderr
    for suffix in ("", " again"):
        one, two = ((tmp_path / f"{name}{suffix}.jsonl").read_text().splitlines() for name in ("one", "two"))
        assert len(one) == 6
        assert all(map(near, sorted(map(json.loads, one), key=line), sorted(map(json.loads, two), key=line)))


def line(record: dict) -> int:
    return record["line"]


def test_an_address_where_no_cluster_is_and_torchrun_are_refused(write_checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    arguments = ["batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", f"--ckpt_dir={write_checkpoint()}"]
    result = run_python(COMMAND, *arguments, "--ray=127.0.0.1:1")
    assert result.returncode == 2 and "there is no Ray cluster at 127.0.0.1:1" in result.stderr
    result = run_python(COMMAND, *arguments, "--replicas=2", WORLD_SIZE="2", RANK="0")
    assert result.returncode == 2 and "expected one process, without torchrun" in result.stderr


def test_the_python_of_the_page_answers_each_row(capsys, monkeypatch):
    page = (ROOT / "docs" / "machines.md").read_text()
    monkeypatch.chdir(ROOT)
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], {"__name__": "page"})
    shown = capsys.readouterr().out.splitlines()
    assert sorted(int(line.split()[0]) for line in shown) == list(range(20))
