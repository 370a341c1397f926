"""A batch on replicas of a Ray cluster in which everything is killed, compared with one process left alone.

    python -m benchmarks.kill_replicas [--n_lines 2000] [--seed 0]

The lines are those of `benchmarks.kill_batch`, on random float32 weights; the cluster has two nodes on this machine and
three replicas. At random numbers of lines and in a random order, the process of each replica is killed twice, the
raylet of the second node once (a machine is gone, another one joins), and the driver once, which is then started again.
In the end each id must occur once, and the records must equal those of one process left alone. Prints the time of three
replicas left alone, and of the run with the kills.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire

from benchmarks.kill_batch import OPTIONS, ROOT, finish, n_written, write_lines
from benchmarks.shapes import write_small_checkpoint


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Workers:
    """The replicas' processes, found by the title that Ray gives them, and how often each replica has been killed.

    A new process counts as the successor of one that is gone.
    """

    def __init__(self):
        self.kills: dict[int, int] = {}  # by process id
        self.free: list[int] = []  # the counts of replicas whose process is gone and has no successor yet

    def find(self) -> dict[int, int]:
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # the process has ended meanwhile
                if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(b"ray::_Rank"):
                    raylet = parent(int(folder.name))
                    found += [int(folder.name)] if parent(raylet) == os.getpid() else []  # not another cluster's
        self.free = sorted([*self.free, *(self.kills.pop(pid) for pid in set(self.kills) - set(found))])
        for pid in found:
            if pid not in self.kills:
                self.kills[pid] = self.free.pop(0) if self.free else 0
        return self.kills

    def kill(self, chance: random.Random) -> None:
        """Kills one of the replicas that have been killed least."""
        while not (kills := self.find()) or min(kills.values()) > min(self.free, default=9):
            time.sleep(0.01)  # until the replica that was killed least is back
        victim = chance.choice([pid for pid, n in kills.items() if n == min(kills.values())])
        self.kills[victim] += 1
        os.kill(victim, signal.SIGKILL)


def start_driver(folder: Path, out: Path, address: str) -> subprocess.Popen:
    options = [f"{option}=1" if option == "--model_parallel_size" else option for option in OPTIONS]
    command = [sys.executable, "-m", "llama", "batch", str(folder / "in.jsonl"), str(out), f"--ckpt_dir={folder}"]
    command += [*options, "--replicas=3", f"--ray={address}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=env, stderr=(folder / "stderr").open("a"), stdout=subprocess.DEVNULL)


def wait_for(n_lines: int, driver: subprocess.Popen, out: Path, folder: Path) -> None:
    while n_written(out) < n_lines:
        if driver.poll() is not None:
            raise RuntimeError(f"ended by itself: {(folder / 'stderr').read_text()[-3000:]}")
        time.sleep(0.005)


def main(n_lines: int = 2000, seed: int = 0) -> dict:
    """Prints the result.

    Args:
        n_lines: of the input.
        seed: for the moments and victims.
    """
    from ray.cluster_utils import Cluster

    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small_checkpoint(folder)
        write_lines(folder / "in.jsonl", n_lines, longest=90)  # about as long as short real answers
        finish(folder, folder / "alone.jsonl", 1)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        node, seconds, workers = cluster.add_node(num_cpus=2), {}, Workers()
        try:
            for kind in ("left alone", "killed"):
                out, started = folder / f"{kind}.jsonl", time.perf_counter()
                driver = start_driver(folder, out, cluster.address)
                moments = sorted(chance.sample(range(1, n_lines * 9 // 10), 8)) if kind == "killed" else []
                events = chance.sample(["worker"] * 6 + ["raylet", "driver"], 8)
                for event, at in zip(events, moments):
                    wait_for(max(at, n_written(out)), driver, out, folder)
                    if event == "worker":
                        workers.kill(chance)
                    elif event == "raylet":
                        cluster.remove_node(node, allow_graceful=False)
                        node = cluster.add_node(num_cpus=2)
                    else:
                        driver.kill()
                        driver.wait()
                        driver = start_driver(folder, out, cluster.address)
                if driver.wait(timeout=600) != 0:
                    raise RuntimeError((folder / "stderr").read_text()[-3000:])
                seconds[kind] = time.perf_counter() - started
        finally:
            cluster.shutdown()
        expected, lines = ((folder / f"{name}.jsonl").read_bytes().splitlines() for name in ("alone", "killed"))
    ids = {record["id"] or record["line"] for record in map(json.loads, lines)}
    found = {"lines": len(lines), "ids": len(ids), "equal": sorted(lines) == sorted(expected)}
    print(f"{n_lines} lines, three replicas; killed at: " + ", ".join(f"{at} {e}" for e, at in zip(events, moments)))
    print(f"how often the processes of each replica were killed: {sorted([*workers.kills.values(), *workers.free])}")
    same = "equal" if found["equal"] else "NOT equal"
    print(f"in the end {found['lines']} lines with {found['ids']} ids, {same} to those of one process left alone")
    ratio = seconds["killed"] / seconds["left alone"]
    print(f"{seconds['left alone']:.1f} s left alone, {seconds['killed']:.1f} s killed: {ratio:.2f} times (bar 2)")
    return None if __name__ == "__main__" else found


if __name__ == "__main__":
    fire.Fire(main)
