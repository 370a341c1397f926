"""From logits to the next token: pure tensor functions, and the random numbers that they use.

A row's result depends on that row alone. Knows nothing of models, caches or text.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch

# The tokens that top_p keeps are nearly always among the few hundred most likely. Selecting this many costs a tenth of
# sorting a vocabulary of 128,256; only a row that needs more is sorted whole.
N_CANDIDATES = 512


class RandomStream:
    """The random numbers of one sampled answer: a function of the arguments, a position and a token.

    Counter-based: nothing is drawn in sequence, so it does not matter which other answers were drawn before, in which
    batch, or on how many processes. Each model-parallel rank draws the same numbers without communication.

    Args:
        seed: the caller's.
        prompt: the ids of the prompt.
        occurrence: how many equal prompts came before this one in the call.
        sample: the index of the answer among those to this prompt.
    """

    def __init__(self, seed: int, prompt: Sequence[int], occurrence: int = 0, sample: int = 0):
        source = ",".join(map(str, [seed, occurrence, sample, *prompt]))
        self._key = hashlib.blake2b(source.encode(), digest_size=32).digest()

    def seed(self, position: int) -> int:
        """The seed, a signed 64-bit number, for the choice of the token at a position."""
        digest = hashlib.blake2b(struct.pack("<q", position), key=self._key, digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


def call_seed(seed: int, number: int) -> int:
    """The seed of a call without one: a function of the model's seed and of the number of such calls, this included."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest(), "little")


def uniforms(seeds: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A random number in (0, 1) for each seed and token: the output of SplitMix64 (Steele et al. 2014) at index id.

    `seeds` int64 [B, 1] and `ids` int64 [B or 1, n] give float64 [B, n], the same on every device.
    """
    # int64 arithmetic wraps as uint64 does; its right shift carries the sign down, which the masks cut off.
    z = seeds + (ids + 1) * -0x61C8864680B583EB  # the golden ratio times 2**64
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    z = z ^ (z >> 31 & (1 << 33) - 1)
    return ((z >> 12 & (1 << 52) - 1).double() + 0.5) / 2**52  # of 53 bits, the last number would round to 1


def filtered(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Filters each row by top_k, then top_p, then min_p. Sorts it by probability, ties by id.

    Args:
        probs: [B, vocab_size].
        top_k: [B or 1], 0 for all; tokens tied with the k-th are kept, as in Transformers.
        top_p: [B or 1], 1 for all.
        min_p: [B or 1], 0 for all.

    Returns:
        weights [B, n] float64, 0 for filtered tokens, not renormalised; ids [B, n] int64.
    """
    batch_size, vocab_size = probs.shape
    n = min(N_CANDIDATES, vocab_size)
    values, ids = probs.topk(n, dim=-1)
    weights, ids = _filter_sorted(*_sort(values, ids), top_k, top_p, min_p)
    # Exact if every token kept beats the last candidate: topk may have left out tokens that tie with it.
    unsure = ((weights > 0) & (weights <= values[:, -1:])).any(dim=-1) | (top_k > n)
    rows = unsure.nonzero().squeeze(-1)
    if n == vocab_size or len(rows) == 0:
        return weights, ids
    everything = torch.arange(vocab_size, device=probs.device).expand(len(rows), -1)
    settings = (setting.expand(batch_size)[rows] for setting in (top_k, top_p, min_p))
    all_weights, all_ids = _filter_sorted(*_sort(probs[rows], everything), *settings)
    padding = (0, vocab_size - n)
    weights = torch.nn.functional.pad(weights, padding).index_copy(0, rows, all_weights)
    return weights, torch.nn.functional.pad(ids, padding).index_copy(0, rows, all_ids)


def _sort(values: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row by value, largest first, then by id."""
    by_id = ids.argsort(dim=-1)
    values, order = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, by_id).gather(-1, order)


def _filter_sorted(
    values: torch.Tensor, ids: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`filtered` for sorted rows."""
    weights = values.double()
    k = torch.where(top_k > 0, top_k, values.shape[-1]).long().clamp(max=values.shape[-1])
    kth = weights.gather(-1, k[:, None].expand(len(values), 1) - 1)
    weights = weights.masked_fill(weights < kth, 0)
    sums = weights.cumsum(dim=-1)
    # top_p is a share of all probability, which is 1, or of what top_k has kept.
    total = torch.where((top_k > 0)[:, None], sums[:, -1:], 1.0)
    outside = (sums - weights >= top_p[:, None] * total) & (top_p[:, None] < 1)
    outside |= weights < min_p[:, None] * weights[:, :1]
    return weights.masked_fill(outside, 0), ids


def race(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index i with probability weights[i] / sum(weights), by one random number for each.

    Each i arrives after an exponential time of rate weights[i], and the first one wins (the Gumbel-max trick). Rounding
    matters only if two arrive at nearly the same time. In the usual inversion of a running sum, an error in one weight
    shifts all that follow, so answers would change with the shape of the batch.

    `weights` [B, n] are at least 0, and not all 0 in a row; `uniform` float64 [B, n] in (0, 1). Returns int64 [B].
    """
    return (-uniform.log() / weights).argmin(dim=-1)


def next_tokens(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """One token for each row: the most likely if its temperature is 0, else drawn from what the filters keep.

    Args:
        logits: float32 [B, vocab_size].
        seeds: int64 [B], for each row's random numbers.
        temperature, top_k, top_p, min_p: float64 [B]; 0, 1 and 0 turn a filter off.

    Returns:
        ids, int64 [B].
    """
    tokens = torch.empty_like(seeds)
    greedy = temperature == 0
    unfiltered = (top_k == 0) & (top_p >= 1) & (min_p == 0)
    for is_group in (greedy, ~greedy & unfiltered, ~greedy & ~unfiltered):
        rows = is_group.nonzero().squeeze(-1)
        if len(rows) == 0:
            continue
        group = logits if len(rows) == len(logits) else logits[rows]  # a copy would be as slow as the sampling
        if greedy[rows[0]]:
            tokens[rows] = group.argmax(dim=-1)
            continue
        # The peak is subtracted, and the temperature is not 0 in float32, so that nothing overflows.
        scaled = (group - group.amax(-1, keepdim=True)).div_(temperature[rows, None].float().clamp(min=1e-30))
        weights = torch.softmax(scaled, dim=-1, out=scaled)
        ids = torch.arange(logits.shape[-1], device=logits.device)[None]
        if not unfiltered[rows[0]]:
            weights, ids = filtered(weights, top_k[rows], top_p[rows], min_p[rows])
        winners = race(weights, uniforms(seeds[rows, None], ids))
        tokens[rows] = ids.expand(len(rows), -1).gather(-1, winners[:, None]).squeeze(-1)
    return tokens


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax(logits) at `tokens`: minus the cross-entropy. [..., vocab_size], [...] -> float32 [...]."""
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(dim=-1)


def top_logprobs(logits: torch.Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The k most likely (id, log-probability) of each row [T, vocab_size], best first."""
    values, ids = torch.log_softmax(logits, dim=-1).topk(k, dim=-1)
    return [list(zip(row_ids, row)) for row_ids, row in zip(ids.tolist(), values.tolist())]
