"""Two checkouts of this repository side by side: did a change make anything slower?

    git worktree add ../before OLD_COMMIT
    python -m benchmarks.before_and_after --before ../before [--rounds 5] [--shape llama-3.2-1b]

Each checkout has its own process, which keeps its model; they measure in turn. Prints medians and ratios of decoding at
one and at eight rows, prefill, a batch of unequal prompts through `generate`, and memory. At the end the second puts
hooks on every block and measures once more.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import fire

from benchmarks.shapes import default_folder, write_random_checkpoint

ROOT = Path(__file__).resolve().parents[1]

# Uses only `Llama.build` and `generate`, which every version has. Measures once for each line on stdin; for the line
# "hooks" it puts hooks on first, which older versions may not support.
WORKER = """
import json, random, sys, time
from llama import Llama
folder, dtype, quantize = sys.argv[1:4]
llama = Llama.build(folder, None, 1024, 8, device="cpu", dtype=dtype, quantize=None if quantize == "none" else quantize)
llama.tokenizer.stop_tokens = set()
draw = random.Random(0)

def prompt(n):
    return [draw.randrange(1000) for _ in range(n)]

def seconds(prompts, budgets):
    started = time.perf_counter()
    llama.generate(prompts, budgets, temperature=0)
    return time.perf_counter() - started

seconds([prompt(8)], [4])  # packs the matrices
print("ready", flush=True)
for line in sys.stdin:
    if line == "hooks\\n":
        for block in llama.model.layers:
            block.register_forward_hook(lambda module, inputs, output: output + 0)
    one, many = [prompt(16)], [prompt(16) for _ in range(8)]
    unequal = [prompt(draw.randint(8, 64)) for _ in range(16)]
    budgets = [draw.randint(4, 24) for _ in unequal]
    figures = {
        "decode, 1 row, tok/s": 24 / seconds(one, [24]),
        "decode, 8 rows, tok/s": 128 / seconds(many, [16] * 8),
        "prefill of 512, tok/s": 512 / seconds([prompt(512)], [1]),
        "16 unequal prompts, tok/s": sum(budgets) / seconds(unequal, budgets),
        "memory, GB": int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e9,
    }
    draw.seed(0)
    print(json.dumps(figures), flush=True)
"""


def main(
    before: str, rounds: int = 5, shape: str = "llama-3.2-1b", dtype: str = "bfloat16", quantize: str = "none"
) -> None:
    """Prints a table.

    Args:
        before: the other checkout.
        rounds: how many turns each has.
        shape: of the model, random weights.
        dtype, quantize: as in `Llama.build`; "none" for no quantisation.
    """
    write_random_checkpoint(default_folder(shape), shape)
    workers = {}
    for name, folder in (("before", Path(before).resolve()), ("after", ROOT)):
        command = [sys.executable, "-c", WORKER, str(default_folder(shape)), dtype, quantize]
        workers[name] = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while "ready" not in workers[name].stdout.readline():
            pass
    found: dict[str, list[dict]] = {name: [] for name in workers}
    for i in range(rounds):
        for name in list(workers)[:: 1 if i % 2 == 0 else -1]:
            workers[name].stdin.write("go\n")
            workers[name].stdin.flush()
            found[name].append(json.loads(workers[name].stdout.readline()))
    workers["after"].stdin.write("hooks\n")
    workers["after"].stdin.flush()
    with_hooks = json.loads(workers["after"].stdout.readline())
    for worker in workers.values():
        worker.stdin.close()
    print(f"{shape}, {dtype}{'' if quantize == 'none' else ' ' + quantize}, medians of {rounds} rounds in turn")
    for figure in found["before"][0]:
        old, new = (statistics.median(round_[figure] for round_ in found[name]) for name in ("before", "after"))
        ratio = f"before {old:8.2f}   after {new:8.2f}   ratio {new / old:.3f}"
        print(f"{figure:28} {ratio}   with hooks on all blocks {with_hooks[figure]:8.2f}")


if __name__ == "__main__":
    fire.Fire(main)
