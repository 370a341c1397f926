"""The keys and values of past positions: one row (slot) per running sequence.

Knows nothing of text, sampling or when a sequence ends. A slot is not cleared when it is handed on: whoever takes it
overwrites position after position, and never looks past what it has written.
"""

import math
import mmap
import sys
from dataclasses import dataclass

import torch


class KVCache:
    """Keys and values of every layer, [n_layers, max_batch_size, n_kv_heads, max_seq_len, head_dim] each.

    The positions of one head lie next to each other, so that attention at one row reads each head as one stream.
    """

    def __init__(
        self,
        n_layers: int,
        max_batch_size: int,
        n_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        # Zeros and not empty memory: attention multiplies what it masks out by a weight of 0, and 0 x NaN is NaN.
        shape = (n_layers, max_batch_size, n_kv_heads, max_seq_len, head_dim)
        self.keys = _zeros(shape, dtype, device)
        self.values = _zeros(shape, dtype, device)

    @property
    def max_batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def max_seq_len(self) -> int:
        return self.keys.shape[3]

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one row to another."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]

    def swap_slots(self, a: int, b: int, length: int) -> None:
        """Exchanges the first `length` positions of two rows."""
        for tensor in (self.keys, self.values):
            kept = tensor[:, a, :, :length].clone()
            tensor[:, a, :, :length] = tensor[:, b, :, :length]
            tensor[:, b, :, :length] = kept


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Zeros; on the CPU, fresh pages of the system, which take memory only once something is written to them."""
    if torch.device(device).type != "cpu" or sys.platform == "win32":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@dataclass
class CacheView:
    """The part of the cache that one forward pass of B rows and T positions works on.

    Attributes:
        cache: the whole.
        slots: the B rows, next to each other, so that nothing is copied when reading.
        positions: where in its row each new position goes: a slice of T if all rows agree, else a tensor [B, T].
        length: how many positions of each row are read: the longest row's, counting the new ones.
    """

    cache: KVCache
    slots: slice
    positions: slice | torch.Tensor
    length: int

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new keys and values of a layer, and returns all of its keys and values up to `length`.

        Args:
            layer: which layer, from 0.
            k, v: [B, n_kv_heads, T, head_dim].

        Returns:
            keys and values, [B, n_kv_heads, length, head_dim].
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if isinstance(self.positions, slice):
            keys[self.slots, :, self.positions] = k
            values[self.slots, :, self.positions] = v
        else:
            slots = torch.arange(self.slots.start, self.slots.stop, device=k.device)
            # Index tensors on both sides of a full slice put their dimensions first: [B, T, n_kv_heads, head_dim].
            keys[slots[:, None], :, self.positions] = k.transpose(1, 2)
            values[slots[:, None], :, self.positions] = v.transpose(1, 2)
        return keys[self.slots, :, : self.length], values[self.slots, :, : self.length]
