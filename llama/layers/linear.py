"""Matrices split over the ranks of a model: by rows, by columns, and the embedding table.

Knows nothing of Llama. The weights and their partitioning are fairscale's; the forward pass is our own while no
gradient is wanted, because fairscale's reduce cannot be compiled.
"""

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from torch import nn

from llama.layers.layouts import Layout
from llama.parallel import partition


class Linear(nn.Module):
    """A matrix: a parameter `weight` as a checkpoint has it, or rows of a layout made for fast products.

    Once laid out it has no parameter and takes no gradient; `state_dict` has the weight nevertheless.
    """

    weight: nn.Parameter | None
    layout: Layout | None = None  # may hold other matrices too,
    rows: slice | None = None  # and these are this one's,
    widths: tuple[int, ...] = ()  # of all of them

    def dense(self) -> torch.Tensor:
        """The matrix as an ordinary tensor; after quantisation, the values that stand for it."""
        return self.weight.detach() if self.layout is None else self.layout.to_dense()[self.rows]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout is not None:
            destination[prefix + "weight"] = self.dense()


def multiply_together(x: torch.Tensor, *linears: "ColumnParallelLinear") -> tuple[torch.Tensor, ...]:
    """What each of several matrices makes of one input: a single product, once they are laid out together."""
    layout = linears[0].layout
    if layout is None or layout is not linears[-1].layout:
        return tuple(linear(x) for linear in linears)
    return multiply(layout, x).split(linears[0].widths, dim=-1)


def multiply(layout: Layout, x: torch.Tensor) -> torch.Tensor:
    """What a layout makes of x. Raises RuntimeError where a gradient is wanted: layouts have none."""
    if _needs_gradient(x, x):
        raise RuntimeError(
            "a gradient is wanted through a matrix that is quantised or packed for decoding, and has none: expected a "
            "model of `Llama.build(train=True)`, or torch.no_grad()"
        )
    return layout(x)


class ColumnParallelLinear(Linear, fairscale_layers.ColumnParallelLinear):
    """`x @ weight.T` with the rows of `weight` [out_features, in_features] split over the ranks.

    Each rank has its slice of the output; with `gather_output` every rank has the whole.
    """

    def __init__(self, in_features: int, out_features: int, gather_output: bool = False):
        # Not fairscale's __init__: it allocates and fills its weights on the CPU, even under torch.device("meta").
        nn.Module.__init__(self)
        self.group = fairscale_groups.get_model_parallel_group()
        self.world_size = dist.get_world_size(self.group)
        self.in_features, self.out_features = in_features, out_features
        self.gather_output = gather_output
        start, stop = partition(out_features, dist.get_rank(self.group), self.world_size)
        self.output_size_per_partition = stop - start
        self.weight = nn.Parameter(torch.empty(self.output_size_per_partition, in_features))
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in_features] -> [..., out_features (/ world_size)]
        if self.world_size > 1 and self.layout is None and _needs_gradient(x, self.weight):
            return super().forward(x)  # fairscale's collectives carry gradients
        y = F.linear(x, self.weight) if self.layout is None else multiply(self.layout, x)[..., self.rows]
        gathers = self.gather_output and self.world_size > 1
        return gather_last_dim(y, self.out_features, self.group) if gathers else y


class RowParallelLinear(Linear, fairscale_layers.RowParallelLinear):
    """`x @ weight.T` with the columns of `weight` [out_features, in_features] split over the ranks.

    Takes the slice of the input that a ColumnParallelLinear left on this rank; the ranks' products are summed.
    """

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)  # as in ColumnParallelLinear
        self.group = fairscale_groups.get_model_parallel_group()
        self.world_size = dist.get_world_size(self.group)
        self.in_features, self.out_features = in_features, out_features
        self.input_is_parallel = True
        start, stop = partition(in_features, dist.get_rank(self.group), self.world_size)
        self.input_size_per_partition = stop - start
        self.weight = nn.Parameter(torch.empty(out_features, self.input_size_per_partition))
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in_features / world_size] -> [..., out_features]
        if self.world_size > 1 and self.layout is None and _needs_gradient(x, self.weight):
            return super().forward(x)
        y = F.linear(x, self.weight) if self.layout is None else multiply(self.layout, x)[..., self.rows]
        return y if self.world_size == 1 else sum_over_ranks(y, self.group)


class VocabParallelEmbedding(fairscale_layers.VocabParallelEmbedding):
    """The embedding table [num_embeddings, embedding_dim] with its rows split over the ranks."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        nn.Module.__init__(self)  # as in ColumnParallelLinear
        self.group = fairscale_groups.get_model_parallel_group()
        self.world_size = dist.get_world_size(self.group)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.rank = dist.get_rank(self.group)
        self.vocab_start_index, self.vocab_end_index = partition(num_embeddings, self.rank, self.world_size)
        self.num_embeddings_per_partition = self.vocab_end_index - self.vocab_start_index
        self.weight = nn.Parameter(torch.empty(self.num_embeddings_per_partition, embedding_dim))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [...] -> [..., embedding_dim]
        if self.world_size == 1:
            return F.embedding(ids, self.weight)
        if _needs_gradient(ids, self.weight):
            return super().forward(ids)
        elsewhere = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        rows = F.embedding((ids - self.vocab_start_index).masked_fill(elsewhere, 0), self.weight)
        return sum_over_ranks(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.group)


def _needs_gradient(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def sum_over_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of every rank's `x`, the same bits on each of them. `x` is overwritten."""
    if dist.get_world_size(group) > 1:
        if torch.compiler.is_compiling():
            return funcol.all_reduce(x, "sum", group)  # the form that a compiler can follow
        dist.all_reduce(x, group=group)
    return x


def gather_last_dim(x: torch.Tensor, size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's part of a last dimension of `size`, cut by `partition`, side by side: [..., size] on each rank."""
    world_size = dist.get_world_size(group)
    if world_size == 1:
        return x
    widths = [stop - start for start, stop in (partition(size, rank, world_size) for rank in range(world_size))]
    # Collectives want equal pieces: where they differ, by one, the narrower ones are padded on the way.
    x = F.pad(x, (0, max(widths) - x.shape[-1])) if x.shape[-1] < max(widths) else x.contiguous()
    if torch.compiler.is_compiling():
        pieces = funcol.all_gather_tensor(x, gather_dim=0, group=group).chunk(world_size)
    else:
        pieces = [torch.empty_like(x) for _ in range(world_size)]
        dist.all_gather(pieces, x, group=group)
    return torch.cat([piece[..., :width] for piece, width in zip(pieces, widths)], dim=-1)
