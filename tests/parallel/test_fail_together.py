"""When one rank fails, all end: real processes, killed for real. `benchmarks.failures` prints the whole table."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import failures
from llama.parallel import lifeline

# All ranks must end within this many seconds of the failure; gloo alone would wait for half an hour.
LIMIT = 15

# The last rank fails.
SCRIPT = """
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
        time.sleep(600)  # like a program that goes on after an error
    raise
"""


class Run:
    """A script on several processes, each started by hand, with their stderr in files."""

    def __init__(self, folder: Path, ckpt_dir: Path, place: str, way: str, n_ranks: int):
        self.folder, self.n_ranks = folder, n_ranks
        script = folder / "script.py"
        script.write_text(failures.FAILING + SCRIPT)
        arguments = [str(script), str(ckpt_dir), str(folder), place, way]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        port = 20000 + os.getpid() * 7 % 9000 + abs(hash((place, way))) % 1000
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n_ranks)}
        self.processes = [self._start(arguments, env | {"RANK": str(rank)}, rank) for rank in range(n_ranks)]

    def _start(self, arguments: list[str], env: dict[str, str], number: int) -> subprocess.Popen:
        stderr = (self.folder / f"{number}.err").open("w")
        return subprocess.Popen([sys.executable, *arguments], env=env, stderr=stderr, start_new_session=True)

    def wait_for(self, name: str, timeout: float = 90) -> None:
        deadline = time.time() + timeout
        while not (self.folder / name).exists():
            assert time.time() < deadline, f"no {name} after {timeout} s: {self.stderr()}"
            time.sleep(0.05)

    def stderr(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.err")))

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

    def start(place: str, way: str, n_ranks: int = 2) -> Run:
        runs.append(Run(tmp_path, stories, place, way, n_ranks))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


def seconds_until_others_end(run: Run) -> float:
    """Seconds from the failure until all ranks but the last have ended, none of them with exit code 0."""
    run.wait_for("failed")
    failed = float((run.folder / "failed").read_text())
    for process in run.processes[: max(1, run.n_ranks - 1)]:
        assert process.wait(timeout=60) != 0, run.stderr()
    return time.time() - failed


def test_after_a_kill_ranks_started_by_hand_end_and_say_why(start):
    run = start("idle", "killed")
    assert seconds_until_others_end(run) < LIMIT, run.stderr()
    assert "rank 1 failed: it was killed" in (run.folder / "0.err").read_text()


@pytest.mark.parametrize("place", ["loading", "generating"])
def test_others_end_with_the_message_of_a_rank_that_raises_and_lives_on(start, place):
    run = start(place, "raises")
    assert seconds_until_others_end(run) < LIMIT, run.stderr()
    assert "rank 1 failed: MemoryError: no room left" in (run.folder / "0.err").read_text()
    assert "rank 1 saw MemoryError: no room left" in (run.folder / "1.err").read_text()


def test_an_exception_that_every_rank_raises_is_an_exception_like_any_other(start):
    run = start("everywhere", "raises")
    for rank, process in enumerate(run.processes):
        assert process.wait(timeout=90) == 0, run.stderr()
        stderr = (run.folder / f"{rank}.err").read_text()
        assert f"rank {rank} saw MemoryError: no room anywhere" in stderr
        assert f"rank {rank} went on: 3 tokens" in stderr


@pytest.fixture
def start_torchrun(tmp_path, stories):
    """Four ranks under torchrun, the last of which fails."""
    runs = []

    def start(place: str, way: str, hosts: failures.Hosts | None = None, watch: str = "lifeline") -> failures.Run:
        runs.append(failures.Run(tmp_path, stories, place, way, hosts, watch))
        runs[-1].wait_for("failed")
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def test_ctrl_c_leaves_no_process_behind(start_torchrun):
    run = start_torchrun("generating", "nothing")  # all are in the middle of their collectives
    os.killpg(run.agents[0].pid, signal.SIGINT)  # as a terminal does
    assert run.agents[0].wait(timeout=LIMIT) != 0
    assert run.alive(0) == []


def test_under_torchrun_an_exception_is_on_stderr_once(start_torchrun):
    run = start_torchrun("generating", "raises")
    (seconds,) = run.ends()
    assert seconds < LIMIT and run.agents[0].returncode != 0
    assert len(run.causes(0)) == 1, run.stderr()


@pytest.fixture
def hosts():
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces needs root, and `ip` of iproute2")
    with failures.Hosts() as made:
        yield made


@pytest.mark.parametrize(("place", "way"), [("idle", "killed"), ("loading", "raises")])
def test_ranks_of_another_host_end_too_and_each_host_says_why_once(start_torchrun, hosts, place, way):
    run = start_torchrun(place, way, hosts)
    assert max(run.ends()) < LIMIT and 0 not in [agent.returncode for agent in run.agents]
    why = "MemoryError: no room left" if way == "raises" else "it was killed, or its connection was lost"
    assert run.causes(0) == [f"[rank 0] ended, because rank 3 failed: {why}"]
    assert len(run.causes(1)) == 1, run.stderr()


def test_when_the_link_between_hosts_is_cut_both_end(start_torchrun, hosts):
    assert lifeline.GIVE_UP_AFTER + lifeline.GRACE + lifeline.PATIENCE + LIMIT < 60
    run = start_torchrun("idle", "nothing", hosts, watch="6")
    hosts.cut()
    (run.folder / "failed").write_text(str(time.time()))
    assert max(run.ends()) < 6 + lifeline.GRACE + lifeline.PATIENCE + LIMIT, run.stderr()
    assert 0 not in [agent.returncode for agent in run.agents]
    assert [len(run.causes(number)) for number in range(2)] == [1, 1], run.stderr()
