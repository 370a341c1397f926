"""A prompt and its answer so far: what the engine runs, and how it gets its next token.

Knows nothing of models, slots or text. A sequence is filled in place while it runs; whoever added it to the engine
reads it once it has ended.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from llama.options import DecodingOptions
from llama.sampling import RandomStream, next_tokens, process_logits, token_logprobs, top_logprobs

UNUSABLE_LOGITS = "the model's logits are NaN or infinite: look for damaged weights with `llama verify`"


@dataclass
class Speculation:
    """How often proposed tokens were right (`llama.decoding.speculative`); all 0 without a draft.

    Attributes:
        steps: passes of the model after the prefill, counted for each sequence.
        proposed, accepted: tokens proposed to it, and those of them that it chose too.
    """

    steps: int = 0
    proposed: int = 0
    accepted: int = 0


@dataclass(eq=False)
class Sequence:
    """A prompt and its answer so far.

    Attributes:
        prompt: the ids to continue, at least one.
        max_new_tokens: the answer's budget; with 0 the prompt is only scored.
        options: how the tokens are chosen.
        random: where the random numbers come from.
        stop_tokens: ids that end the answer, and are not part of it.
        should_stop: called with the answer after each token; True ends it there.
        logprobs: whether to keep the log-probability of each token of the answer.
        score_from: from which token on the prompt itself is scored; None: not at all.
        search: who chooses the tokens, where that is not the engine: a beam search.
        constraint: which tokens may come next, where the answer is to have a given shape.
        tokens: the answer.
        token_logprobs: of each token of the answer, in nats.
        prompt_token_logprobs: of each token of the prompt from `score_from` on, given those before it; 0 for the first
            token of a prompt.
        top_logprobs, prompt_top_logprobs: `options.top_logprobs` (id, log-probability) for each of them, best first.
        n_cached: how many of the prompt's keys and values were in the cache already.
        prompt_is_greedy: whether greedy decoding would have chosen every scored token of the prompt.
        finish_reason: "stop", "length" or "error" once it has ended.
        error: what went wrong, for "error".
        cause: the exception of the caller's own code behind the error.
        speculation: how often the tokens proposed for it were right.
    """

    prompt: list[int]
    max_new_tokens: int
    options: DecodingOptions
    random: RandomStream | None = None
    stop_tokens: frozenset[int] = frozenset()
    should_stop: Callable[[list[int]], bool] | None = None
    logprobs: bool = False
    score_from: int | None = None
    search: "Search | None" = None
    constraint: "Constraint | None" = None
    tokens: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    prompt_token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    n_cached: int = 0
    prompt_is_greedy: bool = True
    finish_reason: str | None = None
    error: str | None = None
    cause: BaseException | None = None
    speculation: Speculation = field(default_factory=Speculation)

    @property
    def n_slots(self) -> int:
        """How many rows of the cache it needs at most."""
        return 1 if self.search is None else self.search.n_slots

    @property
    def n_prefill(self) -> int:
        """How many tokens of the prompt the model must see: the last one's logits matter only if an answer follows."""
        if self.max_new_tokens == 0:
            return 0 if self.score_from is None else len(self.prompt) - 1
        return len(self.prompt)

    @property
    def n_reusable(self) -> int:
        """How many of the prompt's keys may come from the cache: where logits are needed, the model must run."""
        n = self.n_prefill - 1
        return max(0, n if self.score_from is None else min(n, self.score_from - 1))

    def append(self, token: int) -> bool:
        """Takes the next token; False if it ended the answer instead of joining it."""
        if token in self.stop_tokens:
            self.finish_reason = "stop"
            return False
        self.tokens.append(token)
        if self.constraint is not None:
            self.constraint.accept(token)
        is_whole = self.constraint is not None and self.constraint.is_complete
        if (self.should_stop is not None and self.should_stop(self.tokens)) or is_whole:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_new_tokens:
            self.finish_reason = "length"
        return True

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [vocab_size] of the next token after the options' penalties, -inf where the shape rules it out.

        Raises:
            ValueError: a logits_processor raised, or no token can come next.
        """
        options, constraint = self.options, self.constraint
        if options.has_penalties:
            logits = process_logits(logits, self.prompt + self.tokens, **options.penalties, n_prompt=len(self.prompt))
        return logits if constraint is None else constraint.mask(logits)

    def fail(self, error: Exception | str) -> None:
        """Ends the sequence with an error."""
        self.finish_reason, self.error = "error", str(error)
        self.cause = error.__cause__ if isinstance(error, Exception) else None


class Constraint(Protocol):
    """The shape of one answer, and how far the answer is."""

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [vocab_size], -inf at the tokens that cannot come next; raises ValueError if none can."""

    def accept(self, token: int) -> None:
        """Takes the next token of the answer."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing may follow."""

    def copy(self) -> "Constraint":
        """Another of the same state, for another continuation."""


