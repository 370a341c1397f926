"""Time of one sampling step at a vocabulary of 128,256, beside a full sort of the same probabilities.

    python -m benchmarks.sampling [--rows 8] [--top_p 0.9] [--rounds 30]

The logits fall off like a language model's: the probability of the i-th most likely token is about 1 / i² (Zipf).
"""

import statistics
import time

import fire
import torch

from llama.sampling import next_tokens


def median_ms(run, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def main(
    rows: int = 8, vocab_size: int = 128_256, top_p: float = 0.9, temperature: float = 0.6, rounds: int = 30
) -> None:
    """Prints medians in milliseconds."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(rows)]) + 1
    logits = -2 * ranks.float().log() + 0.1 * torch.randn(rows, vocab_size, generator=generator)
    columns = torch.tensor([temperature, 0, top_p, 0], dtype=torch.float64)[:, None].expand(4, rows)
    seeds = torch.arange(rows)
    probs = torch.softmax(logits / temperature, dim=-1)
    ours = median_ms(lambda: next_tokens(logits, seeds, *columns), rounds)
    sort = median_ms(lambda: probs.sort(dim=-1, descending=True), rounds)
    print(f"{rows} rows of {vocab_size:,}, top_p {top_p}: {ours:.2f} ms; a full sort alone: {sort:.2f} ms")


if __name__ == "__main__":
    fire.Fire(main)
