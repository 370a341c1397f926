"""Two checkouts of this repository side by side: did a change make anything slower?

    git worktree add ../before OLD_COMMIT
    python -m benchmarks.before_and_after --before ../before [--rounds 5] [--shape llama-3.2-1b]

They take turns. Each turn is a process of its own that measures twice, because processes differ: where its memory lies
makes one up to a fifth faster than the next. Printed are the medians and the ratio of every figure: decoding at one and
at eight rows, prefill, a batch of unequal prompts through `generate`, and memory. At the end of its turn, the second
checkout puts hooks on every block and measures again, from the first answer on.
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
import json, random, statistics, sys, time
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
for line in sys.stdin:
    if line == "hooks\\n":
        for block in llama.model.layers:
            block.register_forward_hook(lambda module, inputs, output: output + 0)
    one, many = [prompt(16)], [prompt(16) for _ in range(8)]
    unequal = [prompt(draw.randint(8, 64)) for _ in range(16)]
    budgets = [draw.randint(4, 24) for _ in unequal]
    figures = {
        "prefill of 512, tok/s": 512 / statistics.median(seconds([prompt(512)], [1]) for _ in range(7)),
        "decode, 1 row, tok/s": 24 / seconds(one, [24]),
        "decode, 8 rows, tok/s": 128 / seconds(many, [16] * 8),
        "16 unequal prompts, tok/s": sum(budgets) / seconds(unequal, budgets),
        "memory, GB": int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e9,
    }
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
    checkouts = {"before": Path(before).resolve(), "after": ROOT}
    found: dict[str, list[dict]] = {name: [] for name in checkouts}
    with_hooks: list[dict] = []
    for i in range(rounds):
        for name in list(checkouts)[:: 1 if i % 2 == 0 else -1]:
            orders = ["go", "go", *(["hooks"] if name == "after" else [])]
            command = [sys.executable, "-c", WORKER, str(default_folder(shape)), dtype, quantize]
            run = subprocess.run(
                command,
                cwd=checkouts[name],
                input="\n".join([*orders, ""]),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            figures = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
            found[name] += figures[:2]
            with_hooks += figures[2:]
    print(f"{shape}, {dtype}{'' if quantize == 'none' else ' ' + quantize}, medians of {rounds} rounds in turn")
    for figure in found["before"][0]:
        old, new, hooked = (
            statistics.median(measured[figure] for measured in several) for several in (*found.values(), with_hooks)
        )
        ratio = f"before {old:8.2f}   after {new:8.2f}   ratio {new / old:.3f}"
        print(f"{figure:28} {ratio}   with hooks on all blocks {hooked:8.2f}")


if __name__ == "__main__":
    fire.Fire(main)
