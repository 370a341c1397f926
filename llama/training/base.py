"""The model that is to learn: a checkpoint's weights as parameters, whole or frozen beside an adapter's.

Quantised matrices stay as they are and let gradients through. Knows nothing of data or optimizers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama import parallel
from llama.adapters import Adapter, base_digests
from llama.checkpoint.loading import load_weights, make_trainable
from llama.checkpoint.open import open_checkpoint
from llama.checkpoint.save import gather_parts
from llama.layers.layouts import Layout
from llama.layers.linear import Linear
from llama.model import Transformer
from llama.tokenizer import Tokenizer


@dataclass
class Base:
    """A checkpoint and the model made of it.

    Attributes:
        checkpoint: what was read.
        digests: of the checkpoint, by which an adapter knows its base.
    """

    path: Path
    texts: Path  # the directory with the tokenizer's files
    dtype: torch.dtype  # of the computation
    tokenizer: Tokenizer
    checkpoint: Any
    model: Transformer
    digests: dict[str, str]


def load_base(
    path: Path,
    tokenizer_path: str | None,
    max_seq_len: int,
    device: torch.device,
    dtype: torch.dtype | None,
    lora_rank: int | None,
) -> Base:
    """Loads a checkpoint to be trained: all of it, or frozen for an adapter of some rank. Process groups are there.

    Args:
        dtype: of the computation; when None, float32 for a checkpoint in it and bfloat16 for others. Weights that learn
            are float32 whatever it is; frozen ones have it.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`; the checkpoint is quantised, and there is no adapter or it
            is to be split over ranks.
    """
    with parallel.fail_together():
        tokenizer, checkpoint = open_checkpoint(path, tokenizer_path, max_seq_len, 1)
        if checkpoint.quantization and lora_rank is None:
            raise ValueError(
                f"{path} is quantised to {checkpoint.quantization}, and codes do not learn: expected the checkpoint it "
                "was made of, or an adapter beside it (--lora_rank)"
            )
        if dtype is None:
            dtype = (
                torch.float32 if not checkpoint.quantization and checkpoint.dtype == torch.float32 else torch.bfloat16
            )
        with torch.device("meta"):
            model = Transformer(checkpoint.args)
        if checkpoint.quantization and model.output.world_size > 1:
            raise ValueError(
                f"{path} is quantised, and quantised matrices carry no gradients between processes: expected "
                "--model_parallel_size 1, with which the processes are replicas"
            )
        if checkpoint.args.vocab_size % model.output.world_size:
            raise ValueError(
                f"a vocabulary of {checkpoint.args.vocab_size:,} over {model.output.world_size} processes: expected a "
                "--model_parallel_size that divides it, for gradients are gathered in equal parts"
            )
        load_weights(model, checkpoint, torch.float32 if lora_rank is None else dtype, device, alone=True)
        make_trainable(model)
    if checkpoint.quantization:
        freeze_quantized(model)
    texts = path if tokenizer_path is None else Path(tokenizer_path).parent
    return Base(path, texts, dtype, tokenizer, checkpoint, model, base_digests(checkpoint))


class FrozenMatrix(nn.Module):
    """A quantised matrix that lets the gradient of its input through: what it multiplies with is a constant."""

    layout = None  # for `products`, which asks whether matrices are laid out together

    def __init__(self, linear: Linear):
        super().__init__()
        self.matrix = linear.layout
        self.in_features, self.world_size = linear.in_features, linear.world_size
        self.out_features = self.output_size_per_partition = self.matrix.out_features

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


def freeze_quantized(model: Transformer) -> None:
    """Puts a FrozenMatrix in the place of each quantised matrix."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and module.layout is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, FrozenMatrix(module))


def adapter_tensors(model: Transformer, scale: float, digests: dict[str, str]) -> Adapter:
    """The whole of a model's adapter, on every rank. All processes call this."""
    args, group = model.args, model.tok_embeddings.group
    pairs, scales = {}, {}
    for name, module in model.named_modules():
        if (lora := getattr(module, "lora", None)) is None:
            continue
        weight = f"{name}.weight"
        a, b = (_whole(part) for part in (lora.a, lora.b))
        if lora.n_ranks > 1 and lora.columns_are_split:
            a = gather_parts(weight, a, 1, module.in_features, args, group)
        elif lora.n_ranks > 1:
            size = args.n_kv_heads * args.head_dim if name.endswith((".wk", ".wv")) else module.out_features
            b = gather_parts(weight, b, 0, size, args, group)
        pairs[weight], scales[weight] = (a.cpu(), b.cpu()), scale
    return Adapter(Path(), pairs, scales, digests)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter that FSDP may have sharded."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


@torch.no_grad()
def weights(model: Transformer) -> dict[str, torch.Tensor]:
    """This rank's part of each weight by Meta's name, with what adapters add to it."""
    found: dict[str, torch.Tensor] = {name: p for name, p in model.named_parameters() if ".lora." not in name}
    for name, module in model.named_modules():
        if (lora := getattr(module, "lora", None)) is not None:
            a, b = _whole(lora.a), _whole(lora.b)
            found[f"{name}.weight"] = _whole(module.weight).float() + lora.scale * (b @ a)
    return found
