"""The base of a run: a checkpoint's weights as parameters. All of them learn, or they are frozen beside an adapter.

Quantised matrices stay quantised and let gradients through. Knows nothing of data or optimizers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llama import parallel
from llama.adapters import base_digests
from llama.checkpoint import Checkpoint, build_model, open_checkpoint
from llama.checkpoint.save import whole_parameter
from llama.layers.layouts import Layout
from llama.layers.linear import Linear
from llama.model import Transformer
from llama.tokenizer import Tokenizer
from llama.training.options import Options


@dataclass
class Base:
    """An open checkpoint; `dtype` is that of the computation. An adapter stores `digests` to recognise its base."""

    path: Path
    dtype: torch.dtype
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    digests: dict[str, str]


def open_base(path: Path, tokenizer_path: str | None, options: Options) -> Base:
    """Opens the checkpoint to train; loads nothing yet.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`; the checkpoint is quantised, and its weights should learn
            or be split over ranks; its vocabulary cannot be split evenly; the adapter's rank exceeds its dim.
    """
    tokenizer, checkpoint = open_checkpoint(path, tokenizer_path, options.max_seq_len)
    n_ranks = dist.get_world_size() // parallel.n_replicas()
    if checkpoint.quantization:
        found = f"{path} is quantised to {checkpoint.quantization}"
        if options.lora_rank is None or options.head is not None:
            raise ValueError(
                f"{found}, and rounded matrices cannot learn: expected the checkpoint that it was made from, or an "
                "adapter beside it (--lora_rank, without --head)"
            )
        if n_ranks > 1:
            raise ValueError(
                f"{found}, and quantised matrices carry no gradients between processes: expected "
                "--model_parallel_size 1, with which the processes are replicas"
            )
    if options.lora_rank is not None and options.lora_rank > checkpoint.args.dim:
        raise ValueError(f"lora_rank = {options.lora_rank}: expected at most {checkpoint.args.dim}, the model's dim")
    if checkpoint.args.vocab_size % n_ranks:
        raise ValueError(
            f"a vocabulary of {checkpoint.args.vocab_size:,} over {n_ranks} processes: expected a "
            "--model_parallel_size that divides it, because gradients are gathered in equal parts"
        )
    is_exact = checkpoint.dtype == torch.float32 and not checkpoint.quantization
    dtype = parallel.dtype_by_name(options.dtype) or (torch.float32 if is_exact else torch.bfloat16)
    return Base(path, dtype, tokenizer, checkpoint, base_digests(checkpoint))


def load_model(base: Base, options: Options, device: torch.device) -> Transformer:
    """Loads the model: in float32 if its weights learn, or frozen, in the dtype of the computation, for an adapter.

    Raises MemoryError if the device has no room for it.
    """
    learns = options.lora_rank is None
    model, _ = build_model(base.checkpoint, torch.float32 if learns else base.dtype, device, train=learns, alone=True)
    model.cache = None
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and module.layout is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, FrozenMatrix(module.layout))
    return model


class FrozenMatrix(nn.Module):
    """A quantised matrix, a constant, that lets the gradient of its input through."""

    layout = None  # for `multiply_together`, which asks whether matrices are laid out together

    def __init__(self, matrix: Layout):
        super().__init__()
        self.matrix = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenProduct.apply(x, self.matrix)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: Layout) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.matrix.to_dense().to(gradient.dtype), None


@torch.no_grad()
def weights(model: Transformer) -> dict[str, torch.Tensor]:
    """This rank's part of each weight by Meta's name, with its adapter added. All processes call this."""
    found: dict[str, torch.Tensor] = {name: p for name, p in model.named_parameters() if ".lora." not in name}
    for name, module in model.named_modules():
        if (lora := getattr(module, "lora", None)) is not None:
            a, b = whole_parameter(lora.a), whole_parameter(lora.b)
            found[f"{name}.weight"] = whole_parameter(module.weight).float() + lora.scale * (b @ a)
    return found
