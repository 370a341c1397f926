"""Saves a model in memory to a directory. Gathers its weights tensor by tensor from the ranks.

Knows nothing of how the weights came about.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from llama import parallel
from llama.checkpoint.convert import write_checkpoint
from llama.checkpoint.meta import full_shapes, partition_dim, slice_of_rank
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer


def save_checkpoint(
    model: Transformer,
    tokenizer: Tokenizer,
    dst: str | os.PathLike,
    to: str = "meta",
    shards: int | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Writes a model's weights and its tokenizer into a directory that `Llama.build` reads. All processes call this.

    The directory appears whole or not at all.

    Args:
        dst: the directory to make; it may exist if it is empty.
        to: "meta" or "hf".
        shards: the number of files; as few as the format allows when None.
        dtype: of the tensors written; the model's when None.
        tensors: written instead of the model's weights: this rank's part of each, by Meta's name. A reward model has
            `score.weight` instead of `output.weight`. Tensors that FSDP has sharded are gathered.
        config: further keys of Hugging Face's config.json.

    Raises:
        FileExistsError, OSError: as `convert`, on every rank. Nothing is left then.
        ValueError: as `convert`; also if the weights are quantised or have an adapter beside them.
    """
    if tensors is None:
        if quantization := getattr(model, "quantization", None):
            raise ValueError(f"the weights are in {quantization}: expected a model that was built without `quantize`")
        tensors = model.state_dict()
        if extra := [name for name in tensors if ".lora." in name]:
            raise ValueError(f"{extra[0]} is an adapter: expected a model without one (`llama merge` folds it in)")
        if model.args.tied_embeddings:
            del tensors["output.weight"]
    source = _Gathered(tensors, model.args, model.tok_embeddings.group)
    with parallel.fail_together():
        try:
            if dist.get_rank() == 0:
                write_checkpoint(source, tokenizer, dst, to, shards, dtype, config)
        finally:
            source.finish()


class _Gathered:
    """The weights of a model, read like a checkpoint's: full tensors, one at a time in memory.

    Rank 0 reads, in the order of `shapes`. The other ranks call `finish`, as does rank 0 after an error.
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
        """[start, stop) along `dim` of a full tensor, or all of it. For a new tensor, all ranks gather it."""
        while self._name != name:
            self._gather_next()
        return self._whole if dim is None else self._whole.narrow(dim, start, stop - start)

    def finish(self) -> None:
        """Takes part in gathering the tensors that are left."""
        while self._left:
            self._gather_next()

    def _gather_next(self) -> None:
        name = self._name = self._left.pop(0)
        part = whole_parameter(self.tensors[name])
        if (dim := partition_dim(name)) is not None:
            part = gather(name, part, dim, self.shapes[name][dim], self.args, self.group)
        self._whole = part.cpu()


def whole_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter that FSDP may have sharded over the replicas. All processes call this."""
    parameter = parameter.detach()
    # DTensors have `full_tensor`. Importing their class would cost every process a third of a second at its start.
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def gather(
    name: str, part: torch.Tensor, dim: int, size: int, args: ModelArgs, group: dist.ProcessGroup
) -> torch.Tensor:
    """Gathers a tensor that is split along `dim` over the ranks of a group, where the matrix `name` is split."""
    n_ranks = dist.get_world_size(group)
    if n_ranks == 1:
        return part
    slices = [slice_of_rank(name, size, args, rank, n_ranks) for rank in range(n_ranks)]
    width = max(stop - start for start, stop in slices)  # collectives need equal pieces
    padded = part.new_zeros([width if d == dim else n for d, n in enumerate(part.shape)])
    padded.narrow(dim, 0, part.shape[dim]).copy_(part)
    pieces = [torch.empty_like(padded) for _ in range(n_ranks)]
    dist.all_gather(pieces, padded, group=group)
    # With more ranks than key and value heads, several ranks have the same slice: the first one's is used.
    whole = [
        piece.narrow(dim, 0, stop - start)
        for i, (piece, (start, stop)) in enumerate(zip(pieces, slices))
        if i == 0 or start != slices[i - 1][0]
    ]
    return torch.cat(whole, dim=dim)
