"""Rotary position embedding: rotates each pair of numbers of a head by an angle proportional to the position.

Su et al. 2021 (arXiv 2104.09864). Knows nothing of models or files.
"""

import math

import torch


def rotary_frequencies(head_dim: int, theta: float, scale_factor: float | None = None) -> torch.Tensor:
    """Returns the rotation of each pair from one position to the next, in radians, float32 [head_dim / 2].

    Args:
        head_dim: numbers of a head.
        theta: the larger, the slower the slowest pairs: 10,000 in Llama 2, 500,000 in Llama 3.
        scale_factor: divides the frequencies of slow pairs, in Llama 3.1 and later; None: does nothing.
    """
    exponents = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scale_factor is None:
        return frequencies
    # Llama 3.1 extends a context of 8,192 positions. Pairs with less than one turn in it are slowed down by the factor,
    # pairs with more than 4 turns are unchanged, and those between are interpolated.
    low_freq_factor, high_freq_factor, original_context = 1.0, 4.0, 8192
    turns = original_context / (2 * math.pi / frequencies)
    blend = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - blend) * frequencies / scale_factor + blend * frequencies


def rotary_table(n_positions: int, head_dim: int, theta: float, scale_factor: float | None = None) -> torch.Tensor:
    """Returns cos and sin of the angles at every position, float32 [n_positions, head_dim / 2, 2]."""
    frequencies = rotary_frequencies(head_dim, theta, scale_factor)
    angles = torch.outer(torch.arange(n_positions, device="cpu").float(), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def apply_rotary_emb(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the pairs (0, 1), (2, 3), … of each head of queries and keys by the angles of their position.

    Args:
        xq, xk: [B, T, n_heads, head_dim] and [B, T, n_kv_heads, head_dim].
        freqs_cis: cos and sin, [T or B, T, head_dim / 2, 2], or the same as complex numbers, [T or B, T, head_dim / 2].
    """
    rotary = torch.view_as_real(freqs_cis) if freqs_cis.is_complex() else freqs_cis
    cos, sin = rotary.unsqueeze(-3).unbind(-1)  # [.., T, 1, head_dim / 2], for every head
    rotated = []
    for x in (xq, xk):
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        rotated.append(pairs.flatten(-2).type_as(x))
    return rotated[0], rotated[1]
