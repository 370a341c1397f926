"""Matrices rounded to 8 or 4 bits: the codes, the values that they stand for, and the format of blocks. This file has
the simple way to write and read them; `kernels` does the same faster. Knows nothing of kernels, models or files.

A block holds 16 rows, so each row has a 32-bit lane in a vector of 64 bytes. For each group of columns, a block has a
line of 64 bytes with the scales and zeros of the rows, and then the codes as bytes:

    8 bits: one group. The line has 16 float32 scales. Then one line for every four columns: four signed codes per row.
    4 bits: the line has a zero and a scale for each row, both bfloat16. Then one line for every eight columns: four
            bytes per row. Byte i has the code of column i in its lower half and of column i + 4 in its upper half. 8 is
            added to each code.

In the last block, missing rows are zero bytes. Missing columns have code 0: for 8 bits up to a multiple of 64 columns,
for 4 bits up to a whole group.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

KINDS = ("int8", "int4")
BLOCK_ROWS, LINE = 16, 64  # rows of a block, bytes of a line
ROWS_AT_A_TIME = 1024  # how many rows to convert at a time, so that they stay in the processor's cache

# How many neighbours in a row share an int4 scale, as in GPTQ (arXiv 2210.17323). The kernels support 128, 64 and 32.
GROUP_SIZE = 128


@dataclass
class Quantized:
    """A matrix in few bits: weight[i, j] is codes[i, j] * scales[i, j // group] + zeros[i, j // group].

    Attributes:
        kind: "int8": codes from -127 to 127, one group per row, no zeros; "int4": codes from -8 to 7, in groups.
        in_features: number of columns of the matrix. For int4 there may be more codes, to fill the last group.
        codes: int8 [out_features, at least in_features].
        scales, zeros: float32 [out_features, groups]; zeros is None for int8.
    """

    kind: str
    in_features: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return len(self.codes)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device) -> "Quantized":
        moved = (None if t is None else t.to(device) for t in (self.codes, self.scales, self.zeros))
        return Quantized(self.kind, self.in_features, *moved)

    def to_dense(self) -> torch.Tensor:
        """Returns the rounded values, float32 [out_features, in_features]."""
        if self.zeros is None:
            return self.codes.float() * self.scales
        grouped = self.codes.float().unflatten(1, (self.scales.shape[1], -1))
        return (grouped * self.scales[:, :, None] + self.zeros[:, :, None]).flatten(1)[:, : self.in_features]


def quantize(weight: torch.Tensor, kind: str) -> Quantized:
    """Rounds a matrix to 8 bits with a scale for each row, or to 4 bits with a scale and a zero for each group.

    Args:
        weight: [out_features, in_features] of any floating dtype.
        kind: "int8" or "int4"; short rows get 8 bits in both (`kind_of_rows`).

    Raises:
        ValueError: the weight has values that are not finite.
    """
    kind = kind_of_rows(kind, weight.shape[1])
    return stacked([_rounded(rows, kind) for rows in weight.detach().split(ROWS_AT_A_TIME)])


def _rounded(weight: torch.Tensor, kind: str) -> Quantized:
    in_features = weight.shape[1]
    weight = weight.float()
    # Scales and zeros are first rounded to bfloat16, as the kernels store them. The codes are the best for these.
    if kind == "int8":
        scales = _checked(weight.abs().amax(dim=1, keepdim=True) / 127)
        return Quantized(kind, in_features, (weight / scales).round().clamp(-127, 127).to(torch.int8), scales)
    group = group_size(in_features)
    grouped = F.pad(weight, (0, -in_features % group)).unflatten(1, (-1, group))
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    scales = _checked((high - low) / 15)
    zeros = (low + 8 * scales).bfloat16().float()
    codes = ((grouped - zeros[:, :, None]) / scales[:, :, None]).round().clamp(-8, 7)
    return Quantized(kind, in_features, codes.flatten(1).to(torch.int8), scales, zeros)


def _checked(scales: torch.Tensor) -> torch.Tensor:
    if not bool(scales.isfinite().all()):  # a scale is not finite when a weight is not
        raise ValueError("a matrix has NaN or infinite values: look for damaged weights with `llama verify`")
    return scales.clamp(min=1e-12).bfloat16().float()


def kind_of_rows(kind: str, in_features: int) -> str:
    """Returns the kind that a matrix is rounded to: rows shorter than one group stay at 8 bits.

    Only toy models have such rows. They gain little from 4 bits and lose most: in stories260K, with 64 columns, int4
    for all matrices raises perplexity by 14 %, and by 7 % in groups of 16.
    """
    return "int8" if in_features < GROUP_SIZE else kind


def group_size(in_features: int) -> int:
    """How many columns share an int4 scale: the largest of 128, 64, 32 that divides a row, or 32 if none does."""
    return next((group for group in (GROUP_SIZE, 64, 32) if in_features % group == 0), 32)


def stacked(parts: list[Quantized]) -> Quantized:
    zeros = None if parts[0].zeros is None else torch.cat([part.zeros for part in parts])
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return Quantized(parts[0].kind, parts[0].in_features, codes, scales, zeros)


@dataclass
class Blocks:
    """A matrix in few bits, in the format of the kernels and of files.

    Attributes:
        kind: "int8" or "int4".
        out_features, in_features: the matrix's.
        data: uint8 [n_blocks, bytes of a block].
    """

    kind: str
    out_features: int
    in_features: int
    data: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.data.device

    @staticmethod
    def of(matrix: Quantized) -> "Blocks":
        is_int8, width = matrix.kind == "int8", matrix.codes.shape[1]
        missing = -len(matrix.codes) % BLOCK_ROWS
        codes = F.pad(matrix.codes, (0, -width % 64)).int() if is_int8 else matrix.codes.int() + 8
        codes = F.pad(codes, (0, 0, 0, missing)).unflatten(0, (-1, BLOCK_ROWS))  # [n_blocks, 16, columns]
        scales = F.pad(matrix.scales, (0, 0, 0, missing)).unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2).contiguous()
        if is_int8:
            lines = codes.unflatten(2, (1, -1, 4))
            heads = scales.view(torch.int32)
        else:
            low, high = codes.unflatten(2, (scales.shape[1], -1, 2, 4)).unbind(4)
            lines = low | high << 4
            zeros = F.pad(matrix.zeros, (0, 0, 0, missing)).unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2).contiguous()
            heads = scales.view(torch.int32) | zeros.view(torch.int32) >> 16 & 0xFFFF
        lines = lines.permute(0, 2, 3, 1, 4).flatten(2).to(torch.uint8)  # [n_blocks, groups, bytes]
        data = torch.cat([heads.view(torch.uint8), lines], dim=2).flatten(1)
        return Blocks(matrix.kind, len(matrix.codes), matrix.in_features, data)

    def to(self, device: torch.device) -> "Blocks":
        return Blocks(self.kind, self.out_features, self.in_features, self.data.to(device))

    def rows(self, start: int, stop: int) -> "Blocks | Quantized":
        """Returns some of the rows; a view if these are whole blocks."""
        if start % BLOCK_ROWS or (stop % BLOCK_ROWS and stop != self.out_features):
            whole = self.quantized()
            zeros = None if whole.zeros is None else whole.zeros[start:stop]
            return Quantized(self.kind, self.in_features, whole.codes[start:stop], whole.scales[start:stop], zeros)
        data = self.data[start // BLOCK_ROWS : -(-stop // BLOCK_ROWS)]
        return Blocks(self.kind, stop - start, self.in_features, data)

    def scales_and_zeros(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in `Quantized`."""
        n_groups = 1 if self.kind == "int8" else -(-self.in_features // group_size(self.in_features))
        heads = self.data.unflatten(1, (n_groups, -1))[:, :, :LINE].contiguous().view(torch.int32)
        heads = heads.transpose(1, 2).flatten(0, 1)[: self.out_features].contiguous()  # [out_features, groups]
        if self.kind == "int8":
            return heads.view(torch.float32), None
        return (heads & -65536).view(torch.float32), (heads << 16).view(torch.float32)

    def to_dense(self, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the rounded values, float32 [out_features, in_features], or some columns of them."""
        return self.quantized(columns).to_dense()

    def quantized(self, columns: torch.Tensor | None = None) -> Quantized:
        """Returns the codes of all columns, or of some columns with a scale and a zero for each of these."""
        scales, zeros = self.scales_and_zeros()
        group = self.in_features if zeros is None else group_size(self.in_features)
        n_columns = self.in_features if zeros is None else scales.shape[1] * group
        chosen = torch.arange(n_columns, device=self.data.device) if columns is None else columns
        lane = torch.arange(BLOCK_ROWS, device=self.data.device)[:, None]
        if zeros is None:
            at = LINE + chosen // 4 * LINE + lane * 4 + chosen % 4
        else:
            at = chosen // group * (LINE + group * 8) + LINE + chosen % group // 8 * LINE + lane * 4 + chosen % 4
        parts = [part[:, at].flatten(0, 1) for part in self.data.split(ROWS_AT_A_TIME // BLOCK_ROWS)]
        codes = torch.cat(parts)[: self.out_features]  # uint8 [out_features, columns]
        if zeros is None:
            return Quantized(self.kind, len(chosen), codes.view(torch.int8), scales)
        codes = (codes >> chosen % 8 // 4 * 4 & 15).to(torch.int8) - 8
        if columns is not None:
            scales, zeros = scales[:, columns // group], zeros[:, columns // group]
        return Quantized(self.kind, self.in_features if columns is None else len(columns), codes, scales, zeros)


def block_bytes(kind: str, in_features: int) -> int:
    """Bytes of a block. `kind` is the result of `kind_of_rows`."""
    if kind == "int8":
        return LINE + -(-in_features // 64) * 64 * BLOCK_ROWS
    group = group_size(in_features)
    return -(-in_features // group) * (LINE + group * BLOCK_ROWS // 2)
