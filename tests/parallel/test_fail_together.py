"""When one rank fails, all end: real processes, killed and interrupted for real."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
from conftest import ROOT

# Ends within this many seconds of the failure; gloo alone would wait for half an hour where nothing else tells it.
LIMIT = 15

# One rank, the last, fails in the way and at the place that the arguments say.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch.distributed as dist
from llama import Llama
from llama.checkpoint import meta as checkpoint

ckpt_dir, folder, place, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
(folder / f"{rank}.pid").write_text(str(os.getpid()))

def fail():
    (folder / "failed").write_text(str(time.time()))
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "raises":
        raise MemoryError("no room left")

def wrap(owner, name, action):
    original, n_calls = getattr(owner, name), 0
    def wrapped(*args, **kwargs):
        nonlocal n_calls
        n_calls += 1
        action(n_calls)
        return original(*args, **kwargs)
    setattr(owner, name, wrapped)

def while_loading(n_calls):
    if place == "loading":
        time.sleep(0.05)
        if rank == world_size - 1 and n_calls == 20:
            fail()

def while_generating(n_calls):
    if place == "generating":
        time.sleep(0.02)
        if rank == world_size - 1 and n_calls == 10:
            fail()
    if place == "everywhere" and n_calls == 10:
        raise MemoryError("no room anywhere")

wrap(checkpoint.MetaCheckpoint, "read", while_loading)
try:
    llm = Llama.build(ckpt_dir, max_seq_len=256, max_batch_size=1, device="cpu")
    wrap(llm.model, "hidden_states", while_generating)
    if place == "idle":
        if rank == world_size - 1:
            fail()
        time.sleep(600)
    llm.generate([[1]], max_gen_len=200, temperature=0)
    print("finished", file=sys.stderr)
except Exception as error:
    print(f"rank {rank} saw {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if place == "everywhere":
        tokens = llm.generate([[1]], max_gen_len=3, temperature=0)[0][0]
        print(f"rank {rank} went on: {len(tokens)} tokens", file=sys.stderr)
        sys.exit(0)
    if way == "raises" and rank == world_size - 1:
        time.sleep(600)  # as a program that goes on after an error
    raise
"""


class Run:
    """A script on several processes, under torchrun or each started by hand, with their stderr in files."""

    def __init__(self, folder: Path, ckpt_dir: Path, place: str, way: str, n_ranks: int, torchrun: bool):
        self.folder, self.n_ranks = folder, n_ranks
        script = folder / "script.py"
        script.write_text(SCRIPT)
        arguments = [str(script), str(ckpt_dir), str(folder), place, way]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if torchrun:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
            with (folder / "0.err").open("w") as log:
                command = [sys.executable, *launcher, *arguments]
                self.processes = [subprocess.Popen(command, env=env, stderr=log, start_new_session=True)]
            return
        port = 20000 + os.getpid() * 7 % 9000 + abs(hash((place, way))) % 1000
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n_ranks)}
        self.processes = [self._start(arguments, env | {"RANK": str(rank)}, rank) for rank in range(n_ranks)]

    def _start(self, arguments: list[str], env: dict[str, str], rank: int) -> forks.Fork:
        with (self.folder / f"{rank}.err").open("w") as log, open(os.devnull, "r+") as null:
            return forks.parent().start(arguments, [null.fileno(), null.fileno(), log.fileno()], env, None)

    def wait_for(self, name: str, timeout: float = 90) -> None:
        deadline = time.time() + timeout
        while not (self.folder / name).exists():
            assert time.time() < deadline, f"no {name} after {timeout} s: {self.stderr()}"
            time.sleep(0.05)

    def stderr(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.err")))

    def alive(self) -> list[int]:
        """The ranks whose process is still there."""
        return [int(path.stem) for path in self.folder.glob("*.pid") if Path("/proc", path.read_text()).exists()]

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for path in self.folder.glob("*.pid"):
            if Path("/proc", path.read_text()).exists():
                os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.fixture
def start(tmp_path, stories):
    runs = []

    def start(place: str, way: str, n_ranks: int = 4, torchrun: bool = False) -> Run:
        runs.append(Run(tmp_path, stories, place, way, n_ranks, torchrun))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


def seconds_until_others_end(run: Run) -> float:
    """From the failure until every process but the last rank's has ended, none of them with exit code 0."""
    run.wait_for("failed")
    failed = float((run.folder / "failed").read_text())
    for process in run.processes[: max(1, run.n_ranks - 1)]:
        assert process.wait(timeout=60) != 0, run.stderr()
    return time.time() - failed


@pytest.mark.parametrize("place", ["loading", "generating"])
def test_after_a_kill_torchrun_ends_and_no_rank_is_left(start, place):
    run = start(place, "killed", torchrun=True)
    assert seconds_until_others_end(run) < LIMIT
    assert run.alive() == []


@pytest.mark.parametrize("place, n_ranks", [("loading", 2), ("generating", 2), ("idle", 4)])
def test_after_a_kill_ranks_started_by_hand_end_and_say_why(start, place, n_ranks):
    run = start(place, "killed", n_ranks)
    assert seconds_until_others_end(run) < LIMIT, run.stderr()
    for rank in range(n_ranks - 1):
        assert f"rank {n_ranks - 1} failed: it was killed" in (run.folder / f"{rank}.err").read_text()


@pytest.mark.parametrize("place", ["loading", "generating"])
def test_others_end_with_the_message_of_a_rank_that_raises_and_lives_on(start, place):
    run = start(place, "raises", n_ranks=2)
    assert seconds_until_others_end(run) < LIMIT, run.stderr()
    assert "rank 1 failed: MemoryError: no room left" in (run.folder / "0.err").read_text()
    assert "rank 1 saw MemoryError: no room left" in (run.folder / "1.err").read_text()


def test_an_exception_that_every_rank_raises_is_an_exception_like_any_other(start):
    run = start("everywhere", "raises", n_ranks=2)
    for rank, process in enumerate(run.processes):
        assert process.wait(timeout=90) == 0, run.stderr()
        stderr = (run.folder / f"{rank}.err").read_text()
        assert f"rank {rank} saw MemoryError: no room anywhere" in stderr
        assert f"rank {rank} went on: 3 tokens" in stderr


def test_ctrl_c_leaves_no_process_behind(start):
    run = start("generating", "nothing", torchrun=True)
    run.wait_for("failed")  # all are in the middle of their collectives
    os.killpg(run.processes[0].pid, signal.SIGINT)  # what a terminal sends
    assert run.processes[0].wait(timeout=LIMIT) != 0
    assert run.alive() == []
