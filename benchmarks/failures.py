"""A table of failures: one rank of four raises or is killed; which ranks end, after how long, and what is on stderr.

    python -m benchmarks.failures [--watch False] [--only "two hosts"]

The rank fails while it loads, while it generates, or while it is idle (as when a chat waits for its user), under one
torchrun, and under two on two hosts, which are network namespaces with a link between them. Then the link is cut.
`--watch False` leaves out `llama.parallel.lifeline`, and shows what torchrun and gloo do alone. A run that has not
ended after 75 s is killed. Making namespaces needs root, and `ip` of iproute2.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire

ROOT = Path(__file__).resolve().parents[1]
GIVEN_UP = 75  # seconds after the failure
PORT = 29561
CAUSE = "no room left"  # the message of the rank that raises

# How a script begins whose ranks fail in the way and at the place that its arguments name.
FAILING = """
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
"""
# Of four ranks the last fails.
SCRIPT = """
from llama.parallel import groups, lifeline

if sys.argv[5] == "nobody":
    groups.failing.connect = lambda: None
elif sys.argv[5] != "lifeline":  # probes that tests can wait for
    lifeline.PROBE_AFTER, lifeline.GIVE_UP_AFTER = 2, int(sys.argv[5])

def while_loading(n_calls):
    if place == "loading":
        if rank == world_size - 1 and n_calls == 5:
            fail()
        time.sleep(2 if n_calls > 5 else 0.05)  # the others load for half a minute longer

def while_generating(n_calls):
    if place == "generating":
        time.sleep(0.02)
        if rank == world_size - 1 and n_calls == 10:
            fail()

wrap(checkpoint.MetaCheckpoint, "read", while_loading)
llm = Llama.build(ckpt_dir, max_seq_len=256, max_batch_size=1, device="cpu")
wrap(llm.model, "hidden_states", while_generating)
if place == "idle":
    llm.generate([[1]], max_gen_len=2)
    if rank == world_size - 1:
        fail()
    time.sleep(600)
