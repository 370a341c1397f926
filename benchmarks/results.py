"""Makes all of RESULTS.md on a quiet machine, in some 15 minutes: `python -m benchmarks.results`.

Runs decoding and prefill beside the peers (`benchmarks.decode`), loading (`benchmarks.load`), compiled starts, and
drafts (`benchmarks.speculative speed`), one after the other. What each prints becomes a part of benchmarks/RESULTS.md.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire

from benchmarks.shapes import default_folder, write_random_checkpoint

PARTS = {
    "Loading": ["benchmarks.load", "--n_ranks", "0"],
    "Compiled starts": ["benchmarks.results", "starts"],
    "Drafts": ["benchmarks.speculative", "speed"],
}
START = """
import sys, time, torch
from llama import Llama
started = time.perf_counter()
llama = Llama.build(sys.argv[1], max_seq_len=512, max_batch_size=8, device="cpu", compile=True)
built = time.perf_counter()
llama.generate([[1, 2, 3]], 3, temperature=0)
one = time.perf_counter()
llama.generate([[1, 2, 3], [4]], 3, temperature=0)
print("TIMES", built - started, one - built, time.perf_counter() - one)
"""


def everything(out: str = "benchmarks", shape: str = "llama-3.2-1b", **decode: str) -> None:
    """Measures and writes.

    Args:
        out: where decode.json, decode.png and RESULTS.md are written.
        shape: one of benchmarks.shapes.PARAMS.
        decode: other options of `benchmarks.decode`; two rounds by default.
    """
    options = [f"--{name}={value}" for name, value in {"shape": shape, "out": out, "rounds": 2, **decode}.items()]
    subprocess.run([sys.executable, "-m", "benchmarks.decode", *options], check=True)
    with (Path(out) / "RESULTS.md").open("a") as results:
        for title, (module, *arguments) in PARTS.items():
            run = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)
            printed = run.stdout or f"(ended with {run.returncode})\n"
            results.write(f"\n## {title}\n\n    python -m {' '.join([module, *arguments])}\n\n")
            results.write("".join(f"    {line}\n" for line in printed.splitlines()))
            results.flush()


def starts(shape: str = "llama-3.2-1b") -> None:
    """Prints the seconds of a compiled start: of the first on a machine, and of the second, which finds its cache.

    Args:
        shape: one of benchmarks.shapes.PARAMS.
    """
    path = default_folder(shape)
    write_random_checkpoint(path, shape)
    with tempfile.TemporaryDirectory() as kept:
        for which, bar in (("first", ""), ("second", ", at most 5")):
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": kept}
            command, started = [sys.executable, "-c", START, str(path)], time.perf_counter()
            run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            whole = time.perf_counter() - started
            built, one, several = map(float, run.stdout.split("TIMES")[1].split())
            print(
                f"{which} start: built in {built:.1f} s, then three tokens of one sequence in {one:.1f} s (with the "
                f"compiler{bar}), of two in {several:.1f} s; the process, imports and all, {whole:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    fire.Fire({"everything": everything, "starts": starts} if len(sys.argv) > 1 else everything)
