"""A model in memory to a directory: its weights as they are, gathered tensor by tensor from the ranks that share it.

Knows nothing of how the weights came about.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from llama import parallel
from llama.checkpoint.convert import write_checkpoint
from llama.checkpoint.meta import full_shapes, partition_dim, slice_of_rank
from llama.model import ModelArgs
from llama.tokenizer import Tokenizer


def save_model(
    tensors: Mapping[str, torch.Tensor],
    args: ModelArgs,
    group: dist.ProcessGroup,
    tokenizer: Tokenizer,
    texts: str | os.PathLike,
    dst: str | os.PathLike,
    to: str = "meta",
    shards: int | None = None,
    dtype: torch.dtype | str | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Writes a model's weights into a directory, in Meta's format or Hugging Face's. All processes call this.

    Args:
        tensors: this rank's part of each weight by Meta's name; `score.weight` in place of `output.weight` for a reward
            model. Parts that FSDP has sharded (DTensors) are put together.
        args: the shape of the model.
        group: the ranks that the model is split over.
        tokenizer, texts, dst, to, shards, dtype, config: as in `convert.write_checkpoint`.

    Raises:
        FileExistsError, OSError, ValueError: as `convert`, on every rank. Nothing is left then.
    """
    source = GatheredWeights(tensors, args, group)
    with parallel.fail_together():
        try:
            if dist.get_rank() == 0:
                write_checkpoint(source, tokenizer, texts, dst, to, shards, dtype, config)
        finally:
            source.finish()


class GatheredWeights:
    """The weights of a model with the face of a checkpoint: full tensors, one at a time in memory.

    Rank 0 reads, in the order of `shapes`; the other ranks, and rank 0 where it stops early, `finish`.
    """

    quantization: str | None = None

    def __init__(self, tensors: Mapping[str, torch.Tensor], args: ModelArgs, group: dist.ProcessGroup):
        self.args, self.group, self.tensors = args, group, tensors
        shapes = full_shapes(args) | {"score.weight": (1, args.dim)}
        self.shapes = {name: shape for name, shape in shapes.items() if name in tensors}
        self.dtype = next(iter(tensors.values())).dtype
        self._left = list(self.shapes)  # names that are not gathered yet
        self._name, self._whole = "", torch.empty(0)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """[start, stop) along `dim` of a full tensor, or all of it. Every rank gathers when a new one is asked for."""
        while self._name != name:
            self._gather_next()
        return self._whole if dim is None else self._whole.narrow(dim, start, stop - start)

    def finish(self) -> None:
        """Takes part in gathering what is left."""
        while self._left:
            self._gather_next()

    def _gather_next(self) -> None:
        self._name = self._left.pop(0)
        self._whole = gather(self._name, self.tensors[self._name].detach(), self.args, self.group).cpu()


def gather(name: str, part: torch.Tensor, args: ModelArgs, group: dist.ProcessGroup) -> torch.Tensor:
    """The full tensor of which each rank of a group has a part, on each of them."""
    part = part.full_tensor() if isinstance(part, DTensor) else part
    dim, n_ranks = partition_dim(name), dist.get_world_size(group)
    if dim is None or n_ranks == 1:
        return part
    return gather_parts(name, part, dim, full_shapes(args)[name][dim], args, group)


def gather_parts(
    name: str, part: torch.Tensor, dim: int, size: int, args: ModelArgs, group: dist.ProcessGroup
) -> torch.Tensor:
    """As `gather`, of a tensor that is split along `dim` as the matrix `name` is split."""
    n_ranks = dist.get_world_size(group)
    slices = [slice_of_rank(name, size, args, rank, n_ranks) for rank in range(n_ranks)]
    width = max(stop - start for start, stop in slices)  # collectives want equal pieces
    padded = part.new_zeros([width if d == dim else n for d, n in enumerate(part.shape)])
    padded.narrow(dim, 0, part.shape[dim]).copy_(part)
    pieces = [torch.empty_like(padded) for _ in range(n_ranks)]
    dist.all_gather(pieces, padded, group=group)
    # With more ranks than key and value heads, several have the same slice: the first counts.
    whole = [
        piece.narrow(dim, 0, stop - start)
        for i, (piece, (start, stop)) in enumerate(zip(pieces, slices))
        if i == 0 or start != slices[i - 1][0]
    ]
    return torch.cat(whole, dim=dim)
