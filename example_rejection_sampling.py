"""Draws many answers to two-digit sums, checks each, and shows how much drawing more of them helps.

python example_rejection_sampling.py                                        # the embedded demo checkpoint
torchrun --nproc_per_node 1 example_rejection_sampling.py \
    --ckpt_dir Meta-Llama-3-8B-Instruct/ --max_batch_size 16 --temperature 1
"""

import random
import re
from pathlib import Path

import fire

from llama import Llama
from llama.rejection_sampling.best_of_n import Summary
from llama.rejection_sampling.draw import rejection_sample

DEMO = Path(__file__).parent / "demo" / "checkpoint"


def check(row: dict, answers: list[dict]) -> list[float]:
    """The scorer: 1 for each answer whose last number is the sum, else 0."""
    found = [re.findall(r"\d+", answer["text"]) for answer in answers]
    return [float(bool(numbers) and int(numbers[-1]) == row["sum"]) for numbers in found]


def main(
    ckpt_dir: str = str(DEMO),
    tokenizer_path: str | None = None,
    n: int = 16,
    n_prompts: int = 40,
    temperature: float = 1.8,
    top_p: float = 1.0,
    max_seq_len: int = 256,
    max_batch_size: int = 32,
    max_gen_len: int = 64,
    seed: int = 1,
):
    """Prints sums with the best of n answers to each, and the mean score of the best of 1, 2, 4, … answers.

    Args:
        ckpt_dir: a directory with params.json and consolidated.NN.pth; the embedded checkpoint by default.
        tokenizer_path: tokenizer.model of ckpt_dir by default.
        n: answers to each sum.
        n_prompts: how many sums.
        temperature: of sampling; so high that a single answer is often wrong.
        top_p: samples from the most likely tokens that hold this much of the probability.
        max_seq_len: room for a sum and its answer, in tokens.
        max_batch_size: how many answers are drawn at a time.
        max_gen_len: the most tokens of an answer.
        seed: another seed gives other answers.
    """
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)

    rng = random.Random(0)
    pairs = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(n_prompts)]
    # Besides its messages, a row has what the scorer needs.
    rows = [{"messages": [{"role": "user", "content": f"What is {a} + {b}?"}], "sum": a + b} for a, b in pairs]
    results = rejection_sample(
        llama, rows, check, n, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len, seed=seed
    )

    for row, result in list(zip(rows, results))[:4]:
        print(f"{row['messages'][0]['content']}\n> {result['best']}")
        print(f"({sum(result['scores']):.0f} of {n} answers are right)\n")
    print(Summary(groups=[result["scores"] for result in results]).text())


if __name__ == "__main__":
    fire.Fire(main)
