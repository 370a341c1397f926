"""A base checkpoint with an adapter folded in: W + scale * B A, read in slices like any other checkpoint.

So a model with an adapter loads on any number of ranks, converts and quantises as usual. Knows nothing of engines.
"""

import os
from pathlib import Path
from typing import Any

import torch

from llama.adapters.files import Adapter, read_adapter
from llama.checkpoint.convert import write_checkpoint
from llama.checkpoint.open import open_checkpoint


class AdaptedCheckpoint:
    """A checkpoint whose tensors have an adapter added.

    Args:
        base: what `open_checkpoint` gives; not quantised.
        adapter: for this base.
        dtype: of the tensors read; the sums are rounded to it once, from float32.
    """

    quantization: str | None = None

    def __init__(self, base: Any, adapter: Adapter, dtype: torch.dtype):
        self.base, self.adapter, self.dtype = base, adapter, dtype
        self.args, self.shapes = base.args, base.shapes

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """[start, stop) along `dim` of a full tensor, or all of it."""
        part = self.base.read(name, dim, start, stop)
        delta = self.adapter.delta(name, dim, start, stop)
        return part.to(self.dtype) if delta is None else (part.float() + delta).to(self.dtype)


def merge(
    src: str | os.PathLike,
    adapter: str | os.PathLike,
    dst: str | os.PathLike,
    to: str = "meta",
    shards: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> None:
    """Writes the checkpoint of a directory with an adapter folded in; arguments and errors as `convert`'s.

    Args:
        adapter: PEFT's directory, of an adapter for `src`.

    Raises:
        ValueError: also if `src` is quantised, or the adapter is for another base.
    """
    src = Path(src)
    tokenizer, base = open_checkpoint(src)
    if base.quantization is not None:
        raise ValueError(f"{src} is quantised to {base.quantization}: expected the checkpoint that it was made of")
    source = AdaptedCheckpoint(base, read_adapter(adapter, base), base.dtype)
    write_checkpoint(source, tokenizer, src, dst, to, shards, dtype)
