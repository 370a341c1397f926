"""Layouts of matrices for fast multiplication: several stacked, packed by oneDNN, in 8 bits, in 4 bits.

Decoding reads each matrix once per token, so its speed depends on the number of bytes and how fast they are read. A
layout is called with x [..., in_features] and returns [..., out_features]. The kernels are PyTorch's, and our own on a
CPU for 8 and 4 bits, and for few rows of bfloat16 (`kernels`). This file chooses a kernel and prepares its data. Knows
nothing of models or files.
"""

import functools
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F

from llama.layers import kernels
from llama.layers.quantization import ROWS_AT_A_TIME, Blocks, Quantized, quantize, stacked

# With at least this many rows, converting weights to bfloat16 and multiplying plainly beats the kernel for few rows.
MANY_ROWS = 192


class Layout(ABC):
    """A matrix [out_features, in_features] in some form. `layout(x)` is x times its transpose."""

    out_features: int
    in_features: int

    @property
    def n_bytes(self) -> int:
        """How many bytes one multiplication reads."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...  # [..., in_features] -> [..., out_features]

    @abstractmethod
    def to_dense(self) -> torch.Tensor:
        """Returns the matrix as an ordinary tensor; if quantised, the rounded values."""

    def columns(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns some columns of `to_dense`, [out_features, n]."""
        return self.to_dense()[:, indices]


