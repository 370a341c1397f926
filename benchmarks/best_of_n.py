"""Best of n, estimated and by brute force: two-digit sums, an exact checker, the embedded checkpoint.

    python -m benchmarks.best_of_n [--n_prompts 40] [--n_samples 64] [--temperature 1.9]

The estimate uses one set of answers to each sum. The brute force divides another set into groups of n and takes the
best of each group. The difference is computed for each sum; its standard error is that of the mean over the sums.
"""

import math
import random
from pathlib import Path

import fire

from example_rejection_sampling import check
from llama import Llama
from llama.rejection_sampling.best_of_n import best_of_n, mean_and_error
from llama.rejection_sampling.draw import rejection_sample

DEMO = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"


def compare(
    llama: Llama, n_prompts: int, n_samples: int, temperature: float, ns: tuple[int, ...] = (1, 4, 16), seed: int = 0
) -> list[dict[str, float]]:
    """For each n: the estimated and the real accuracy of the best of n, and their difference with standard errors."""
    rng = random.Random(seed)
    pairs = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(n_prompts)]
    rows = [{"messages": [{"role": "user", "content": f"What is {a} + {b}?"}], "sum": a + b} for a, b in pairs]
    options = {"temperature": temperature, "top_p": 1.0, "max_gen_len": 64}
    pool, fresh = (
        [r["scores"] for r in rejection_sample(llama, rows, check, n_samples, seed=s, **options)]
        for s in (2 * seed + 1, 2 * seed + 2)
    )
    table = []
    for n in ns:
        estimated = [best_of_n(scores, n) for scores in pool]
        real = [
            math.fsum(max(scores[i : i + n]) for i in range(0, n_samples, n)) / (n_samples // n) for scores in fresh
        ]
        row = {"n": n, "estimated": mean_and_error(estimated)[0], "real": mean_and_error(real)[0]}
        row["difference"], row["error"] = mean_and_error([e - r for e, r in zip(estimated, real)])
        table.append(row)
    return table


def main(n_prompts: int = 40, n_samples: int = 64, temperature: float = 1.9, seed: int = 0) -> None:
    """Prints the table.

    Args:
        n_prompts: how many sums.
        n_samples: answers to each sum, in each of the two sets; a multiple of 16.
        temperature: of the sampling.
        seed: of the sums and the answers.
    """
    llama = Llama.build(DEMO, max_seq_len=256, max_batch_size=32, device="cpu", dtype="float32")
    for row in compare(llama, n_prompts, n_samples, temperature, seed=seed):
        in_errors = abs(row["difference"]) / row["error"] if row["error"] else 0.0
        print(
            f"best of {row['n']:2}: estimated {row['estimated']:.4f}, by brute force {row['real']:.4f}, "
            f"difference {row['difference']:+.4f} = {in_errors:.2f} standard errors"
        )


if __name__ == "__main__":
    fire.Fire(main)
