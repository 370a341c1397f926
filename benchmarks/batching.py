"""Batches of unequal prompts: useful tokens/s of `Llama`, of Meta's way of batching, and of Transformers' `generate`.

    python -m benchmarks.batching [--rounds 3] [--n_prompts 32] [--rows 8]

Random float32 weights of a 110M shape; prompts of 16 to 256 tokens, each asking for 16 to 128 new ones (greedy, no stop
tokens), 8 rows at a time. Useful tokens are those asked for. The three take turns; medians are printed.
"""

import statistics
import tempfile
import time
from pathlib import Path

import fire
import torch

from benchmarks.shapes import write_small_checkpoint
from llama import Llama
from llama.checkpoint.convert import convert

SHAPE = {"dim": 768, "n_layers": 12, "n_heads": 12, "vocab_size": 32_000, "multiple_of": 256}


def workload(n_prompts: int) -> tuple[list[list[int]], list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 257, (n_prompts,), generator=generator).tolist()
    prompts = [torch.randint(0, 32_000, (n,), generator=generator).tolist() for n in lengths]
    return prompts, torch.randint(16, 129, (n_prompts,), generator=generator).tolist()


def run_ours(llama: Llama, prompts: list[list[int]], wanted: list[int], rows: int) -> list[list[int]]:
    return llama.generate(prompts, wanted, temperature=0)[0]


@torch.inference_mode()
def run_metas_way(llama: Llama, prompts: list[list[int]], wanted: list[int], rows: int) -> list[list[int]]:
    """`rows` prompts at a time: the length of the shortest is prefilled, then all go token by token to the longest.

    The matrix products are PyTorch's own, as in Meta's code.
    """
    answers = []
    for first in range(0, len(prompts), rows):
        group, budgets = prompts[first : first + rows], wanted[first : first + rows]
        lengths = [len(prompt) for prompt in group]
        total = max(lengths) + max(budgets)
        tokens = torch.full((len(group), total), -1)
        for row, prompt in enumerate(group):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        is_prompt = tokens != -1
        done = 0
        for position in range(min(lengths), total):
            logits = llama.model(tokens[:, done:position], done)[:, -1]
            tokens[:, position] = torch.where(is_prompt[:, position], tokens[:, position], logits.argmax(-1))
            done = position
        answers += [tokens[row, n : n + budget].tolist() for row, (n, budget) in enumerate(zip(lengths, budgets))]
    return answers


@torch.inference_mode()
def run_transformers(model, prompts: list[list[int]], wanted: list[int], rows: int) -> list[list[int]]:
    answers = []
    for first in range(0, len(prompts), rows):
        group, budgets = prompts[first : first + rows], wanted[first : first + rows]
        width = max(len(prompt) for prompt in group)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in group])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in group])
        new = max(budgets)
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        answers += [row[width : width + budget].tolist() for row, budget in zip(output, budgets)]
    return answers


def main(rounds: int = 3, n_prompts: int = 32, rows: int = 8) -> None:
    """Prints a table.

    Args:
        rounds: how many turns each has.
        n_prompts: how many prompts.
        rows: sequences at a time.
    """
    prompts, wanted = workload(n_prompts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small_checkpoint(folder, SHAPE)
        llama = Llama.build(folder, max_seq_len=512, max_batch_size=rows, device="cpu")
        llama.tokenizer.stop_tokens = set()
        plain = Llama.build(folder, max_seq_len=512, max_batch_size=rows, device="cpu")  # never packed for decoding
        runs = {"ours": (run_ours, llama), "Meta's way": (run_metas_way, plain)}
        try:
            from transformers import LlamaForCausalLM

            convert(folder, folder / "hf", "hf")
            runs["Transformers"] = (run_transformers, LlamaForCausalLM.from_pretrained(folder / "hf"))
        except ImportError:
            print("Transformers is not installed: pip install transformers safetensors to compare with it")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    answers = {}
    for _ in range(rounds):
        for name, (run, model) in runs.items():
            started = time.perf_counter()
            answers[name] = run(model, prompts, wanted, rows)
            seconds[name].append(time.perf_counter() - started)
    ours = statistics.median(seconds["ours"])
    print(f"{n_prompts} prompts, {sum(map(len, prompts))} tokens in, {sum(wanted)} wanted, {rows} rows at a time")
    for name, times in seconds.items():
        median = statistics.median(times)
        same = sum(a == b for a, b in zip(answers[name], answers["ours"]))
        print(f"{name:14} {sum(wanted) / median:8.1f} useful tokens/s   ours is {median / ours:5.2f} x", end="   ")
        print(f"{same} of {n_prompts} answers are ours")


if __name__ == "__main__":
    fire.Fire(main)
