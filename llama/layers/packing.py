"""The matrices of a model laid out for fast decoding. Knows nothing of files, or of what the matrices are for."""

import ctypes
import mmap
import sys

import torch
from torch import nn

from llama.layers.layouts import lay_out
from llama.layers.linear import Linear
from llama.layers.quantization import Quantized


def pack(model: nn.Module) -> None:
    """Lays the matrices of a model out for fast decoding, one by one: the model is never in memory twice.

    On a CPU that takes about as long as reading the weights twice, so pack after the first token. A model whose
    `packable` is False stays as it is.
    """
    if not getattr(model, "packable", True):
        return
    for linears in model.matrices():
        if all(linear.layout is None for linear in linears):
            lay_out_together({linear: linear.weight for linear in linears}, None, linears[0].weight.dtype)


def lay_out_together(parts: "dict[Linear, torch.Tensor | Quantized]", quantize: str | None, dtype: torch.dtype) -> int:
    """Lays matrices with the same input out together, if there is a layout for them; returns its bytes."""
    layout = lay_out(list(parts.values()), quantize, dtype)
    if layout is None:
        return 0
    start, widths = 0, tuple(len(part.codes if isinstance(part, Quantized) else part) for part in parts.values())
    for (linear, part), n_rows in zip(parts.items(), widths):
        linear.layout, linear.rows, linear.weight = layout, slice(start, start + n_rows), None
        linear.widths = widths
        start += n_rows
        if isinstance(part, torch.Tensor):
            drop_pages(part)
    return layout.n_bytes


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor that a checkpoint has read is the file itself: its memory is not PyTorch's to resize."""
    return not tensor.untyped_storage().resizable()


def drop_pages(tensor: torch.Tensor) -> None:
    """Takes what a mapped tensor has read of its file out of this process's memory; it can be read again."""
    if sys.platform != "linux" or not is_mapped(tensor) or tensor.numel() == 0:
        return
    n_elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages: others' numbers share the rest
    stop = (tensor.data_ptr() + n_elements * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
