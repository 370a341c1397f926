"""Rows answered by replicas on a Ray cluster: the records of one process, from Python and by the commands.

The cluster has two machines, which the commands of docs/machines.md make, here side by side on this one.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT

from llama import Llama
from llama.cli.commands import main
from llama.datasets.batch import run_batch

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
PAGE = (ROOT / "docs" / "machines.md").read_text()
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    ")]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """The address of the cluster that the page's commands make."""
    head, other = (command for command in COMMANDS if command.startswith("ray start"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    quick = ["--block", "--num-cpus=1", "--min-worker-port=0", "--max-worker-port=0"]  # several nodes on one machine
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as nodes:
        nodes.enter_context(
            node(head.replace("6379", str(port)), *quick, "--include-dashboard=0", f"--temp-dir={folder}")
        )
        wait_for(lambda: socket.create_connection(("127.0.0.1", port)).close())
        nodes.enter_context(node(other.replace("HOST0:6379", address), *quick))
        wait_for(lambda: ray.init(address, log_to_driver=False, logging_level="ERROR"))
        wait_for(two_nodes)
        yield address
        ray.shutdown()


def two_nodes() -> None:
    assert len(ray.nodes()) == 2


@contextlib.contextmanager
def node(command: str, *options: str):
    ray_command, *arguments = shlex.split(command)
    run = [str(Path(sys.executable).with_name(ray_command)), *arguments, *options]
    env = {"RAY_AUTH_MODE": "disabled"} | os.environ  # `ray start` else looks for a token, and a driver does not
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(run, env=env, start_new_session=True, **quiet)
    yield
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_for(attempt, seconds: float = 120) -> None:
    """Tries something until it does not raise."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


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
    seed = {"seed": 3} if size > 1 else {}  # the answers are the same without a seed too: a killed run goes on
    expected = list(run_batch(Llama.build(**arguments), ROWS, **seed))
    found = list(run_batch(arguments | {"model_parallel_size": size}, ROWS, **seed, replicas=replicas))
    by_line = {record["line"]: record for record in found}
    assert len(found) == len(by_line) == len(ROWS)
    for record in expected:
        assert near(by_line[record["line"]], record)


def near(a: object, b: object) -> bool:
    """Whether they are equal; log-probabilities differ by how sums of a split matrix are rounded."""
    if isinstance(a, float):
        return abs(a - b) < 2e-4
    if isinstance(a, list):
        return len(a) == len(b) and all(map(near, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[name], b[name]) for name in a)
    return a == b


def test_a_model_of_this_process_is_refused(write_checkpoint):
    llama = Llama.build(write_checkpoint(), None, 256, 4, device="cpu")
    with pytest.raises(TypeError, match=r"replicas = 2 with a Llama of this process: expected the checkpoint's dir"):
        run_batch(llama, ROWS, replicas=2)


def test_a_directory_that_is_not_there_and_a_wrong_option_are_one_error(tmp_path, write_checkpoint):
    with pytest.raises(FileNotFoundError, match=r"ckpt_dir .*nowhere does not exist"):
        run_batch(str(tmp_path / "nowhere"), ROWS, replicas=1)
    with pytest.raises(ValueError, match="top_p = 2"):
        run_batch({"ckpt_dir": str(write_checkpoint()), "device": "cpu"}, ROWS, replicas=1, top_p=2)


def test_the_commands_write_what_one_process_writes(write_checkpoint, tmp_path, cluster):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(6)))
    common = [f"--ckpt_dir={write_checkpoint()}", "--max_seq_len=256", "--max_batch_size=2", "--device=cpu"]
    drawing = ["--scorer=logprob", "-n=2", "--max_gen_len=3", "--seed=1"]
    for name, options in (("one", []), ("two", ["--replicas=1", f"--ray={cluster}"])):
        sampled, scored = tmp_path / f"{name}.jsonl", tmp_path / f"{name} again.jsonl"
        main(["sample", str(source), str(sampled), *common, *drawing, *options])
        main(["rescore", str(sampled), str(scored), *common, "--scorer=mean_logprob", *options])
    for suffix in ("", " again"):
        one, two = ((tmp_path / f"{name}{suffix}.jsonl").read_text().splitlines() for name in ("one", "two"))
        assert len(one) == 6
        assert all(map(near, sorted(map(json.loads, one), key=line), sorted(map(json.loads, two), key=line)))


def line(record: dict) -> int:
    return record["line"]


def test_torchrun_and_an_address_without_a_cluster_are_refused(write_checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    arguments = ["batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", f"--ckpt_dir={write_checkpoint()}"]
    with monkeypatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        with pytest.raises(SystemExit, match="2"):
            main([*map(str, arguments), "--ray=127.0.0.1:1"])
    assert "there is no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, arguments), "--replicas=2"])
    assert "expected one process, without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["--replicas 8", "--ray HOST0:6379"])
def test_the_commands_of_the_page_answer_each_row(where, write_checkpoint, tmp_path, cluster):
    """In its own process: the first starts Ray, the second joins the cluster."""
    (command,) = (c for c in COMMANDS if c.startswith("python -m llama batch") and c.endswith(where))
    (tmp_path / "IN.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}", "max_gen_len": 3}) + "\n" for i in range(6))
    )
    command = command.replace(where, where.replace("8", "1") if "replicas" in where else f"--ray {cluster}")
    python, *arguments = shlex.split(command.replace("DIR", str(write_checkpoint())))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = [sys.executable, *arguments, "--max_seq_len=256"]
    result = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert python == "python" and result.returncode == 0, result.stderr
    records = map(json.loads, (tmp_path / "OUT.jsonl").read_text().splitlines())
    assert sorted(record["line"] for record in records) == [1, 2, 3, 4, 5, 6]
    assert "6 of 6 lines done, 0 of them failed" in result.stderr and "replica" in result.stderr


def test_the_manifest_of_the_page_is_a_rayjob_whose_entrypoint_is_a_command_of_ours():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.S)[1])
    assert job["kind"] == "RayJob" and job["spec"]["entrypoint"].startswith("python -m llama batch ")
    groups = job["spec"]["rayClusterSpec"]
    for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert [m["name"] for m in container["volumeMounts"]] == [
            v["name"] for v in group["template"]["spec"]["volumes"]
        ]


def test_the_python_of_the_page_answers_each_row(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(re.search(r"```python\n(.*?)```", PAGE, re.S)[1], {"__name__": "page"})
    shown = capsys.readouterr().out.splitlines()
    assert sorted(int(line.split()[0]) for line in shown) == list(range(20))
