"""Low-rank additions to the matrices of a model: y = W x + scale * B A x, beside W or folded into it.

Split over ranks like W: if W is split by rows, so is B; if W is split by columns, so is A.
"""

import copy
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region, reduce_from_model_parallel_region
from torch import nn

from llama.adapters.files import Adapter, read_adapter
from llama.checkpoint import Checkpoint, build_model, open_checkpoint
from llama.checkpoint.convert import write_checkpoint
from llama.checkpoint.loading import Loaded
from llama.checkpoint.meta import COLUMNS, partition_dim, slice_of_rank
from llama.layers.linear import sum_over_ranks
from llama.model import Transformer
from llama.parallel import dtype_by_name


class Lora(nn.Module):
    """The addition to one matrix.

    Args:
        a: [rank, in_features], or this rank's columns of it if the matrix is split by columns.
        b: [out_features, rank], or this rank's rows of it if the matrix is split by rows.
        scale: the factor of B A.
        split: the dimension along which the matrix is split, COLUMNS or ROWS.
        group: the ranks that it is split over.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float, split: int, group: dist.ProcessGroup):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.split, self.group = scale, split, group

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["group"]  # belongs to this process: a copy takes the group of its own
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.group = get_model_parallel_group()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # the matrix's input -> the addition to its output
        hidden = F.linear(x.to(self.a.dtype), self.a)
        if dist.get_world_size(self.group) > 1:
            if not torch.is_grad_enabled():
                hidden = sum_over_ranks(hidden, self.group) if self.split == COLUMNS else hidden
            elif self.split == COLUMNS:
                hidden = reduce_from_model_parallel_region(hidden)
            else:
                hidden = copy_to_model_parallel_region(hidden)
        return F.linear(hidden, self.b) * self.scale


def attach(model: Transformer, name: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """From now on, adds scale * B A x to the output of a matrix. The matrix gets a submodule `lora` for it.

    Args:
        name: of the matrix, as a parameter: "layers.0.attention.wq.weight".
        a, b: whole, [rank, in_features] and [out_features, rank]; this rank keeps its part, in float32.
        scale: the factor of B A.
    """
    linear, table = model.get_submodule(name.removesuffix(".weight")), model.tok_embeddings
    split = partition_dim(name)
    size = a.shape[1] if split == COLUMNS else len(b)
    start, stop = slice_of_rank(name, size, model.args, table.rank, table.world_size)
    a, b = (a[:, start:stop], b) if split == COLUMNS else (a, b[start:stop])
    a, b = (part.to(model.rotary.device, torch.float32).contiguous() for part in (a, b))
    linear.add_module("lora", Lora(a, b, scale, split, table.group))  # setting the attribute would need a weight
    linear.register_forward_hook(_add_lora)


def _add_lora(linear: nn.Module, inputs: tuple, y: torch.Tensor) -> torch.Tensor:
    return y + linear.lora(inputs[0]).to(y.dtype)


def build_adapted(
    checkpoint: Checkpoint,
    adapter: str | os.PathLike | None,
    dtype: torch.dtype | str | None,
    device: torch.device,
    quantize: str | None = None,
    train: bool = False,
) -> tuple[Transformer, Loaded]:
    """`checkpoint.build_model`, with the adapter of a directory if there is one.

    The adapter is folded into the weights while they are loaded, before they are rounded. If the checkpoint is
    quantised, it is computed beside each matrix.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `read_adapter` and `build_model`.
    """
    if adapter is None:
        return build_model(checkpoint, dtype, device, quantize, train)
    lora = read_adapter(adapter, checkpoint)
    if not checkpoint.quantization:
        checkpoint = folded(checkpoint, lora, dtype_by_name(dtype) or checkpoint.dtype)
        return build_model(checkpoint, dtype, device, quantize, train)
    model, loaded = build_model(checkpoint, dtype, device, quantize, train, alone=True)
    for name, (a, b) in lora.pairs.items():
        attach(model, name, a, b, lora.scales[name])
        model.get_submodule(name.removesuffix(".weight")).lora.requires_grad_(False)
    model.adapter = lora.digest
    return model, loaded


def folded(checkpoint: Checkpoint, adapter: Adapter, dtype: torch.dtype) -> Checkpoint:
    """The checkpoint with W + scale * B A for each W that an adapter changes, summed in float32, rounded to `dtype`."""

    def read(name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        weight = checkpoint.read(name, dim, start, stop)
        if name not in adapter.pairs:
            return weight
        a, b = (part.float() for part in adapter.pairs[name])
        if dim is not None:
            a, b = (a[:, start:stop], b) if dim == COLUMNS else (a, b[start:stop])
        return (weight.float() + adapter.scales[name] * (b @ a)).to(dtype)

    changed = copy.copy(checkpoint)
    changed.read = read
    return changed


def merge(
    src: str | os.PathLike,
    adapter: str | os.PathLike,
    dst: str | os.PathLike,
    to: str = "meta",
    shards: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> None:
    """Writes the checkpoint of a directory with an adapter folded in; other arguments and errors as in `convert`.

    Args:
        adapter: PEFT's directory of an adapter for `src`.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `convert` and `read_adapter`.
    """
    tokenizer, checkpoint = open_checkpoint(src)
    source = folded(checkpoint, read_adapter(adapter, checkpoint), torch.float32)  # rounded as it is written
    write_checkpoint(source, tokenizer, dst, to, shards, dtype)