llm.generate([[1]], max_gen_len=240, temperature=0)
print("finished", file=sys.stderr)
"""


class Hosts:
    """Two network namespaces, each a host with its own loopback, and a link between them."""

    def __init__(self):
        tag = os.getpid() % 10000
        self.names = [f"llama{tag}a", f"llama{tag}b"]
        self.ends = [f"v{tag}a", f"v{tag}b"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def __enter__(self) -> "Hosts":
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
        for name, end, address in zip(self.names, self.ends, self.addresses):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", name, "link", "set", device, "up")
        return self

    def cut(self) -> None:
        """Cuts the link silently, as when a switch dies: each host now sends to an address that nobody has."""
        for name, end, other in zip(self.names, self.ends, self.addresses[::-1]):
            nobody = ("lladdr", "02:00:00:00:00:09", "nud", "permanent")
            ip("-n", name, "neighbour", "replace", other, *nobody, "dev", end)

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            ip("netns", "delete", name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Run:
    """The script on four ranks: under one torchrun, or under two with two ranks each on two hosts.

    `watch` is "lifeline", "nobody" for none, or the seconds after which a lifeline gives up a connection.
    """

    def __init__(self, folder: Path, ckpt_dir: Path, place: str, way: str, hosts: Hosts | None, watch: str):
        self.folder = folder
        (folder / "script.py").write_text(FAILING + SCRIPT)
        arguments = [str(folder / "script.py"), str(ckpt_dir), str(folder), place, way, watch]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.agents = []
        for number in range(1 if hosts is None else 2):
            command = [sys.executable, "-m", "torch.distributed.run"]
            if hosts is None:
                command += ["--standalone", "--nproc_per_node=4"]
            else:
                env["GLOO_SOCKET_IFNAME"] = hosts.ends[number]
                command = ["ip", "netns", "exec", hosts.names[number], *command, "--nnodes=2", "--nproc_per_node=2"]
                command += [f"--node_rank={number}", f"--master_addr={hosts.addresses[0]}", f"--master_port={PORT}"]
            stderr = (folder / f"{number}.err").open("w")
            agent = subprocess.Popen([*command, *arguments], env=env, stderr=stderr, start_new_session=True)
            self.agents.append(agent)

    def wait_for(self, name: str, timeout: float = 120) -> None:
        deadline = time.time() + timeout
        while not (self.folder / name).exists():
            if time.time() > deadline or any(agent.poll() is not None for agent in self.agents):
                raise RuntimeError(f"no {name}: {self.stderr()}")
            time.sleep(0.05)

    def ends(self) -> list[float | None]:
        """For each torchrun, the seconds from the failure until it and its ranks had ended; None for never."""
        failed = float((self.folder / "failed").read_text())
        seconds: list[float | None] = [None] * len(self.agents)
        while None in seconds and time.time() - failed < GIVEN_UP:
            for number, agent in enumerate(self.agents):
                if seconds[number] is None and agent.poll() is not None and not self.alive(number):
                    seconds[number] = time.time() - failed
            time.sleep(0.05)
        return seconds

    def alive(self, number: int) -> list[int]:
        """The ranks of a torchrun whose process is still there."""
        ranks = range(4) if len(self.agents) == 1 else range(2 * number, 2 * number + 2)
        return [rank for rank in ranks if Path("/proc", (self.folder / f"{rank}.pid").read_text()).exists()]

    def stderr(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.err")))

    def causes(self, number: int) -> list[str]:
        """The lines on a torchrun's stderr that name the cause; the line of code in a traceback does not count."""
        pattern = re.compile(rf"Error: {CAUSE}$|was killed|connection was lost|gloo/transport|Signal 9")
        lines = (self.folder / f"{number}.err").read_text().splitlines()
        return [line for line in lines if pattern.search(line)]

    def kill(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
        for path in self.folder.glob("*.pid"):
            if Path("/proc", path.read_text()).exists():
                os.kill(int(path.read_text()), signal.SIGKILL)


def measure(ckpt_dir: Path, place: str, way: str, where: str, watch: str) -> bool:
    """Prints one row of the table; returns whether all ended in time, with a nonzero exit code."""
    with tempfile.TemporaryDirectory() as name:
        hosts = Hosts().__enter__() if where != "one host" else None
        run = Run(Path(name), ckpt_dir, place, "nothing" if where == "cut link" else way, hosts, watch)
        try:
            run.wait_for("failed")
            if where == "cut link":
                hosts.cut()
                (run.folder / "failed").write_text(str(time.time()))
            seconds = run.ends()
            codes = [agent.poll() for agent in run.agents]
            limit = 60 if where == "cut link" else 15
            in_time = all(s is not None and s <= limit for s in seconds) and 0 not in codes
            took = " and ".join("never" if s is None else f"{s:.1f} s" for s in seconds)
            print(f"{where:9}  {place:10}  {way:7}  {took:18}  exit {codes}  {'in time' if in_time else 'NOT IN TIME'}")
            for number in range(len(run.agents)):
                causes = run.causes(number)
                print(f"    stderr {number}, {len(causes)} lines of the cause: {causes[0][:150] if causes else ''}")
            sys.stdout.flush()
        finally:
            run.kill()
            if hosts is not None:
                hosts.__exit__()
    return in_time


def main(watch: bool = True, only: str | None = None, place: str | None = None) -> None:
    """Prints the table.

    Args:
        watch: whether ranks have the lifeline.
        only: "one host", "two hosts" or "cut link"; all of them when None.
        place: "loading", "generating" or "idle"; all of them when None.
    """
    from benchmarks.shapes import write_small_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        write_small_checkpoint(Path(folder))
        found = [
            measure(Path(folder), at, way, where, "lifeline" if watch else "nobody")
            for where in ("one host", "two hosts", "cut link")
            if only in (None, where)
            for at in ("loading", "generating", "idle")
            if place in (None, at)
            for way in (("raises", "killed") if where != "cut link" else ("cut",))
        ]
    print(f"{sum(found)} of {len(found)} ended in time (15 s; 60 s after the link was cut)")


if __name__ == "__main__":
    fire.Fire(main)
