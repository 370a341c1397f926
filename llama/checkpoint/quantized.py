"""Directories that `llama quantize` has written: matrices in 8 or 4 bits, the embedding and the norms as they were.

As Meta's with one consolidated.00.pth, in which a matrix NAME.weight is its codes, beside NAME.scales and, in 4 bits,
NAME.zeros (`products.Quantized`); two codes of 4 bits share a byte, the even column's in the lower half. params.json
says so under "quantization"; matrices of short rows have 8 bits in both (`products.kind_of_rows`). A tied output matrix
is not there: it is rounded while it is loaded.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from llama.checkpoint.meta import COLUMNS, MetaCheckpoint, find_shards, full_shapes, open_shard, partition_dim
from llama.layers.quantization import KINDS, Quantized, group_size, kind_of_rows
from llama.model import ModelArgs

Kept = tuple[tuple[int, ...], torch.dtype | None]  # shape and dtype


class QuantizedCheckpoint(MetaCheckpoint):
    """A quantised directory, whose matrices are read as `Quantized`.

    Raises:
        FileNotFoundError: there is no file with the weights.
        ValueError: it is broken, lacks a tensor, or has one of another shape or dtype; it is of a kind not known here.
    """

    def __init__(self, ckpt_dir: Path, args: ModelArgs, params: dict):
        said = params["quantization"]
        self.quantization = said.get("kind") if isinstance(said, dict) else said
        if self.quantization not in KINDS:
            raise ValueError(f"{ckpt_dir / 'params.json'} says quantization {said!r}: expected a kind of {KINDS}")
        self.args = args
        self.paths = find_shards(ckpt_dir)
        if len(self.paths) > 1:
            raise ValueError(f"{ckpt_dir} is quantised, and has {len(self.paths)} shards: expected one")
        self.shards = [open_shard(self.paths[0])]
        args.tied_embeddings = "output.weight" not in self.shards[0]
        self.shapes = full_shapes(args)
        if args.tied_embeddings:
            del self.shapes["output.weight"]
        if (problem := next(self.problems(), None)) is not None:
            raise ValueError(problem)

    def problems(self) -> Iterator[str]:
        shard, dtype = self.shards[0], getattr(self.shards[0].get("norm.weight"), "dtype", None)
        expected: dict[str, Kept] = {}
        for name, shape in self.shapes.items():
            expected |= stored(name, shape, self.quantization, dtype)
        for name in sorted(shard.keys() ^ expected.keys()):
            yield f"{self.paths[0]} {'lacks' if name in expected else 'has unexpected'} {name}"
        for name in expected.keys() & shard.keys():
            found = tuple(shard[name].shape), shard[name].dtype
            if found != expected[name]:
                shape, kind = expected[name]
                yield f"{self.paths[0]}: {name} is {found[1]} {list(found[0])}: expected {kind} {list(shape)}"
            elif not is_matrix(name) and shard[name].dim() == 1 and not bool(shard[name].isfinite().all()):
                yield f"{self.paths[0]}: {name} has numbers that are not finite: the file is damaged"

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> "torch.Tensor | Quantized":
        """As MetaCheckpoint; a matrix comes as `Quantized`.

        Columns that cut a group of 4-bit codes in two come as the float32 values they stand for, to be rounded anew in
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


def stored(name: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype | None) -> dict[str, Kept]:
    """The tensors that are kept of a parameter: name, shape and dtype; `dtype` is of those that stay as they are."""
    if not is_matrix(name):
        return {name: (shape, dtype)}
    out_features, in_features = shape
    if kind_of_rows(kind, in_features) == "int8":
        return {name: (shape, torch.int8), scales_of(name): ((out_features, 1), torch.bfloat16)}
    group = group_size(in_features)
    n_groups = -(-in_features // group)
    kept: dict[str, Kept] = {name: ((out_features, n_groups * group // 2), torch.uint8)}
    return kept | dict.fromkeys((scales_of(name), zeros_of(name)), ((out_features, n_groups), torch.bfloat16))


def packed(matrix: Quantized) -> torch.Tensor:
    """The codes as they are kept."""
    if matrix.kind == "int8":
        return matrix.codes
    even, odd = (matrix.codes + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return even | odd << 4


def _unpacked(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).to(torch.int8) - 8
