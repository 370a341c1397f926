"""Logits to the next token: pure tensor functions, and where their random numbers come from.

Knows nothing of models, caches or text. A row's result depends on that row alone.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch

# The nucleus of a language model's distribution is nearly always within its first few hundred tokens. Selecting
# this many costs a tenth of sorting a vocabulary of 128,256; only a row that needs more is sorted whole.
N_CANDIDATES = 1024


class RandomStream:
    """The random numbers of one sampled answer, each a function of what identifies the answer and of a position.

    A counter-based generator: number i is a hash of (key, i), so it does not matter which other answers were drawn
    before, in which batch, or on how many processes, and each model-parallel rank draws the same without being told.

    Args:
        seed: the caller's.
        prompt: the ids of the prompt.
        occurrence: how many equal prompts came before this one in the call.
        sample: which of the answers to this prompt.
    """

    def __init__(self, seed: int, prompt: Sequence[int], occurrence: int = 0, sample: int = 0):
        identity = ",".join(map(str, [seed, occurrence, sample, *prompt]))
        self._key = hashlib.blake2b(identity.encode(), digest_size=32).digest()

    def uniform(self, position: int) -> float:
        """A number in [0, 1), of 48 random bits: few enough that its product with a float64 sum stays below the sum."""
        digest = hashlib.blake2b(struct.pack("<q", position), key=self._key, digest_size=6).digest()
        return int.from_bytes(digest, "little") / 2**48


def sample_top_p(probs: torch.Tensor, p: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws from the nucleus: the smallest set of most likely tokens that holds at least `p` of the probability.

    Tokens of equal probability enter in the order of their ids. (Meta's function of this name also keeps the next
    token when the set holds exactly `p`.) Holtzman et al. 2019, arXiv 1904.09751.

    Args:
        probs: probabilities, [..., vocab_size].
        p: in (0, 1].
        generator: PyTorch's global one when None.

    Returns:
        ids, int64 [..., 1].

    Raises:
        ValueError: `p` outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p = {p}: expected a number in (0, 1]")
    rows = probs.reshape(-1, probs.shape[-1])
    weights, ids = nucleus(rows, torch.full((len(rows),), float(p), dtype=torch.float64, device=probs.device))
    drawn = torch.multinomial(weights, num_samples=1, generator=generator)
    return ids.gather(-1, drawn).reshape(*probs.shape[:-1], 1)


def nucleus(probs: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely tokens of each row up to a mass of `p`, most likely first, ties by id.

    Args:
        probs: [B, vocab_size].
        p: [B] float64, in (0, 1]; a row with 1 keeps everything.

    Returns:
        weights [B, n] float64, 0 for what is outside the nucleus, not renormalised; ids [B, n] int64.
    """
    vocab_size = probs.shape[-1]
    n = min(N_CANDIDATES, vocab_size)
    values, ids = probs.topk(n, dim=-1)
    if n < vocab_size:
        # Exact only if the nucleus ends among candidates that beat the last one: of the tokens that tie with the
        # last, topk has left some out. The sum is float64, as below, so that both ways agree on where the end is.
        beats_last = values > values[:, -1:]
        if not bool(((values.double() * beats_last).sum(-1) >= p).all()):
            values, ids = probs, torch.arange(vocab_size, device=probs.device).expand_as(probs)
    by_id = ids.argsort(dim=-1)
    ids, values = ids.gather(-1, by_id), values.gather(-1, by_id)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    ids, weights = ids.gather(-1, order), values.double()
    mass_before = weights.cumsum(-1) - weights
    outside = (mass_before >= p[:, None]) & (p[:, None] < 1)
    return weights.masked_fill(outside, 0), ids


def inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index i with probability weights[i] / sum(weights): the first at which the running sum exceeds uniform x sum.

    Args:
        weights: float64 [B, n], each row with a positive sum.
        uniform: float64 [B], in [0, 1).

    Returns:
        int64 [B].
    """
    sums = weights.cumsum(-1)
    return torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True).squeeze(-1)


def next_tokens(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """One token a row: the most likely where temperature is 0, else drawn from the nucleus.

    Args:
        logits: float32 [B, vocab_size].
        temperature, top_p, uniform: float64 [B]; `uniform` are the rows' random numbers.

    Returns:
        ids, int64 [B].
    """
    tokens = logits.argmax(dim=-1)
    sampled = (temperature > 0).nonzero().squeeze(-1)
    if len(sampled) == 0:
        return tokens
    probs = torch.softmax(logits[sampled] / temperature[sampled, None].float(), dim=-1)
    top_p, uniform = top_p[sampled], uniform[sampled]
    whole = top_p >= 1  # no nucleus to find: the vocabulary in its own order will do
    drawn = torch.empty_like(sampled)
    if bool(whole.any()):
        drawn[whole] = inverse_cdf(probs[whole].double(), uniform[whole])
    if not bool(whole.all()):
        weights, ids = nucleus(probs[~whole], top_p[~whole])
        drawn[~whole] = ids.gather(-1, inverse_cdf(weights, uniform[~whole])[:, None]).squeeze(-1)
    tokens[sampled] = drawn
    return tokens


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax(logits) at `tokens`: minus the cross-entropy. [..., vocab_size], [...] -> float32 [...]."""
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(dim=-1)
