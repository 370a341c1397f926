"""Attention, softmax(q k^T) v: which keys a query sees, and the fastest way to compute it on each device.

Knows nothing of models, or of where queries and keys come from.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from llama.layers import kernels

# With at least this many keys, a decode step on a CPU uses our own kernel.
LONG = 256
# With at least this many queries, a CPU is faster if query heads that share a key head run separately.
MANY = 64

# Position of the first column of a pass: one for all rows, or one for each row [B]; None: 0.
Starts = int | list[int] | torch.Tensor | None


@dataclass
class CacheView:
    """The part of a layer's keys and values that one forward pass of B rows and T positions uses."""

    first_slot: int  # of B adjacent slots, so that reading them copies nothing
    positions: slice | torch.Tensor  # where each new position belongs: the same in all rows, or [B, T]
    length: int  # how many positions of each row are read: as many as the longest row has, new ones included

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new keys and values `k` and `v`, [B, n_kv_heads, T, head_dim], into a layer's `keys` and `values`.

        Returns:
            the layer's keys and values up to `length`, each [B, n_kv_heads, length, head_dim].
        """
        rows = slice(self.first_slot, self.first_slot + k.shape[0])
        if isinstance(self.positions, slice):
            keys[rows, :, self.positions] = k
            values[rows, :, self.positions] = v
        else:
            slots = torch.arange(rows.start, rows.stop, device=k.device)
            # Index tensors on both sides of a full slice put their dimensions first: [B, T, n_kv_heads, head_dim].
            keys[slots[:, None], :, self.positions] = k.transpose(1, 2)
            values[slots[:, None], :, self.positions] = v.transpose(1, 2)
        return keys[rows, :, : self.length], values[rows, :, : self.length]


# Where a pass belongs in the cache: at this position of the first B rows, or in this view; None without a cache.
Place = int | CacheView | None

# Which keys a query sees: a tensor [.., T, length], True or 0 if it does, False or -inf if not; "causal": the keys up
# to its own position, if there are as many keys as queries; None: all keys.
Mask = torch.Tensor | Literal["causal"] | None


def as_list(start_pos: int | torch.Tensor | None) -> list[int]:
    """Returns a list with one position for all rows, or with one for each row."""
    start_pos = start_pos.tolist() if isinstance(start_pos, torch.Tensor) else start_pos
    return start_pos if isinstance(start_pos, list) else [int(start_pos or 0)]


def positions_and_mask(starts: list[int], n_new: int, device: torch.device) -> tuple[slice | torch.Tensor, Mask]:
    """Returns the positions of the new tokens of each row, and which keys they see.

    Args:
        starts: the position of the first new token: one for all rows, or one for each row.
        n_new: how many new tokens each row has.
        device: of the result.

    Returns:
        The positions: a slice if they are the same in all rows, else [B, n_new]. The mask: "causal", None (see `Mask`),
        [n_new, length] or [B, 1, n_new, length], where length is that of the longest row.
    """
    if min(starts) == max(starts):
        positions = slice(starts[0], starts[0] + n_new)
        if n_new == 1 or starts[0] == 0:
            return positions, None if n_new == 1 else "causal"
        return positions, causal_mask(torch.arange(positions.start, positions.stop, device=device), positions.stop)
    positions = torch.tensor(starts, device=device)[:, None] + torch.arange(n_new, device=device)
    return positions, causal_mask(positions, max(starts) + n_new)[:, None]


def causal_mask(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Which keys at 0, 1, … length - 1 the queries at `positions` see: [.., T] -> bool [.., T, length]."""
    return torch.arange(length, device=positions.device) <= positions[..., None]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Returns, for each query, the mean of the values weighted by softmax(q k^T / sqrt(head_dim)).

    Args:
        q: [B, n_heads, T, head_dim].
        k, v: [B, n_kv_heads, length, head_dim]. n_heads / n_kv_heads query heads share one of their heads.
        mask: [T, length], [B or 1, 1 or n_heads, T, length], or another `Mask`.

    Returns:
        [B, n_heads, T, head_dim].
    """
    group, n_new = q.shape[1] // k.shape[1], q.shape[2]
    if isinstance(mask, str) and n_new > 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
    mask = None if isinstance(mask, str) else mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if n_new >= MANY and q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=group > 1)
    # Queries that share a key head become rows of one longer query, so that each key is read once for all of them. For
    # few queries on a CPU this is faster than `enable_gqa`; on CUDA with a mask it is the only fused way.
    q = q.unflatten(1, (-1, group)).flatten(2, 3)  # [B, n_kv_heads, group * T, head_dim]
    if n_new == 1 and q.device.type == "cpu":
        if torch.compiler.is_compiling():
            return _attend_to_rows(q, k, v, mask).flatten(1, 2)[:, :, None]
        if k.shape[2] >= LONG and _supports(q, k, v, mask):
            return _attend_to_long_rows(q, k, v, mask).flatten(1, 2)[:, :, None]
    if mask is not None:
        of_each_head = mask.dim() > 2 and mask.shape[-3] > 1
        mask = mask.unflatten(-3, (-1, group)).flatten(-3, -2) if of_each_head else torch.cat([mask] * group, dim=-2)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.unflatten(2, (group, n_new)).flatten(1, 2)


def _attend_to_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of queries at one position, [B, n_kv_heads, group, head_dim], for torch.compile on a CPU.

    The compiler turns the sums over rows of k into float32 loops. With long contexts and few queries, these are two to
    three times as fast as SDPA, which multiplies matrices.
    """
    scores = torch.stack([(k.float() * query.float()[:, :, None]).sum(-1) for query in q.unbind(2)], dim=2)
    scores = scores * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).type_as(v) @ v


