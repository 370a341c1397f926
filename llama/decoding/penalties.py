"""Changes logits before the next token is chosen: penalties, a caller's logits_processor, and constraints.

Knows nothing of models or text.
"""

from collections import Counter
from collections.abc import Mapping
from operator import attrgetter

import torch

from llama.decoding.grammar import SHAPES, Matcher
from llama.options import DecodingOptions, LogitsProcessor

# The options that change logits. Most answers have none of them, and need no `Processing`.
PENALTIES = ("logit_bias", "repetition_penalty", "no_repeat_ngram_size", "presence_penalty", "frequency_penalty")
PENALTIES += ("logits_processor",)
changes_of = attrgetter(*PENALTIES, *SHAPES)
NO_CHANGES = changes_of(DecodingOptions())


class Processing:
    """The `process` of a sequence: applies penalties, and sets the logits of tokens that do not fit to -inf.

    Its result depends only on the answer so far, so all beams of a search share it and a draft can use it.

    Args:
        prompt: ids.
        option: how the answer is decoded.
        matcher: the constraint on the answer, if any.
    """

    def __init__(self, prompt: list[int], option: DecodingOptions, matcher: Matcher | None):
        self._prompt, self._matcher = prompt, matcher
        names, values = (*PENALTIES, *SHAPES), changes_of(option)
        given = {name: value for name, value, no in zip(names, values, NO_CHANGES) if value != no}
        self._penalties = {name: value for name, value in given.items() if name in PENALTIES}
        self._names = " and ".join(given)

    def __str__(self) -> str:
        """The names of the options that it applies."""
        return self._names

    def __call__(self, logits: torch.Tensor, tokens: list[int], is_guess: bool = False) -> torch.Tensor:
        """Returns changed logits, float32 [vocab_size], of the token that follows `tokens` of the answer.

        With `is_guess`, `tokens` are a draft's proposals: a caller's logits_processor is not called with them. Raises
        ValueError if the logits_processor or the constraint fails.
        """
        penalties = self._penalties
        if is_guess and "logits_processor" in penalties:
            penalties = penalties | {"logits_processor": None}
        if penalties:
            logits = process_logits(logits, self._prompt + tokens, **penalties, n_prompt=len(self._prompt))
        return logits if self._matcher is None else self._matcher.mask(logits, tokens)


def process_logits(
    logits: torch.Tensor,
    ids: list[int],
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logits_processor: LogitsProcessor | None = None,
    n_prompt: int = 0,
) -> torch.Tensor:
    """Applies bias, penalties and logits_processor to one row, in the order of Transformers' `generate`.

    `logits`: float32 [vocab_size], not changed. `ids`: the prompt, which has `n_prompt` ids, and the answer so far. The
    others as in `DecodingOptions`. Raises ValueError if the processor raises, or returns another shape.
    """
    if logit_bias:
        tokens = torch.tensor(list(logit_bias), device=logits.device)
        bias = torch.tensor(list(logit_bias.values()), dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(0, tokens, bias)
    if repetition_penalty != 1:
        seen = torch.tensor(sorted(set(ids)), device=logits.device)
        scores = logits[seen]
        scores = torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
        logits = logits.index_copy(0, seen, scores)
    if no_repeat_ngram_size > 0:
        banned = _completions_of_ngrams(ids, no_repeat_ngram_size)
        logits = logits.index_fill(0, torch.tensor(banned, dtype=torch.long, device=logits.device), -torch.inf)
    if (presence_penalty or frequency_penalty) and len(ids) > n_prompt:
        counts = Counter(ids[n_prompt:])
        amounts = [-presence_penalty - count * frequency_penalty for count in counts.values()]
        tokens = torch.tensor(list(counts), device=logits.device)
        logits = logits.index_add(0, tokens, torch.tensor(amounts, dtype=logits.dtype, device=logits.device))
    if logits_processor is not None:
        name = getattr(logits_processor, "__name__", type(logits_processor).__name__)
        try:
            processed = logits_processor(torch.tensor([ids], device=logits.device), logits[None].clone())
        except (Exception, SystemExit) as error:  # errors in a caller's code fail its own prompt only
            raise ValueError(f"logits_processor {name} raised {type(error).__name__}: {error}") from error
        shape = list(getattr(processed, "shape", [])) or type(processed).__name__
        if shape != [1, len(logits)]:
            raise ValueError(f"logits_processor {name} returned {shape}: expected logits of shape {[1, len(logits)]}")
        logits = processed[0].to(logits)
    return logits


def _completions_of_ngrams(ids: list[int], n: int) -> list[int]:
    """Returns the tokens that would complete an n-gram that occurs in `ids` already."""
    if len(ids) < n:
        return []
    start = ids[len(ids) - n + 1 :]
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == start]
