"""Directories that `llama quantize` has written: matrices in 8 or 4 bits; the embedding and the norms unchanged.

The layout is Meta's, with one consolidated.00.pth. It stores each matrix in blocks (`layers.quantization.Blocks`), and
the kernels multiply with these blocks in the mapped file. "quantization" in params.json has the kind and the format of
the blocks. Matrices with short rows have 8 bits in both kinds (`kind_of_rows`). A tied output matrix is stored too.
"""

import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.meta import ROWS, MetaCheckpoint, Stored, full_shapes, partition_dim
from llama.layers.quantization import BLOCK_ROWS, KINDS, Blocks, Quantized, block_bytes, kind_of_rows
from llama.model import ModelArgs

FORMAT = "blocks of 16 rows"


class QuantizedCheckpoint(MetaCheckpoint):
    """A quantised directory. All but its matrices is read as in `MetaCheckpoint`.

    `params` are the contents of its params.json. Raises ValueError also for an unknown kind or format of quantisation.
    """

    def __init__(self, ckpt_dir: Path, args: ModelArgs, params: dict[str, Any], check: bool = True):
        found = params["quantization"]
        found = found if isinstance(found, dict) else {"kind": found}
        self.quantization = found.get("kind")
        if self.quantization not in KINDS:
            path = ckpt_dir / "params.json"
            raise ValueError(f"{path} has quantization {reprlib.repr(found)}: expected a kind of {KINDS}")
        if found.get("format") != FORMAT:
            raise ValueError(
                f"{ckpt_dir} is quantised in another format, {reprlib.repr(found.get('format'))}: expected {FORMAT!r}; "
                f"`llama quantize SRC DST --to {self.quantization}` makes it again from the original checkpoint"
            )
        super().__init__(ckpt_dir, args, check)

    def tensors_of_files(self) -> dict[str, Stored]:
        return {name: stored(name, shape, self.quantization, None) for name, shape in full_shapes(self.args).items()}

    def problems(self) -> Iterator[str]:
        if len(self.paths) > 1:
            yield f"{self.paths[0].parent} is quantised, and has {len(self.paths)} shards: expected one"
            return
        yield from super().problems()

    def read(
        self, name: str, dim: int | None = None, start: int = 0, stop: int = 0
    ) -> torch.Tensor | Quantized | Blocks:
        """As `MetaCheckpoint.read`. Returns a matrix as `Blocks`, or as `Quantized` if blocks are cut.

        Columns that split a group of 4-bit codes come as float32 values, which the caller rounds again in new groups.
        """
        if not is_matrix(name):
            return super().read(name, dim, start, stop)
        blocks = self.blocks(name)
        if dim is None or stop - start == full_shapes(self.args)[name][dim]:
            return blocks
        if dim == ROWS:
            return blocks.rows(start, stop)
        matrix = blocks.quantized()
        if matrix.kind == "int8":
            return Quantized("int8", stop - start, matrix.codes[:, start:stop], matrix.scales)
        group = matrix.codes.shape[1] // matrix.scales.shape[1]
        if start % group or (stop % group and stop != matrix.in_features):
            return matrix.to_dense()[:, start:stop]
        groups = slice(start // group, -(-stop // group))
        codes = matrix.codes[:, groups.start * group : groups.stop * group]
        return Quantized("int4", stop - start, codes, matrix.scales[:, groups], matrix.zeros[:, groups])

    def blocks(self, name: str) -> Blocks:
        out_features, in_features = full_shapes(self.args)[name]
        return Blocks(kind_of_rows(self.quantization, in_features), out_features, in_features, self.shards[0][name])


def is_matrix(name: str) -> bool:
    """Whether a parameter is quantised: all matrices but the embedding are."""
    return name != "tok_embeddings.weight" and partition_dim(name) is not None


def stored(name: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype | None) -> Stored:
    """Shape and dtype of a parameter in a file. What is not quantised keeps its `dtype`."""
    if not is_matrix(name):
        return shape, dtype
    out_features, in_features = shape
    return (-(-out_features // BLOCK_ROWS), block_bytes(kind_of_rows(kind, in_features), in_features)), torch.uint8