class Search(Protocol):
    """Several continuations of one prompt, chosen together: the beams of a beam search.

    Attributes:
        sequence: the prompt's; it ends with the search.
        n_slots: the most beams.
        beams: those that run, each a sequence with this search, best first; at first the prompt's sequence alone.
    """

    sequence: Sequence
    n_slots: int
    beams: list[Sequence]

    def advance(self, logprobs: torch.Tensor) -> list[int]:
        """Puts the beams that go on in place of those that have run; none are left once the search has ended.

        Args:
            logprobs: of the token after each beam, float32 [len(beams), vocab_size].

        Returns:
            for each new beam, the index of the one that it continues.
        """


def choose(sequences: list[Sequence], logits: torch.Tensor) -> list[int]:
    """Gives each sequence its next token by its options, and returns them all, also those that ended an answer.

    A sequence whose logits cannot be used, or whose logits_processor raises, fails; the others go on.

    Args:
        sequences: B of them.
        logits: after the last token of each, float32 [B, vocab_size].
    """
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    peaks = logits.amax(dim=-1).tolist()
    chosen_from = logits
    for row, sequence in enumerate(sequences):
        options, processed = sequence.options, None
        try:
            if not math.isfinite(peaks[row]):
                raise ValueError(UNUSABLE_LOGITS)
            if options.has_penalties or sequence.constraint is not None:
                processed = sequence.process(logits[row])
                if not math.isfinite(peak := processed.amax().item()):
                    shaped = f" that the {options.shape[0]} allows" if options.shape else ""
                    left = "no token to choose" if peak == -math.inf else f"a logit of {peak}"
                    raise ValueError(f"{options.penalty_names} left {left}{shaped}")
        except ValueError as error:
            sequence.fail(error)
            processed = torch.zeros_like(logits[row])  # for a token that is not kept
        if processed is not None:
            chosen_from = logits.clone() if chosen_from is logits else chosen_from
            chosen_from[row] = processed
    chosen = draw(sequences, chosen_from)
    logprobs = token_logprobs(logits, chosen).tolist() if any(s.logprobs for s in sequences) else None
    tokens = chosen.tolist()
    for row, (sequence, token) in enumerate(zip(sequences, tokens)):
        if sequence.finish_reason is None and sequence.append(token) and sequence.logprobs:
            sequence.token_logprobs.append(logprobs[row])
            if sequence.options.top_logprobs:
                sequence.top_logprobs += top_logprobs(logits[row : row + 1], sequence.options.top_logprobs)
    return tokens


def draw(sequences: list[Sequence], logits: torch.Tensor, ahead: int = 0) -> torch.Tensor:
    """One token for each sequence, by its options and the random numbers of its next position, or one `ahead` of that.

    Args:
        sequences: B of them.
        logits: float32 [B, vocab_size], after the penalties.
        ahead: how many tokens, not yet in the sequences, come before.

    Returns:
        ids, int64 [B].
    """
    # The position of the token to come, counted from the start of the prompt.
    positions = [len(s.prompt) + len(s.tokens) + ahead for s in sequences]
    seeds = torch.tensor([s.random.seed(p) for s, p in zip(sequences, positions)], device=logits.device)
    n = logits.shape[-1]
    settings = [(o.temperature, min(o.top_k or 0, n), o.top_p, o.min_p or 0) for o in (s.options for s in sequences)]
    columns = torch.tensor(settings, dtype=torch.float64).T.to(logits.device)
    return next_tokens(logits, seeds, *columns)
