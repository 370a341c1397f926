"""Directories that `llama quantize` has written: matrices in 8 or 4 bits; the embedding and the norms as they were.

Meta's layout with one consolidated.00.pth. A matrix NAME.weight is its codes, beside NAME.scales and, in 4 bits,
NAME.zeros (`layers.quantization.Quantized`). Two codes of 4 bits share a byte, the even column's in the lower half.
params.json names the kind under "quantization"; matrices of short rows have 8 bits in both kinds (`kind_of_rows`). A
tied output matrix is not in the file: it is rounded while it is loaded.
"""

import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.meta import COLUMNS, ROWS, MetaCheckpoint, Stored, partition_dim
from llama.layers.quantization import KINDS, Quantized, group_size, kind_of_rows
from llama.model import ModelArgs


class QuantizedCheckpoint(MetaCheckpoint):
    """A quantised directory. Its matrices are read as `Quantized`; all else is as in `MetaCheckpoint`.

    `params` are the contents of its params.json. Raises ValueError also for a kind of quantisation that is not ours.
    """

    def __init__(self, ckpt_dir: Path, args: ModelArgs, params: dict[str, Any], check: bool = True):
        found = params["quantization"]
        self.quantization = found.get("kind") if isinstance(found, dict) else found
        if self.quantization not in KINDS:
            path = ckpt_dir / "params.json"
            raise ValueError(f"{path} says quantization {reprlib.repr(found)}: expected a kind of {KINDS}")
        super().__init__(ckpt_dir, args, check)

    def tensors_of_files(self) -> dict[str, Stored]:
        tensors: dict[str, Stored] = {}
        for name, shape in self.shapes.items():
            tensors |= stored(name, shape, self.quantization, None)
        return tensors

    def problems(self) -> Iterator[str]:
        if len(self.paths) > 1:
            yield f"{self.paths[0].parent} is quantised, and has {len(self.paths)} shards: expected one"
            return
        yield from super().problems()

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor | Quantized:
        """As `MetaCheckpoint.read`; a matrix comes as `Quantized`.

        Columns that cut a group of 4-bit codes in two come as the float32 values they stand for, to be rounded again in
        groups of their own.
        """
        if not is_matrix(name):
            return super().read(name, dim, start, stop)
        shard, in_features = self.shards[0], self.shapes[name][1]
        rows = slice(start, stop) if dim == ROWS else slice(None)
        codes, scales = shard[name][rows], shard[scales_of(name)][rows].float()
        if kind_of_rows(self.quantization, in_features) == "int8":
            if dim == COLUMNS:
                codes = codes[:, start:stop]
            return Quantized("int8", codes.shape[1], codes, scales)
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).to(torch.int8) - 8
        matrix = Quantized("int4", in_features, codes, scales, shard[zeros_of(name)][rows].float())
        if dim != COLUMNS:
            return matrix
        group = codes.shape[1] // scales.shape[1]
        if start % group or (stop % group and stop != in_features):
            return matrix.to_dense()[:, start:stop]
        groups = slice(start // group, -(-stop // group))
        codes = codes[:, groups.start * group : groups.stop * group]
        return Quantized("int4", stop - start, codes, scales[:, groups], matrix.zeros[:, groups])


def is_matrix(name: str) -> bool:
    """Whether a parameter is one of those that are quantised."""
    return name != "tok_embeddings.weight" and partition_dim(name) is not None


def scales_of(name: str) -> str:
    return name.removesuffix("weight") + "scales"


def zeros_of(name: str) -> str:
    return name.removesuffix("weight") + "zeros"


def stored(name: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype | None) -> dict[str, Stored]:
    """The tensors that a file holds of a parameter: name, shape and dtype. What is not quantised keeps its `dtype`."""
    if not is_matrix(name):
        return {name: (shape, dtype)}
    out_features, in_features = shape
    if kind_of_rows(kind, in_features) == "int8":
        return {name: (shape, torch.int8), scales_of(name): ((out_features, 1), torch.bfloat16)}
    group = group_size(in_features)
    n_groups = -(-in_features // group)
    tensors: dict[str, Stored] = {name: ((out_features, n_groups * group // 2), torch.uint8)}
    return tensors | dict.fromkeys((scales_of(name), zeros_of(name)), ((out_features, n_groups), torch.bfloat16))


def packed(matrix: Quantized) -> torch.Tensor:
    """The codes as a file holds them."""
    if matrix.kind == "int8":
        return matrix.codes
    even, odd = (matrix.codes + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return even | odd << 4
