"""Tokens/s of fine-tuning, and of a plain loop with Transformers on the same batches, optimizer and precision.

    python -m benchmarks.training                       # a shape of 110 million parameters, random weights
    python -m benchmarks.training --shape llama-3.2-1b --dtypes bfloat16 --device cuda
    python -m benchmarks.training --shape llama-3.1-8b --dtypes bfloat16 --device cuda --lora_rank 16

The two take turns, step by step, so that other load on the machine hits both. The batches have texts of unequal lengths
in which all tokens are learned. For Transformers they are padded as by its collator; here they are padded ("padded") or
packed. Tokens are those of the texts, without padding. Memory is the peak of the weights that learn, their gradients,
the optimizer's state and a step's activations; the other model, which waits, does not count.
"""

import ctypes
import gc
import json
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import fire
import torch
import torch.nn.functional as F

from llama import ModelArgs, Transformer, parallel
from llama.checkpoint.config import config_json
from llama.training.batches import IGNORED, Batch, collate
from llama.training.examples import Document, Example
from llama.training.lora import add_lora
from llama.training.loss import LanguageLoss
from llama.training.report import measured_peak
from llama.training.trainer import Trainer, adamw

SHAPES = {
    "tiny": {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 16, "vocab_size": 512},
    "110m": {"dim": 768, "n_layers": 12, "n_heads": 12, "multiple_of": 256, "vocab_size": 32000},
    "llama-3.2-1b": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 256}
    | {"ffn_dim_multiplier": 1.5, "vocab_size": 128256, "rope_theta": 5e5, "tied_embeddings": True},
    "llama-3.1-8b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024}
    | {"ffn_dim_multiplier": 1.3, "vocab_size": 128256, "rope_theta": 5e5},
}


def documents(n_tokens: int, longest: int, vocab_size: int, seed: int) -> list[Example]:
    """Texts of unequal lengths, like answers: most are short, a few have `longest` tokens."""
    rng, found, left = random.Random(seed), [], n_tokens
    while left > 1:
        length = max(2, min(left, longest, round(rng.lognormvariate(4.4, 0.9))))
        ids = [rng.randrange(vocab_size) for _ in range(length)]
        found.append(Example((Document(ids, [False] + [True] * (length - 1)),)))
        left -= length
    return found


def ours(args: ModelArgs, device: torch.device, dtype: torch.dtype, lora_rank: int | None) -> Trainer:
    with torch.device(device):
        model = Transformer(args)
    model.init_weights(generator=torch.Generator(device).manual_seed(0))
    if lora_rank is not None:
        model.to(dtype)
        add_lora(model, lora_rank, 2.0, generator=torch.Generator().manual_seed(0))
    module = LanguageLoss(model.to(device))
    return Trainer(module, [adamw(module, 0.0)], lambda step: 1e-5, 1.0, dtype)


def theirs(
    args: ModelArgs, device: torch.device, dtype: torch.dtype, lora_rank: int | None
) -> tuple[Callable[[Batch], float], torch.nn.Module, torch.optim.Optimizer]:
    """A plain loop: its step (forward with SDPA, its own loss, clipping, fused AdamW), its model and optimizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{k: v for k, v in config_json(args, 1, 2, "float32").items() if k != "architectures"})
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.float32 if lora_rank is None else dtype).train()
    if lora_rank is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=lora_rank, target_modules="all-linear"), autocast_adapter_dtype=True)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5, fused=True)

    def step(batch: Batch) -> float:
        batch = batch.to(device)
        padding = torch.arange(batch.tokens.shape[1], device=device) > batch.ends[:, 1:].to(device)
        labels = F.pad(batch.targets, (1, 0), value=IGNORED)[:, :-1]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=batch.tokens, attention_mask=(~padding).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, model, optimizer


def n_bytes_kept(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers and optimizer state, which stay in memory between steps."""
    kept = {*model.parameters(), *model.buffers()}
    state = [value for values in optimizer.state.values() for value in values.values()]
    return sum(tensor.nbytes for tensor in [*kept, *state] if isinstance(tensor, torch.Tensor))


