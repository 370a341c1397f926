"""Draws answers to sums, keeps the right ones, learns from them, and then asks other sums.

python example_rejection_finetuning.py            # the embedded demo checkpoint, some minutes on two cores

Rejection sampling fine-tuning as in Touvron et al. 2023 (arXiv 2307.09288, section 3.2.3) and Yuan et al. 2023 (arXiv
2308.01825): each round draws answers with the weights of the round before, and trains an adapter on top of them.
"""

import json
import random
import re
import time
from pathlib import Path

import fire

from demo.corpus import TEST_PAIRS
from llama import Llama
from llama.adapters import merge
from llama.rejection_sampling.draw import rejection_sample
from llama.training import Options, finetune

DEMO = Path(__file__).parent / "demo" / "checkpoint"
TEMPERATURES = (0.0, 0.6, 1.2, 1.8)
Row = dict


def check(row: Row, answers: list[dict]) -> list[float]:
    """The scorer: 1 for each answer whose last number is the sum, else 0."""
    found = [re.findall(r"\d+", answer["text"]) for answer in answers]
    return [float(bool(numbers) and int(numbers[-1]) == row["sum"]) for numbers in found]


def sums(n: int, seed: int, unseen: bool) -> list[Row]:
    """n different sums of two-digit numbers, on which the embedded model was never trained (`unseen`), or was."""
    held_out = set(TEST_PAIRS)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if ((a, b) in held_out) == unseen]
    pairs = random.Random(seed).sample(pairs, n)
    return [{"messages": [{"role": "user", "content": f"What is {a} + {b}?"}], "sum": a + b} for a, b in pairs]


def accuracies(llama: Llama, rows: list[Row], seed: int) -> dict[float, float]:
    """The share of right single answers at each temperature."""
    found = {}
    for temperature in TEMPERATURES:
        answers = llama.chat_completion(
            [row["messages"] for row in rows], temperature=temperature, top_p=1.0, max_gen_len=64, seed=seed
        )
        scores = [check(row, [{"text": a["generation"]["content"]}])[0] for row, a in zip(rows, answers)]
        found[temperature] = sum(scores) / len(scores)
    return found


def write_right_answers(llama: Llama, rows: list[Row], n: int, temperature: float, seed: int, path: Path) -> int:
    """Draws n answers to each sum and writes the right ones as dialogs. Returns their number."""
    results = rejection_sample(llama, rows, check, n, temperature=temperature, top_p=1.0, max_gen_len=64, seed=seed)
    n_right = 0
    with path.open("w") as file:
        for row, result in zip(rows, results):
            for answer in [a["text"] for a in result["answers"] if a["score"] == 1]:
                dialog = [*row["messages"], {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": dialog}) + "\n")
                n_right += 1
    return n_right


def plot(path: Path, curves: dict[str, dict[float, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        axis.plot(list(curve), [100 * share for share in curve.values()], "o-", label=name)
    axis.set_xlabel("temperature")
    axis.set_ylabel("right answers to unseen sums (%)")
    axis.legend()
    figure.savefig(path, dpi=120)


def main(
    out: str = "rejection-finetuning",
    rounds: int = 2,
    n: int = 16,
    n_prompts: int = 100,
    n_unseen: int = 200,
    temperature: float = 1.8,
    epochs: float = 2,
    lora_rank: int = 16,
    lr: float = 7e-4,
    seed: int = 1,
):
    """Prints and plots the accuracy of single answers before and after each round.

    Args:
        out: a directory to make, for data, adapters, the merged checkpoints and accuracy.png.
        rounds: the rounds of drawing and learning.
        n: answers to each sum.
        n_prompts: sums in each round.
        n_unseen: other sums, for the accuracy.
        temperature: of the answers drawn; so high that a single answer is often wrong.
        epochs: passes over the right answers in the first round; round k has a k-th of it.
        lora_rank: of the adapter.
        lr: the largest learning rate of the first round; round k has a k-th of it.
        seed: another seed gives other sums and answers.
    """
    started, folder = time.time(), Path(out)
    folder.mkdir(parents=True)  # first, because it raises if the directory exists
    rows, unseen = sums(rounds * n_prompts, seed, unseen=False), sums(n_unseen, seed, unseen=True)
    ckpt_dir = DEMO
    curves = {}
    for number in range(rounds + 1):
        llama = Llama.build(ckpt_dir, max_seq_len=256, max_batch_size=64)
        name = "before" if number == 0 else f"after round {number}"
        curves[name] = accuracies(llama, unseen, seed)
        shares = ", ".join(f"{share:.1%} at {t:g}" for t, share in curves[name].items())
        print(f"{name}: {shares} ({time.time() - started:.0f} s)", flush=True)
        if number == rounds:
            break
        adapter, merged = (folder / f"{what}-{number + 1}" for what in ("adapter", "checkpoint"))
        data = folder / f"right-{number + 1}.jsonl"
        asked = rows[number * n_prompts : (number + 1) * n_prompts]
        n_right = write_right_answers(llama, asked, n, temperature, seed + number, data)
        print(f"round {number + 1}: {n_right} of {n * len(asked)} answers are right", flush=True)
        # Later rounds have more right answers and less to learn: small steps keep the model's other abilities.
        # The loss uses the temperature at which the answers were drawn, because they are samples of that distribution.
        options = Options(
            **{"max_seq_len": 256, "batch_tokens": 2048, "epochs": epochs / (number + 1), "lora_rank": lora_rank},
            **{"lr": lr / (number + 1), "temperature": temperature, "seed": seed},
        )
        finetune(data, adapter, ckpt_dir, options)
        merge(ckpt_dir, adapter, merged)
        ckpt_dir = merged
    plot(folder / "accuracy.png", curves)
    print(f"{folder / 'accuracy.png'} shows it; {time.time() - started:.0f} seconds")


if __name__ == "__main__":
    fire.Fire(main)