def _supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `attention.cpp` could be compiled and supports these arguments."""
    has_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    is_plain = type(q) is type(k) is type(v) is torch.Tensor and not torch._C._are_functorch_transforms_active()
    fits = q.dtype in kernels.TYPES and q.shape[-1] % 16 == 0 and q.shape[-1] <= 256
    whole = k.stride(-1) == v.stride(-1) == 1 and (mask is None or (mask.dtype == torch.bool and mask.stride(-1) == 1))
    whole = whole and (mask is None or mask.dim() < 3 or mask.shape[-3] == 1)
    return not has_gradient and is_plain and fits and whole and _kernel() is not None


@functools.cache
def _kernel() -> Callable[..., int] | None:
    try:
        found = kernels.compiled("attention", "-ffp-contract=fast").attend_to_rows
    except (OSError, RuntimeError):  # without a compiler, PyTorch's attention serves
        return None
    found.argtypes = [*[ctypes.c_void_p] * 6, ctypes.c_float, ctypes.c_int, ctypes.c_int]
    return found


def _attend_to_long_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """As `_attend_to_rows`, with our own kernel. SDPA reads long contexts at half the memory's speed or less.

    The kernel reads only those keys of a row that the mask lets it see.
    """
    (n_rows, n_heads, n_queries, head_dim), length = q.shape, k.shape[2]
    q, y, where = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format), (0, 0)
    if mask is not None:
        mask = mask.expand(n_rows, 1, 1, length)
        where = mask.stride(0), mask.stride(2)
    sizes = (n_rows, n_heads, n_queries, 1, length, head_dim, *k.stride()[:3], *v.stride()[:3], *where)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in (q, k, v, y, mask)]
    numbers, dtype = (ctypes.c_int64 * len(sizes))(*sizes), kernels.TYPES[q.dtype]
    if not _kernel()(*addresses, numbers, head_dim**-0.5, dtype, torch.get_num_threads()):
        raise RuntimeError(f"attention.cpp has no {q.dtype} of head_dim {head_dim}")
    return y
