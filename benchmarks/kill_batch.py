"""A batch killed again and again, compared with one left alone.

    python -m benchmarks.kill_batch [--n_lines 2000] [--n_kills 5]

Random float32 weights of a tiny shape; lines of every kind, sampled, some of them broken. Each kill is a SIGKILL when
the output has a random number of lines. It hits the one process of a run; the second kill, and every third after it,
hits one of four processes (two replicas of two). Then the same command starts the run again; the last time, four
processes complete it. In the end every id must occur once, and the sorted lines must equal those of the run left alone.
"""

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

from benchmarks.shapes import write_small_checkpoint

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("--max_seq_len=256", "--max_batch_size=16", "--max_gen_len=6", "--model_parallel_size", "--device=cpu")


def write_lines(path: Path, n: int, seed: int = 0, longest: int = 9) -> None:
    """Writes texts, ids, dialogs with an open turn, several answers of at most `longest` tokens, and broken lines."""
    chance = random.Random(seed)
    with path.open("w") as file:
        for number in range(n):
            text = "".join(chance.choices("abcdefgh ", k=chance.randint(1, 30)))
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "<PLACEHOLDER>"}]
            kinds = [{"prompt": text}, {"tokens": [chance.randrange(256) for _ in text]}, {"prompt": text, "seed": 5}]
            kinds += [{"messages": [*messages, messages[0]]}, {"prompt": text, "num_return_sequences": 3}]
            line = {"id": f"line {number}", "max_gen_len": chance.randint(0, longest), **kinds[number % 5]}
            file.write(json.dumps(line)[: 40 if number % 100 == 99 else None] + "\n")


def start(folder: Path, out: Path, n_processes: int) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    options = [f"{o}={min(2, n_processes)}" if o == "--model_parallel_size" else o for o in OPTIONS]
    command = [*(launcher if n_processes > 1 else []), "-m", "llama", "batch", str(folder / "in.jsonl"), str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    stderr = (folder / "stderr").open("w")
    command = [sys.executable, *command, f"--ckpt_dir={folder}", *options]
    return subprocess.Popen(command, env=env, stderr=stderr, stdout=subprocess.DEVNULL, start_new_session=True)


def finish(folder: Path, out: Path, n_processes: int) -> None:
    if start(folder, out, n_processes).wait(timeout=170) != 0:
        raise RuntimeError((folder / "stderr").read_text())


def n_written(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def kill_once(folder: Path, out: Path, n_processes: int, after: int, chance: random.Random) -> int:
    """Starts the run, kills one of its processes when the output has `after` lines, and waits for the others to end.

    Returns how many lines the output has then.
    """
    run = start(folder, out, n_processes)
    while n_written(out) < after:
        if run.poll() is not None:
            raise RuntimeError(f"ended by itself: {(folder / 'stderr').read_text()}")
        time.sleep(0.001)
    victim = run.pid
    if n_processes > 1:
        victim = chance.choice(
            [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        )
    os.kill(victim, signal.SIGKILL)
    if run.wait(timeout=60) == 0:
        raise RuntimeError("the run did not notice the kill")
    return n_written(out)


def main(n_lines: int = 2000, n_kills: int = 5, seed: int = 0) -> dict:
    """Prints the result.

    Args:
        n_lines: of the input.
        n_kills: how many runs are killed, before the one that completes.
        seed: for the moments and victims.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small_checkpoint(folder)
        write_lines(folder / "in.jsonl", n_lines)
        started = time.perf_counter()
        finish(folder, folder / "alone.jsonl", 1)
        seconds = time.perf_counter() - started
        out = folder / "killed.jsonl"
        moments = []
        for n, after in enumerate(sorted(chance.sample(range(1, n_lines * 9 // 10), n_kills))):
            n_processes = 4 if n % 3 == 1 else 1
            moments.append((kill_once(folder, out, n_processes, max(after, n_written(out) + 1), chance), n_processes))
        finish(folder, out, 4)
        expected, lines = ((folder / f"{name}.jsonl").read_bytes().splitlines() for name in ("alone", "killed"))
    records = [json.loads(line) for line in lines]
    found = {
        "lines": len(lines),
        "ids": len({record["id"] or record["line"] for record in records}),
        "equal": sorted(lines) == sorted(expected),
    }
    # Random weights sometimes write the name of a control token, which as text in the next prompt is thirty tokens.
    reasons = {"broken": "not JSON", "too_long": "expected at most max_seq_len"}
    errors = [record["error"] for record in records if "error" in record]
    found |= {name: sum(reason in error for error in errors) for name, reason in reasons.items()}
    found["others"] = len(errors) - found["broken"] - found["too_long"]
    print(f"{n_lines} lines, {seconds:.1f} s left alone; killed {n_kills} times, at", end=" ")
    print(", ".join(f"{at} lines ({n} process{'es' * (n > 1)})" for at, n in moments))
    same = "equal" if found["equal"] else "NOT equal"
    print(f"in the end {found['lines']} lines, all of which parse, with {found['ids']} ids;", end=" ")
    print(f"sorted, they are {same} to those of the run left alone")
    print(
        f"failed: {found['broken']} broken lines, {found['too_long']} dialogs that became longer than max_seq_len, "
        f"{found['others']} others"
    )
    return None if __name__ == "__main__" else found


if __name__ == "__main__":
    fire.Fire(main)
