"""Matrices split over the ranks of a model: by rows, by columns, and the embedding table. Knows nothing of Llama.

The weights and their partitioning are fairscale's. The forward pass is our own unless gradients are needed, because
fairscale's reduce cannot be compiled.
"""

from typing import Any

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from torch import nn

from llama.layers.hooks import has_global_hook, is_plain
from llama.layers.packable import Pack, Packable
from llama.parallel import initialize, partition


class Split(Packable):
    """A matrix that is split over ranks."""

    group: dist.ProcessGroup
    world_size: int

    def _join_group(self) -> None:
        """Finds the ranks that share the matrix. Creates groups of a single process if there are none yet."""
        if not fairscale_groups.model_parallel_is_initialized():
            initialize()
        self.group = fairscale_groups.get_model_parallel_group()
        self.world_size = dist.get_world_size(self.group)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["group"]  # belongs to this process; the copy joins the group of its own
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join_group()
        if self.world_size != state["world_size"]:
            raise ValueError(
                f"a model split over {state['world_size']} processes is read in a run that splits models over "
                f"{self.world_size}: expected the same number"
            )


class Linear(Split):
    """A matrix to multiply by, [out_features, in_features], or this rank's part of it."""

    def leave_pack(self, pack: Pack, x: torch.Tensor) -> Pack | None:
        """Unpacks the matrix and returns None, or returns the pack of a quantised matrix, which cannot be unpacked.

        Called if the pack does not support x. Also called for a matrix that is packed with others but runs alone,
        because one of them has a hook or was replaced: each would multiply by the whole stack.

        Raises:
            RuntimeError: a gradient through a quantised matrix is needed.
        """
        if not pack.quantized:
            return self.unpack()
        if _needs_gradient(x):
            raise RuntimeError(self._refusal("has no gradient"))
        return pack


def multiply_together(x: torch.Tensor, *linears: nn.Module) -> tuple[torch.Tensor, ...]:
    """Multiplies x by several matrices; in one multiplication if they are packed together.

    Calls each matrix as usual if one has hooks, a patched forward or a foreign class.
    """
    pack = getattr(linears[0], "pack", None)
    if pack is None or len(pack.rows) != len(linears) or not pack.supports(x) or has_global_hook():
        return tuple(linear(x) for linear in linears)
    for linear, rows in zip(linears, pack.rows):
        is_here = getattr(linear, "pack", None) is pack and linear.rows.start == rows.start
        if not is_here or not is_plain(linear, COLUMN_FORWARD):
            return tuple(linear(x) for linear in linears)
    return pack.layout(x).split(pack.widths, dim=-1)


class ColumnParallelLinear(Linear, fairscale_layers.ColumnParallelLinear):
    """`x @ weight.T` with the rows of `weight` [out_features, in_features] split over the ranks.

    Each rank returns its slice of the output; with `gather_output`, every rank returns all of it.
    """

    def __init__(self, in_features: int, out_features: int, gather_output: bool = False):
        # Not fairscale's __init__: it allocates and fills its weights on the CPU, even under torch.device("meta").
        nn.Module.__init__(self)
        self._join_group()
        self.in_features, self.out_features = in_features, out_features
        self.gather_output = gather_output
        start, stop = partition(out_features, dist.get_rank(self.group), self.world_size)
        self.output_size_per_partition = stop - start
        self.weight = nn.Parameter(torch.empty(self.output_size_per_partition, in_features))
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in_features] -> [..., out_features (/ world_size)]
        pack = self.pack
        if pack is not None and (len(pack.rows) > 1 or not pack.supports(x)):
            pack = self.leave_pack(pack, x)
        if pack is not None:
            y = pack.layout(x) if len(pack.rows) == 1 else pack.layout(x)[..., self.rows]
        elif self.world_size > 1 and _needs_gradient(x, self.weight):
            return super().forward(x)  # fairscale's collectives carry gradients
        else:
            y = F.linear(x, self.weight, self.bias)
        gathers = self.gather_output and self.world_size > 1
        return gather_last_dim(y, self.out_features, self.group) if gathers else y