class Dense(Layout):
    """An ordinary tensor, for stacked matrices on a GPU: one large multiplication beats three small ones."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def to_dense(self) -> torch.Tensor:
        return self.weight


class Packed(Layout):
    """A matrix in oneDNN's blocks. `F.linear` reads an ordinary tensor at half the memory's speed or less."""

    def __init__(self, weight: torch.Tensor, number: int | None = None):
        self.out_features, self.in_features = weight.shape
        # The last argument is a hint: the number of rows of x. With 64, the layout is fast from 1 row to thousands.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 64)
        self.blocks = kernels.blocks_of(self.weight, weight)
        # Compiled programs refer to a matrix by its number: a new one, or that of the layout which it replaces.
        self.number = next(_numbers) if number is None else number
        _packed[self.number] = self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # the compiler supports numbers, but no opaque tensors
            return torch.ops.llama.packed_product(x, self.number, self.out_features)
        width, n_rows = self.in_features, x.numel() // self.in_features
        if self.blocks is None or not 0 < n_rows <= kernels.FEW_ROWS or x.shape[-1] != width or x.device.type != "cpu":
            return _linear()(x, self.weight, None, "none", [], "")
        x, y = x.contiguous(), x.new_empty((*x.shape[:-1], self.out_features))
        product, result = kernels.product_of_few_rows(), (self.out_features, y.data_ptr())
        product(x.data_ptr(), n_rows, width, self.blocks, *result, torch.get_num_threads())
        return y

    def to_dense(self) -> torch.Tensor:
        return self.weight.to_dense()

    @property
    def n_bytes(self) -> int:
        return self.out_features * self.in_features * self.weight.element_size()

    @staticmethod
    def supports(weight: torch.Tensor) -> bool:
        """Whether the tensor is on a CPU, PyTorch has oneDNN, and the processor can compute in the dtype."""
        if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            return False
        if weight.dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if weight.dtype == torch.float16:
            return torch.ops.mkldnn._is_mkldnn_fp16_supported()
        return weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


@functools.cache
def _linear() -> Callable[..., torch.Tensor]:  # looked up when first used: not every platform has it
    return torch.ops.mkldnn._linear_pointwise.default


# The packed matrices by their numbers. Numbers follow the order of packing, which is the same in each run of a program.
_packed: weakref.WeakValueDictionary[int, Packed] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_library = torch.library.Library("llama", "FRAGMENT")
_library.define("packed_product(Tensor x, int number, int out_features) -> Tensor")


@torch.library.impl(_library, "packed_product", "CPU")
def _packed_product(x: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    return _packed[number](x)


@torch.library.register_fake("llama::packed_product", lib=_library)
def _packed_product_shape(x: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def lay_out(
    parts: "list[torch.Tensor | Quantized | Blocks]",
    kind: str | None,
    dtype: torch.dtype,
    number: int | None = None,
    buffer: list[torch.Tensor] | None = None,
) -> Layout | None:
    """Returns the fastest layout of stacked matrices; None if ordinary tensors are best.

    Args:
        parts: matrices with the same number of columns. Either all or none of them are quantised already.
        kind: "int8", "int4", or None for unquantised weights.
        dtype: of the computation.
        number: of the packed layout that this one replaces.
        buffer: reuses memory between calls, because allocating it costs as much time as writing to it.
    """
    if kind is not None:
        if parts[0].device.type == "cpu" and kernels.missing() is None:
            return Rounded([kernels.in_blocks(part, kind) for part in parts], dtype)
        parts = [part.quantized() if isinstance(part, Blocks) else part for part in parts]
        matrix = stacked([part if isinstance(part, Quantized) else quantize(part, kind) for part in parts])
        return (Int4 if matrix.kind == "int4" else Int8)(matrix, dtype)
    if any(part.requires_grad for part in parts):
        return None
    if Packed.supports(parts[0]):
        return Packed(parts[0] if len(parts) == 1 else _stack(parts, [] if buffer is None else buffer), number)
    return Dense(torch.cat(parts)) if parts[0].device.type == "cuda" and len(parts) > 1 else None


def _stack(parts: list[torch.Tensor], buffer: list[torch.Tensor]) -> torch.Tensor:
    shape = sum(map(len, parts)), parts[0].shape[1]
    n_numbers = shape[0] * shape[1]
    if not buffer or buffer[0].dtype != parts[0].dtype or buffer[0].numel() < n_numbers:
        buffer[:] = [parts[0].new_empty(n_numbers)]
    return torch.cat(parts, out=buffer[0][:n_numbers].view(shape))


class Rounded(Layout):
    """Eight or four bits per weight on a CPU, in blocks. Our own kernels are as fast as the memory."""

    def __init__(self, parts: list[Blocks], dtype: torch.dtype):
        self.parts, self.dtype, self.product = parts, dtype, kernels.Product(parts)
        self.out_features, self.in_features = self.product.out_features, self.product.in_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)

    @property
    def n_bytes(self) -> int:
        return sum(part.data.nbytes for part in self.parts)

    def to_dense(self) -> torch.Tensor:
        return torch.cat([part.to_dense() for part in self.parts]).to(self.dtype)

    def columns(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.to_dense(indices) for part in self.parts]).to(self.dtype)


class Int8(Layout):
    """Eight bits per weight, one scale per row."""

    def __init__(self, matrix: Quantized, dtype: torch.dtype):
        self.codes, self.scales = matrix.codes.contiguous(), matrix.scales[:, 0].to(dtype)
        self.out_features, self.in_features = self.codes.shape
        # The kernel reads sixteen codes at a time, so other row lengths would make it read past the end of a row.
        is_multiple = self.in_features % 16 == 0
        self.has_kernel = self.codes.device.type == "cpu" and dtype == torch.bfloat16 and is_multiple

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cuda":
            # The compiler fuses this: weights are converted in registers, and never stored.
            compute = _int8_product if torch.compiler.is_compiling() else _compiled_int8_product()
            return compute(x, self.codes, self.scales)
        rows = x.reshape(-1, self.in_features)
        if self.has_kernel and (torch.compiler.is_compiling() or len(rows) < MANY_ROWS):
            y = torch._weight_int8pack_mm(rows, self.codes, self.scales)
        else:
            cuts = range(0, self.out_features, ROWS_AT_A_TIME)
            pieces = [
                _int8_product(rows, self.codes[i:][:ROWS_AT_A_TIME], self.scales[i:][:ROWS_AT_A_TIME]) for i in cuts
            ]
            y = torch.cat(pieces, dim=1)
        return y.view(*x.shape[:-1], self.out_features)

    def to_dense(self) -> torch.Tensor:
        return self.codes.to(self.scales.dtype) * self.scales[:, None]


class Int4(Layout):
    """Four bits per weight, with a scale and a zero for each group of columns of a row."""

    def __init__(self, matrix: Quantized, dtype: torch.dtype):
        codes, device = matrix.codes, matrix.codes.device.type
        self.out_features, self.in_features = len(codes), matrix.in_features
        self.n_columns = codes.shape[1]
        self.group = self.n_columns // matrix.scales.shape[1]
        self.dtype = dtype
        # The kernels need a multiple of sixteen rows, and bfloat16.
        missing = -len(codes) % 16
        codes, scales, zeros = (F.pad(t, (0, 0, 0, missing)) for t in (codes, matrix.scales, matrix.zeros))
        self.has_kernel = dtype == torch.bfloat16 and device in ("cpu", "cuda")
        if not self.has_kernel:
            self.codes = codes
            self.scales_zeros = torch.stack([scales, zeros], dim=-1)
            return
        if device == "cpu":
            self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
        else:
            pairs = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2))
            inner_tiles = min(8, self.group // 16)  # columns in blocks of 16 * inner_tiles
            self.codes = torch.ops.aten._convert_weight_to_int4pack(pairs[..., 0] << 4 | pairs[..., 1], inner_tiles)
        self.scales_zeros = torch.stack([scales.T, zeros.T], dim=-1).to(dtype).contiguous()  # [groups, rows, 2]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.n_columns > self.in_features:
            rows = F.pad(rows, (0, self.n_columns - self.in_features))
        if not self.has_kernel:
            scales, zeros = self.scales_zeros.unbind(-1)
            dense = self.codes.to(self.dtype).unflatten(1, (-1, self.group))
            dense = dense * scales[:, :, None].to(self.dtype) + zeros[:, :, None].to(self.dtype)
            y = F.linear(rows, dense.flatten(1))
        elif x.device.type == "cpu":
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.group, self.scales_zeros)
        else:
            y = torch.ops.aten._weight_int4pack_mm(rows, self.codes, self.group, self.scales_zeros)
        return y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def to_dense(self) -> torch.Tensor:
        return self.columns(torch.arange(self.in_features, device=self.scales_zeros.device))

    def columns(self, indices: torch.Tensor) -> torch.Tensor:
        one_hot = F.one_hot(indices, self.in_features).to(self.dtype)
        return self(one_hot).T.contiguous()  # the order of codes in the kernels' format is not documented


def _int8_product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return F.linear(x, codes.to(x.dtype)) * scales


@functools.cache
def _compiled_int8_product() -> Callable[..., torch.Tensor]:
    return torch.compile(_int8_product, dynamic=True)
