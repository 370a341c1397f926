"""Matrices rounded to 8 or 4 bits: the codes and what they stand for. Knows nothing of kernels, models or files."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

KINDS = ("int8", "int4")
ROWS_AT_A_TIME = 1024  # of a matrix rounded, or turned back: pieces that stay in the cache

# An int4 scale holds for so many neighbours in a row, as in GPTQ (arXiv 2210.17323); the kernels know 128, 64 and 32.
GROUP_SIZE = 128


@dataclass
class Quantized:
    """A matrix in few bits: weight[i, j] stands for codes[i, j] * scales[i, j // group] + zeros[i, j // group].

    Attributes:
        kind: "int8": codes from -127 to 127, one group a row, no zeros; "int4": codes from -8 to 7, in groups.
        in_features: how many columns the matrix has; for int4, there may be more codes, for whole groups.
        codes: int8 [out_features, at least in_features].
        scales, zeros: float32 [out_features, groups]; zeros is None for int8.
    """

    kind: str
    in_features: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Quantized":
        moved = (None if t is None else t.to(device) for t in (self.codes, self.scales, self.zeros))
        return Quantized(self.kind, self.in_features, *moved)

    def to_dense(self) -> torch.Tensor:
        """The float32 values it stands for, [out_features, in_features]."""
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
    # Scales and zeros are first rounded to what the kernels keep, so that the codes are the best for those.
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
    """What a matrix is rounded to: rows that do not fill one group stay at 8 bits.

    Only toys have such rows. They gain little from 4 bits, and lose most: in stories260K, of 64 columns, int4
    throughout costs 14 % of perplexity, and in groups of 16 still 7 %.
    """
    return "int8" if in_features < GROUP_SIZE else kind


def group_size(in_features: int) -> int:
    """How many neighbours share an int4 scale: the largest of 128, 64, 32 that divides a row, 32 if none does."""
    return next((group for group in (GROUP_SIZE, 64, 32) if in_features % group == 0), 32)


def stacked(parts: list[Quantized]) -> Quantized:
    zeros = None if parts[0].zeros is None else torch.cat([part.zeros for part in parts])
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return Quantized(parts[0].kind, parts[0].in_features, codes, scales, zeros)
