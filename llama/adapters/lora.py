"""Low-rank additions to the matrices of a model: y = W x + scale * B A x. W stays, A and B learn.

Split over ranks as W is: with the rows of W the rows of B are split, with the columns of W the columns of A. Knows
nothing of files.
"""

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region, reduce_from_model_parallel_region
from torch import nn

from llama.adapters.files import TARGETS, Adapter
from llama.checkpoint.meta import slice_of_rank
from llama.layers.linear import Linear, RowParallelLinear
from llama.model import Transformer
from llama.parallel import partition


class Lora(nn.Module):
    """The addition to one matrix.

    Args:
        a: [rank, in_features], or this rank's columns of it where the matrix is split by columns.
        b: [out_features, rank], or this rank's rows of it where the matrix is split by rows.
        scale: what B A is multiplied with.
        columns_are_split: which of the two it is.
        n_ranks: over how many ranks the matrix is split.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float, columns_are_split: bool, n_ranks: int):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.columns_are_split, self.n_ranks = scale, columns_are_split, n_ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # what the matrix gets -> what is added to its product
        hidden = F.linear(x.to(self.a.dtype), self.a)
        if self.n_ranks > 1:
            whole = reduce_from_model_parallel_region if self.columns_are_split else copy_to_model_parallel_region
            hidden = whole(hidden)
        return F.linear(hidden, self.b) * self.scale


def add_lora(
    model: Transformer,
    rank: int,
    scale: float,
    targets: tuple[str, ...] = TARGETS,
    generator: torch.Generator | None = None,
) -> None:
    """Freezes a model and adds an adapter to each of its target matrices, float32, which changes nothing at first.

    A is uniform in ±1/sqrt(in_features), as PEFT draws it, B is zero. Every rank draws the whole of A and keeps its
    part, so the adapter does not depend on the number of processes.

    Args:
        model: its matrices are named as Meta's.
        rank: of B A; at least 1.
        scale: alpha / rank, in LoRA's terms.
        targets: of TARGETS.
        generator: of A's random numbers, on the CPU.
    """
    model.requires_grad_(False)
    device = model.norm.weight.device
    for name, linear in target_matrices(model, targets):
        whole = linear.in_features
        a = torch.empty(rank, whole).uniform_(-(whole**-0.5), whole**-0.5, generator=generator)
        rows = linear.out_features
        if isinstance(linear, RowParallelLinear):
            start, stop = partition(whole, model.tok_embeddings.rank, linear.world_size)
            a = a[:, start:stop].contiguous()
        else:
            rows = linear.output_size_per_partition
            if name.endswith((".wk", ".wv")) and linear.world_size > model.args.n_kv_heads:
                raise ValueError(_too_many_ranks(linear.world_size, model.args.n_kv_heads))
        attach(linear, a.to(device), torch.zeros(rows, rank, device=device), scale)


def attach(linear: Linear, a: torch.Tensor, b: torch.Tensor, scale: float) -> Lora:
    """Adds B A to what a matrix computes, from now on; returns the module, which is the matrix's `lora`."""
    lora = Lora(a, b, scale, isinstance(linear, RowParallelLinear), linear.world_size)
    linear.lora = lora
    linear.register_forward_hook(_add_lora)
    return lora


def attach_adapter(model: Transformer, adapter: Adapter) -> None:
    """Adds an adapter of files beside the weights of a model, this rank's part of it; nothing of it learns."""
    for name, linear in target_matrices(model):
        weight = f"{name}.weight"
        if weight not in adapter.pairs:
            continue
        a, b = (part.float().to(model.norm.weight.device) for part in adapter.pairs[weight])
        rank, n_ranks = model.tok_embeddings.rank, linear.world_size
        split = a.shape[1] if isinstance(linear, RowParallelLinear) else b.shape[0]
        start, stop = slice_of_rank(weight, split, model.args, rank, n_ranks)
        if isinstance(linear, RowParallelLinear):
            a = a[:, start:stop].contiguous()
        else:
            b = b[start:stop].contiguous()
        attach(linear, a, b, adapter.scales[weight]).requires_grad_(False)


def target_matrices(model: nn.Module, targets: tuple[str, ...] = TARGETS) -> list[tuple[str, Linear]]:
    """(name, matrix) of every layer's target matrices, in the order of a pass."""
    names = [(name, module) for name, module in model.named_modules() if name.startswith("layers.")]
    return [(name, module) for name, module in names if name.rpartition(".")[2] in targets]


def _add_lora(linear: Linear, inputs: tuple, y: torch.Tensor) -> torch.Tensor:
    return y + linear.lora(inputs[0]).to(y.dtype)


def _too_many_ranks(n_ranks: int, n_kv_heads: int) -> str:
    return f"an adapter on keys and values over {n_ranks} processes: expected at most their {n_kv_heads} heads"
