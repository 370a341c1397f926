"""How long loading takes and what memory it needs: `python -m benchmarks.load --shape llama-3.2-1b`.

In fresh processes, on a checkpoint of random numbers (written once, in --folder): seconds from the end of the imports
to the first token of an answer, with the files in the page cache; seconds of 16 tokens right after it, and of 16 later;
and each process's peak of private memory (RssAnon of /proc/self/status, which no file backs), alone and on 4 processes.
The same for directories that `llama quantize` makes, and for rounding while loading. Linux, CPU.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import fire
import torch

from benchmarks.shapes import PARAMS, default_folder, write_random_checkpoint
from llama.checkpoint.convert import quantize
from llama.layers.quantization import KINDS


def main(shape: str = "llama-3.2-1b", folder: str | None = None, repeats: int = 3, n_ranks: int = 4) -> None:
    """Writes the checkpoint if it is missing, measures, and prints.

    Args:
        shape: one of benchmarks.shapes.PARAMS.
        folder: where the checkpoint is or will be, bfloat16; /tmp/llama-benchmarks/SHAPE when None.
        repeats: how often the run on one process is measured; the least time counts.
        n_ranks: the number of processes of the last run; 0 leaves it out.
    """
    if shape not in PARAMS:
        raise ValueError(f"shape = {shape!r}: expected one of {', '.join(PARAMS)}")
    path = default_folder(shape) if folder is None else Path(folder)
    n_bytes = write_random_checkpoint(path, shape)
    print(f"{shape}: {n_bytes / 1e9:.2f} GB of bfloat16 weights in {path}")
    _report("as it is", path, "", repeats)
    for kind in KINDS:
        rounded = path.with_name(f"{path.name}-{kind}")
        if not rounded.is_dir():
            started = time.perf_counter()
            quantize(path, rounded, kind)
            print(f"`llama quantize --to {kind}`, with its checklist: {time.perf_counter() - started:.1f} s")
        _report(f"{kind} directory", rounded, "", repeats)
        _report(f"rounded to {kind} while loading", path, kind, 1)
    if n_ranks:
        peaks = [run["peak"] for run in _measure(path, n_ranks)]
        shares = ", ".join(f"{peak / 1e6:.0f}" for peak in peaks)
        worst = max(peaks) / (n_bytes / n_ranks)
        print(f"on {n_ranks} processes: peaks {shares} MB, at most {worst:.1%} of a {n_ranks}th of the weights")


def _report(what: str, path: Path, kind: str, repeats: int) -> None:
    for file in sorted(path.iterdir()):  # into the page cache
        with file.open("rb") as content:
            while content.read(1 << 24):
                pass
    runs = [_measure(path, 1, kind)[0] for _ in range(repeats)]
    best = min(runs, key=lambda run: run["seconds"])
    peak, imports = max(run["peak"] for run in runs), max(run["imports"] for run in runs)
    print(
        f"{what}: first token after {best['seconds']:.2f} s after the imports (of",
        f"{', '.join(format(run['seconds'], '.2f') for run in runs)}), the next 16 in {best['next']:.2f} s, later in",
        f"{best['later']:.2f} s; peak {peak / 1e6:.0f} MB of private memory, {imports / 1e6:.0f} MB of it imports",
        flush=True,
    )


def _measure(path: Path, n_ranks: int, kind: str = "") -> list[dict]:
    """The results of each process of a fresh run, by rank."""
    with tempfile.TemporaryDirectory() as results:
        launcher = []
        if n_ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        command = [sys.executable, *launcher, __file__]
        subprocess.run([*command, "--measure", str(path), results, kind], env=environment, check=True, stdout=2)
        return [json.loads((Path(results) / str(rank)).read_text()) for rank in range(n_ranks)]


def measure(path: str, results: str, kind: str) -> None:
    """Loads and generates one token in this process; writes times and memory to a file named after the rank."""
    from llama import Llama

    imports, peak, done = _private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _private_bytes())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    llm = Llama.build(path, device="cpu", quantize=kind or None)
    built = time.perf_counter()
    llm.tokenizer.stop_tokens = set()
    llm.generate([[llm.tokenizer.bos_id, 1000, 2000, 3000]], max_gen_len=1, temperature=0)
    seconds, times = time.perf_counter() - started, []
    for _ in range(3):
        before = time.perf_counter()
        llm.generate([[llm.tokenizer.bos_id, 1000, 2000, 3000]], max_gen_len=16, temperature=0)
        times.append(time.perf_counter() - before)
    done.set()
    watcher.join()
    peak = max(peak, _private_bytes())
    print(f"built in {built - started:.2f} s, {torch.get_num_threads()} threads", file=sys.stderr)
    found = {"seconds": seconds, "next": times[0], "later": times[-1], "peak": peak, "imports": imports}
    (Path(results) / os.environ.get("RANK", "0")).write_text(json.dumps(found))


def _private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon: expected a Linux of 4.5 or later")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        fire.Fire(main)
