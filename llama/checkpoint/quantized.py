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

from llama.checkpoint.meta import COLUMNS, MetaCheckpoint, dtype_problems, name_problems, partition_dim
from llama.layers.quantization import KINDS, Quantized, group_size, kind_of_rows
from llama.model import ModelArgs

Stored = tuple[tuple[int, ...], torch.dtype | None]  # shape and dtype


class QuantizedCheckpoint(MetaCheckpoint):
    """A quantised directory. Its matrices are read as `Quantized`; all else is as in `MetaCheckpoint`.

    Args:
        ckpt_dir, args, check: as in `MetaCheckpoint`.
        params: the contents of its params.json.

    Raises:
        FileNotFoundError: there is no file with the weights.
        ValueError: it is broken, lacks a tensor, or has one of another shape or dtype; this package does not have its
            kind of quantisation.
    """

    def __init__(self, ckpt_dir: Path, args: ModelArgs, params: dict[str, Any], check: bool = True):
        found = params["quantization"]
        self.quantization = found.get("kind") if isinstance(found, dict) else found
        if self.quantization not in KINDS:
            path = ckpt_dir / "params.json"
            raise ValueError(f"{path} says quantization {reprlib.repr(found)}: expected a kind of {KINDS}")
        super().__init__(ckpt_dir, args, check)

    def problems(self) -> Iterator[str]:
        """What is wrong with the file, as far as names, shapes, dtypes and norms tell."""
        if len(self.paths) > 1:
            yield f"{self.paths[0].parent} is quantised, and has {len(self.paths)} shards: expected one"
        path, shard = self.paths[0], self.shards[0]
        dtype = shard["norm.weight"].dtype if "norm.weight" in shard else None
        expected: dict[str, Stored] = {}
        for name, shape in self.shapes.items():
            expected |= stored(name, shape, self.quantization, dtype)
        yield from name_problems(path, expected, shard, f"n_layers = {self.args.n_layers}, as its params.json says")
        if dtype is not None:
            yield from dtype_problems(path.parent, {dtype: "norm.weight"})
        for name in expected.keys() & shard.keys():
            tensor, (shape, dtype) = shard[name], expected[name]
            if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
                found = f"{tensor.dtype} {list(tensor.shape)[:8]}"
                yield f"{path}: {name} is {found}: expected {dtype} {list(shape)}"
            elif tensor.dim() == 1 and not tensor.isfinite().all():
                yield f"{path}: {name} has numbers that are not finite: the file is damaged"

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor | Quantized:
        """As `MetaCheckpoint.read`; a matrix comes as `Quantized`.

        Columns that cut a group of 4-bit codes in two come as the float32 values they stand for, to be rounded again in
        groups of their own.
        """
        shard = self.shards[0]
        if not is_matrix(name):
            return shard[name] if dim is None else shard[name].narrow(dim, start, stop - start)
        out_features, in_features = self.shapes[name]
        if dim is None:
            dim, start, stop = 0, 0, out_features
        rows = slice(start, stop) if dim != COLUMNS else slice(None)
        codes, scales = shard[name][rows], shard[scales_of(name)][rows].float()
        if kind_of_rows(self.quantization, in_features) == "int8":
            if dim == COLUMNS:
                codes = codes[:, start:stop]
            return Quantized("int8", codes.shape[1], codes, scales)
        matrix = Quantized("int4", in_features, _unpacked(codes), scales, shard[zeros_of(name)][rows].float())
        if dim != COLUMNS:
            return matrix
        group = matrix.codes.shape[1] // scales.shape[1]
        if start % group or (stop % group and stop != in_features):
            return matrix.to_dense()[:, start:stop]
        groups = slice(start // group, -(-stop // group))
        codes = matrix.codes[:, groups.start * group : groups.stop * group]
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


def _unpacked(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).to(torch.int8) - 8