COLUMN_FORWARD = ColumnParallelLinear.forward  # the original, in case a caller patches the class


class RowParallelLinear(Linear, fairscale_layers.RowParallelLinear):
    """`x @ weight.T` with the columns of `weight` [out_features, in_features] split over the ranks.

    Takes the slice of the input that a ColumnParallelLinear returned on this rank. Sums the results of all ranks.
    """

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)  # as in ColumnParallelLinear
        self._join_group()
        self.in_features, self.out_features = in_features, out_features
        self.input_is_parallel = True
        start, stop = partition(in_features, dist.get_rank(self.group), self.world_size)
        self.input_size_per_partition = stop - start
        self.weight = nn.Parameter(torch.empty(out_features, self.input_size_per_partition))
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in_features / world_size] -> [..., out_features]
        pack = self.pack
        if pack is not None and (len(pack.rows) > 1 or not pack.supports(x)):
            pack = self.leave_pack(pack, x)
        if pack is not None:
            y = pack.layout(x)
            return y if self.world_size == 1 else sum_over_ranks(y, self.group)
        if self.world_size > 1 and _needs_gradient(x, self.weight):
            return super().forward(x)
        y = sum_over_ranks(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(Split, fairscale_layers.VocabParallelEmbedding):
    """The embedding table [num_embeddings, embedding_dim] with its rows split over the ranks. Is never packed."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        nn.Module.__init__(self)  # as in ColumnParallelLinear
        self._join_group()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.rank = dist.get_rank(self.group)
        self.vocab_start_index, self.vocab_end_index = partition(num_embeddings, self.rank, self.world_size)
        self.num_embeddings_per_partition = self.vocab_end_index - self.vocab_start_index
        self.weight = nn.Parameter(torch.empty(self.num_embeddings_per_partition, embedding_dim))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [...] -> [..., embedding_dim]
        # Reading `weight` would unpack a tied output matrix; this does not.
        weight = self.weight if self.pack is None else vars(self)["_parameters"]["weight"]
        if self.world_size == 1:
            return F.embedding(ids, weight)
        if _needs_gradient(ids, weight):
            return super().forward(ids)
        elsewhere = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        rows = F.embedding((ids - self.vocab_start_index).masked_fill(elsewhere, 0), weight)
        return sum_over_ranks(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.group)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments: Any) -> None:
        """Also accepts this rank's columns of the table, as in Llama 2's shards, if all ranks load theirs together."""
        table, n_columns = state_dict.get(prefix + "weight"), self.embedding_dim // self.world_size
        if self.world_size > 1 and table is not None and table.shape == (self.num_embeddings, n_columns):
            whole = gather_last_dim(table.to(self.weight.device), self.embedding_dim, self.group)
            state_dict[prefix + "weight"] = whole[self.vocab_start_index : self.vocab_end_index]
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _needs_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def sum_over_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns the sum of all ranks' `x`, the same bits on each rank. Overwrites `x`."""
    if dist.get_world_size(group) > 1:
        if torch.compiler.is_compiling():
            return funcol.all_reduce(x, "sum", group)  # this form can be compiled
        dist.all_reduce(x, group=group)
    return x


def gather_last_dim(x: torch.Tensor, size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenates the ranks' parts of a last dimension of `size`, cut by `partition`: [..., size] on each rank."""
    world_size = dist.get_world_size(group)
    if world_size == 1:
        return x
    widths = [stop - start for start, stop in (partition(size, rank, world_size) for rank in range(world_size))]
    # Collectives need pieces of equal size. Sizes differ by one at most, so the smaller pieces are padded.
    x = F.pad(x, (0, max(widths) - x.shape[-1])) if x.shape[-1] < max(widths) else x.contiguous()
    if torch.compiler.is_compiling():
        pieces = funcol.all_gather_tensor(x, gather_dim=0, group=group).chunk(world_size)
    else:
        pieces = [torch.empty_like(x) for _ in range(world_size)]
        dist.all_gather(pieces, x, group=group)
    return torch.cat([piece[..., :width] for piece, width in zip(pieces, widths)], dim=-1)
