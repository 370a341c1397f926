"""Which tokens' keys and values each row (slot) of the cache holds, so that a prompt that begins alike need not be run.

Knows nothing of sequences or when they end. A slot's record never says more than is there.
"""

from llama.kv_cache import KVCache

# A shared beginning shorter than this is not worth copying.
MIN_SHARED_PREFIX = 16


class Slots:
    """The record of a cache's slots. `tokens[slot]` are the ids whose keys it holds, from position 0 on."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.tokens: list[list[int]] = [[] for _ in range(cache.max_batch_size)]
        self._last_used = [0] * cache.max_batch_size
        self._clock = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def record(self, slot: int, position: int, ids: list[int]) -> None:
        """Says that keys have been written from `position` on, and that those before it are still there."""
        del self.tokens[slot][position:]
        self.tokens[slot] += ids
        self._clock += 1
        self._last_used[slot] = self._clock

    def find(self, prompt: list[int]) -> tuple[int, int]:
        """The slot that holds the longest beginning of a prompt, and its length; 0 if none is worth while."""
        lengths = [shareable(prompt, tokens) for tokens in self.tokens]
        slot = max(range(len(lengths)), key=lengths.__getitem__)
        return slot, lengths[slot]

    def take(self, slot: int, source: int, shared: int) -> None:
        """Gives a slot, the first free one, the first `shared` positions of another, and forgets the rest of it.

        What it held, another prompt may still begin with: it goes to the free slot that has longest been left alone.
        """
        if shared and source >= slot:  # that one is free as well
            self.swap(slot, source)
        else:
            self.swap(slot, min(range(slot, len(self)), key=self._last_used.__getitem__))
            if shared:
                self.cache.move([source], [slot], 0, shared)
                self.tokens[slot] = self.tokens[source][:shared]
        del self.tokens[slot][shared:]

    def spare_position(self, slot: int) -> int:
        """A position of a slot that may be overwritten: the one after what it holds, given up where it is full."""
        del self.tokens[slot][self.cache.max_seq_len - 1 :]
        return len(self.tokens[slot])

    def swap(self, a: int, b: int) -> None:
        """Exchanges what two slots hold."""
        if a == b:
            return
        self.cache.move([a, b], [b, a], 0, max(len(self.tokens[a]), len(self.tokens[b])))
        for record in (self.tokens, self._last_used):
            record[a], record[b] = record[b], record[a]

    def forget(self, first: int = 0) -> None:
        """Forgets what the slots from `first` on hold."""
        for slot in range(first, len(self)):
            self.tokens[slot], self._last_used[slot] = [], 0


def shareable(prompt: list[int], tokens: list[int]) -> int:
    """How many of the keys of `tokens` serve a prompt; its last token is always run, for the logits after it."""
    n = min(len(prompt) - 1, len(tokens))
    if prompt[:n] != tokens[:n]:
        n = next(i for i in range(n) if prompt[i] != tokens[i])
    return n if n >= min(MIN_SHARED_PREFIX, len(prompt) - 1) else 0