class Growth:
    """The most bytes by which this process grew inside a `with`; on CUDA, by which PyTorch's allocations grew."""

    def __init__(self, device: torch.device):
        self.device, self.n_bytes = device, 0

    def __enter__(self) -> "Growth":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:  # returns freed memory, and resets the kernel's peak: proc_pid_clear_refs(5)
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = self._highest()
        return self

    def __exit__(self, *_: object) -> None:
        self.n_bytes = max(self.n_bytes, self._highest() - self._before)

    def _highest(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main(
    shape: str = "110m",
    dtypes: str | tuple = "float32,bfloat16",
    device: str = "cpu",
    batch_tokens: int = 1024,
    longest: int = 512,
    steps: int = 5,
    lora_rank: int | None = None,
) -> None:
    """Prints tokens/s of each, by the median step, and how they compare.

    Args:
        shape: a name of SHAPES.
        dtypes: of the computation; weights that learn are float32.
        device: "cpu" or "cuda".
        batch_tokens: tokens of a step, in one pass.
        longest: tokens of the longest text, and of a packed row.
        steps: how many steps are timed, after one that is not.
        lora_rank: trains an adapter of this rank instead of all weights.
    """
    where = parallel.pick_device(device)
    parallel.initialize(1, where)
    args = ModelArgs(**SHAPES[shape], max_seq_len=longest, max_batch_size=1)
    for name in dtypes.split(",") if isinstance(dtypes, str) else dtypes:
        dtype = getattr(torch, name)
        examples = [documents(batch_tokens, longest, args.vocab_size, seed) for seed in range(steps + 1)]
        trainer = ours(args, where, dtype, lora_rank)
        n_weights = sum(p.numel() for p in trainer.model.parameters())
        reference, *kept_by_theirs = theirs(args, where, dtype, lora_rank)
        runs: dict[str, Callable[[int], object]] = {
            "transformers, padded": lambda i, e=examples, step=reference: step(collate(e[i], longest, pack=False)),
            "llama, padded": lambda i, e=examples, t=trainer: t.step(i, [collate(e[i], longest, pack=False)]),
            "llama, packed": lambda i, e=examples, t=trainer: t.step(i, [collate(e[i], longest)]),
        }
        seconds: dict[str, list[float]] = {run: [] for run in runs}
        growth = {run: Growth(where) for run in runs}
        for i in range(steps + 1):
            for run, step in runs.items():
                with growth[run]:
                    started = time.perf_counter()
                    step(i)
                    if where.type == "cuda":
                        torch.cuda.synchronize()
                    seconds[run].append(time.perf_counter() - started)
                if i == 0:  # the first step makes the optimizer's state, which `n_bytes_kept` counts
                    growth[run].n_bytes = 0
        kept = {run: (trainer.model, trainer.optimizers[0]) if "llama" in run else kept_by_theirs for run in runs}
        gigabytes = {run: (n_bytes_kept(*kept[run]) + growth[run].n_bytes) / 1e9 for run in runs}
        rates = {run: batch_tokens / statistics.median(times[1:]) for run, times in seconds.items()}
        share = (6 if lora_rank is None else 4) * n_weights / measured_peak(where, dtype)
        what = "all weights" if lora_rank is None else f"LoRA of rank {lora_rank}"
        print(f"{shape} ({n_weights / 1e6:.0f} million), {name}, {what}, {batch_tokens} tokens a step on {where}")
        for run, rate in rates.items():
            ratio = rate / rates["transformers, padded"]
            speed = f"{rate:8.0f} tokens/s  {ratio:5.2f} x transformers  {rate * share:4.0%} of the peak"
            print(f"  {run:22} {speed}  {gigabytes[run]:5.2f} GB")
        filled = [collate(e, longest, pack=False) for e in examples]
        share_of_padding = 1 - sum(sum(x.n_tokens for x in e) for e in examples) / sum(b.tokens.numel() for b in filled)
        gain = rates["llama, packed"] / rates["llama, padded"]
        print(f"  padding takes {share_of_padding:.0%} of a padded batch; packed is {gain:.2f} x padded")
        result = {"shape": shape, "dtype": name, "lora_rank": lora_rank, "tokens_per_s": rates, "gigabytes": gigabytes}
        print(json.dumps(result), flush=True)
        del trainer, reference, runs, kept, kept_by_theirs
        gc.collect()


if __name__ == "__main__":
    fire.Fire(main)
