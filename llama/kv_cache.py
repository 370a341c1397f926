"""The keys and values of past positions, one row (slot) per running sequence, and which prompt each slot holds.

A slot is not cleared when its sequence ends: the next one overwrites position after position, and never reads past
what it has written. A new prompt that begins like what a slot holds reuses its keys. Knows nothing of text, sampling or
when a sequence ends.
"""

import math
import mmap
import sys

import torch

# A shared prefix shorter than this is not worth copying.
MIN_SHARED_PREFIX = 16


class KVCache:
    """For each layer a tensor of keys and one of values, [max_batch_size, n_kv_heads, max_seq_len, head_dim].

    The positions of a head are contiguous, so that attention at one row reads each head as one stream.
    """

    def __init__(self, n_layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str):
        # Zeros and not empty memory: attention multiplies masked values by a weight of 0, and 0 x NaN is NaN.
        # A tensor for each layer, because a compiler mistakes part of a tensor for all of it.
        self.keys = [_zeros(shape, dtype, device) for _ in range(n_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(n_layers)]

    @property
    def max_batch_size(self) -> int:
        return self.keys[0].shape[0]

    @property
    def max_seq_len(self) -> int:
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def move(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copies positions [start, stop) from source to target rows; reads all sources before it writes a target."""
        for tensor in (*self.keys, *self.values):
            if len(sources) == 1:
                tensor[targets[0], :, start:stop] = tensor[sources[0], :, start:stop]
            else:
                tensor[targets, :, start:stop] = tensor[sources, :, start:stop]  # the right side is a copy


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Zeros; on the CPU they are fresh pages, which take memory only when something is written to them."""
    if torch.device(device).type != "cpu" or sys.platform == "win32":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class Slots:
    """What the slots of a cache hold: `tokens[slot]` are ids whose keys it has, from position 0 on."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.tokens: list[list[int]] = [[] for _ in range(cache.max_batch_size)]
        self._last_used = [0] * cache.max_batch_size
        self._clock = 0
        self._age = 0  # how often the model may have changed
        self._ages = [0] * cache.max_batch_size  # the model's age when each slot's keys were made

    def __len__(self) -> int:
        return len(self.tokens)

    def record(self, slot: int, position: int, ids: list[int]) -> None:
        """Records that the keys of `ids` were written from `position` on; those before it are unchanged."""
        del self.tokens[slot][position:]
        self.tokens[slot] += ids
        self._clock += 1
        self._last_used[slot] = self._clock

    def find(self, prompt: list[int], limit: int) -> tuple[int, int]:
        """The slot with the longest prefix of a prompt, and its length: at most `limit`, and 0 if it is too short."""
        best, longest = 0, 0
        for slot, tokens in enumerate(self.tokens):
            if self._ages[slot] == self._age and (n := shared_prefix(prompt, tokens, limit)) > longest:
                best, longest = slot, n
        return best, longest

    def take(self, slot: int, source: int, shared: int) -> None:
        """Prepares a slot, the first free one, for a prompt whose first `shared` positions are in slot `source`.

        What the slot held may serve another prompt, so it moves to the least recently used free slot.
        """
        if shared and source >= slot:  # the source is free too
            self.swap(slot, source)
        else:
            self.swap(slot, min(range(slot, len(self)), key=self._last_used.__getitem__))
            if shared:
                self.copy([source], [slot], 0, shared)
        del self.tokens[slot][shared:]
        self._ages[slot] = self._age

    def copy(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copies positions [start, stop) from source to target slots, which hold the same positions before `start`."""
        self.cache.move(sources, targets, start, stop)
        for source, target in zip(sources, targets):
            self.tokens[target][start:] = self.tokens[source][start:stop]
            self._ages[target] = self._ages[source]

    def spare_position(self, slot: int) -> int:
        """A position of a slot that may be overwritten: the first unused one, or in a full slot the last one."""
        del self.tokens[slot][self.cache.max_seq_len - 1 :]
        return len(self.tokens[slot])

    def swap(self, a: int, b: int) -> None:
        """Exchanges what two slots hold."""
        if a == b:
            return
        self.cache.move([a, b], [b, a], 0, max(len(self.tokens[a]), len(self.tokens[b])))
        for record in (self.tokens, self._last_used, self._ages):
            record[a], record[b] = record[b], record[a]

    def outdate(self) -> None:
        """Records that the model may have changed: new prompts do not reuse keys that were made before."""
        self._age += 1

    def forget(self) -> None:
        """Forgets what all slots hold."""
        self.tokens = [[] for _ in self.tokens]
        self._last_used = [0] * len(self.tokens)


def shared_prefix(prompt: list[int], tokens: list[int], limit: int) -> int:
    """How many keys of `tokens` a prompt can reuse, at most `limit`; 0 if too few to be worth copying."""
    n = min(limit, len(tokens))
    if prompt[:n] != tokens[:n]:
        n = next(i for i in range(n) if prompt[i] != tokens[i])
    return n if n >= min(MIN_SHARED_PREFIX, limit) else 0
