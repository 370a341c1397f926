"""What a second replica saves: one process of one thread against two replicas of one thread each, the same prompts.

    python -m benchmarks.replicas [--rounds 5] [--n_prompts 64]

Sampled texts of the embedded checkpoint in float32; times are of the `generate` call, in seconds, in turn. Beside them,
what the machine allows: the same on two processes at once that know nothing of each other.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire

ROOT = Path(__file__).resolve().parents[1]


def worker(n_prompts: int, out: str) -> None:
    """What each process runs."""
    from llama import Llama

    llama = Llama.build(
        ROOT / "demo" / "checkpoint", max_seq_len=256, max_batch_size=8, model_parallel_size=1, dtype="float32"
    )
    prompts = [[llama.tokenizer.bos_id, *range(100 + i, 110 + i + i % 40)] for i in range(n_prompts)]
    llama.tokenizer.stop_tokens = set()
    llama.generate(prompts[:2], 5, seed=0)
    started = time.perf_counter()
    answers, _ = llama.generate(prompts, 100, seed=0)
    seconds = time.perf_counter() - started
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps({"seconds": seconds, "answers": answers}))


def run(n_processes: int, n_prompts: int, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    command += ["-m", "benchmarks.replicas", "worker", str(n_prompts), str(out)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def main(rounds: int = 5, n_prompts: int = 64) -> None:
    """Prints the median times and their ratio.

    Args:
        rounds: how often each takes its turn.
        n_prompts: prompts of 11 to 50 tokens, 100 new tokens each.
    """
    seconds: dict[int, list[float]] = {1: [], 2: []}
    unconnected: list[float] = []
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        for _ in range(rounds):
            for n in seconds:
                run(n, n_prompts, out).wait()
                result = json.loads(out.read_text())
                seconds[n].append(result["seconds"])
                answers.append(result["answers"])
            pair = [(run(1, n_prompts, path), path) for path in (out, out.with_suffix(".2"))]
            for process, _ in pair:
                process.wait()
            unconnected.append(max(json.loads(path.read_text())["seconds"] for _, path in pair) / 2)
    one, two = (statistics.median(seconds[n]) for n in (1, 2))
    same = "the same" if all(a == answers[0] for a in answers) else "NOT the same"
    print(
        f"{n_prompts} prompts: {one:.2f} s on one process, {two:.2f} s on two replicas, {two / one:.2f} of it; ", end=""
    )
    print(f"{same} answers")
    allowed = statistics.median(unconnected) / one
    print(f"two processes at once that know nothing of each other take {allowed:.2f} of it for half the prompts each")


if __name__ == "__main__":
    fire.Fire({"worker": worker, "measure": main} if sys.argv[1:2] == ["worker"] else main)
