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
from llama.sampling import RandomStream, next_tokens, token_logprobs, top_logprobs

# Logits of a prompt's positions are made this many at a time: 256 x 128,256 float32 are 131 MB.
LOGITS_CHUNK = 256
UNUSABLE_LOGITS = "the model's logits are NaN or infinite: look for damaged weights with `llama verify`"


@dataclass
class Speculation:
    """How often proposed tokens were right (`llama.decoding.speculative`); all 0 without a draft."""

    steps: int = 0  # passes of the model after the prefill, counted for each sequence
    proposed: int = 0  # tokens proposed to it,
    accepted: int = 0  # and those of them that it chose too


@dataclass
class Counters:
    """What the engine has run, in tokens."""

    prefilled: int = 0  # of prompts,
    reused: int = 0  # of prompts, found in the cache instead,
    decoded: int = 0  # and of answers
    speculation: Speculation = field(default_factory=Speculation)  # of all sequences


@dataclass(eq=False)
class Sequence:
    """A prompt and its answer so far. Log-probabilities are in nats; the top ones are (id, value), best first."""

    prompt: list[int]  # the ids to continue, at least one
    max_new_tokens: int  # the answer's budget; with 0 the prompt is only scored
    options: DecodingOptions  # how the tokens are chosen; what changes the logits for it is `process`
    random: RandomStream | None = None  # where the random numbers come from
    stop_tokens: frozenset[int] = frozenset()  # ids that end the answer, and are not part of it
    should_stop: Callable[[list[int]], bool] | None = None  # called with the answer after each token; True ends it
    logprobs: bool = False  # whether to keep the log-probability of each token of the answer
    score_from: int | None = None  # from which token on the prompt itself is scored; None: not at all
    search: "Search | None" = None  # who chooses the tokens, where that is not the engine: a beam search
    process: Callable[..., torch.Tensor] | None = None  # changes logits [vocab_size], given them and the answer so far
    n_prefill: int = field(init=False)  # how many tokens of the prompt the model must see,
    n_reusable: int = field(init=False)  # and of how many the keys may come from the cache
    # What comes of it:
    tokens: list[int] = field(default_factory=list)  # the answer
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_token_logprobs: list[float] = field(default_factory=list)  # from score_from on; 0 for a prompt's first token
    prompt_top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    n_cached: int = 0  # how many of the prompt's keys were in the cache already
    prompt_is_greedy: bool = True  # whether greedy decoding would have chosen every scored token of the prompt
    finish_reason: str | None = None  # "stop", "length" or "error" once it has ended
    error: str | None = None  # what went wrong,
    cause: BaseException | None = None  # and the exception of the caller's own code behind it
    speculation: Speculation = field(default_factory=Speculation)

    def __post_init__(self):
        if self.score_from == 0:  # nothing comes before the first token
            self.prompt_token_logprobs = [0.0]
            self.prompt_top_logprobs = [[]] if self.options.top_logprobs else []
        # The logits after the prompt's last token matter only if an answer follows.
        n_scored = 0 if self.score_from is None else len(self.prompt) - 1
        self.n_prefill = n_scored if self.max_new_tokens == 0 else len(self.prompt)
        # Where logits are needed, the model must run.
        n_before_logits = self.n_prefill if self.score_from is None else min(self.n_prefill, self.score_from)
        self.n_reusable = max(0, n_before_logits - 1)

    @property
    def n_slots(self) -> int:
        """How many rows of the cache it needs at most."""
        return 1 if self.search is None else self.search.n_slots

    def append(self, token: int) -> bool:
        """Takes the next token; False if it ended the answer instead of joining it."""
        if token in self.stop_tokens:
            self.finish_reason = "stop"
            return False
        self.tokens.append(token)
        if self.should_stop is not None and self.should_stop(self.tokens):
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_new_tokens:
            self.finish_reason = "length"
        return True

    def fail(self, error: Exception | str) -> None:
        """Ends the sequence with an error."""
        self.finish_reason, self.error = "error", str(error)
        self.cause = error.__cause__ if isinstance(error, Exception) else None


class Search(Protocol):
    """Several continuations of one prompt, chosen together: the beams of a beam search."""

    sequence: Sequence  # the prompt's; it ends with the search
    n_slots: int  # the most beams
    beams: list[Sequence]  # those that run, each with this search, best first; at first the prompt's sequence alone

    def advance(self, logprobs: torch.Tensor) -> list[int]:
        """Puts the beams that go on in place of those that have run; none are left once the search has ended.

        `logprobs` are of the token after each beam, float32 [len(beams), vocab_size]. Returns, for each new beam, the
        index of the one that it continues.
        """


def choose(sequences: list[Sequence], logits: torch.Tensor) -> list[int]:
    """Gives each sequence its next token by its options, and returns them all, also those that ended an answer.

    A sequence whose logits cannot be used, or whose `process` raises ValueError, fails; the others go on.

    `logits` are those after the last token of each, float32 [B, vocab_size].
    """
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    peaks = logits.amax(dim=-1).tolist()
    chosen_from, wants_logprobs = logits, False
    for row, sequence in enumerate(sequences):
        processed = None
        wants_logprobs |= sequence.logprobs
        try:
            if not math.isfinite(peaks[row]):
                raise ValueError(UNUSABLE_LOGITS)
            if sequence.process is not None:
                processed = sequence.process(logits[row], sequence.tokens)
                if not math.isfinite(peak := processed.amax().item()):
                    left = "no token to choose" if peak == -math.inf else f"a logit of {peak}"
                    raise ValueError(f"{sequence.process} left {left}, after {len(sequence.tokens)} tokens")
        except ValueError as error:
            sequence.fail(error)
            processed = torch.zeros_like(logits[row])  # for a token that is not kept
        if processed is not None:
            chosen_from = logits.clone() if chosen_from is logits else chosen_from
            chosen_from[row] = processed
    chosen = draw(sequences, chosen_from)
    logprobs = token_logprobs(logits, chosen).tolist() if wants_logprobs else None
    tokens = chosen.tolist()
    for row, (sequence, token) in enumerate(zip(sequences, tokens)):
        if sequence.finish_reason is None and sequence.append(token) and sequence.logprobs:
            sequence.token_logprobs.append(logprobs[row])
            if sequence.options.top_logprobs:
                sequence.top_logprobs += top_logprobs(logits[row : row + 1], sequence.options.top_logprobs)
    return tokens


def draw(sequences: list[Sequence], logits: torch.Tensor, ahead: int = 0) -> torch.Tensor:
    """One token for each sequence, by its options and the random numbers of its next position, or one `ahead` of that.

    `logits` float32 [B, vocab_size] are those after the penalties; `ahead` tokens, not yet in the sequences, come
    before. Returns ids, int64 [B].
    """
    seeds, settings = [], []
    for sequence in sequences:
        o = sequence.options
        # The position of the token to come, counted from the start of the prompt; greedy decoding draws nothing.
        position = len(sequence.prompt) + len(sequence.tokens) + ahead
        seeds.append(0 if o.temperature == 0 else sequence.random.seed(position))
        settings.append((o.temperature, min(o.top_k or 0, logits.shape[-1]), o.top_p, o.min_p or 0))
    columns = torch.tensor(settings, dtype=torch.float64).T.to(logits.device)
    return next_tokens(logits, torch.tensor(seeds, device=logits.device), *columns)


def score_prompt(sequence: Sequence, logits_of: Callable[[int, int], torch.Tensor], stop: int) -> None:
    """Scores the tokens of a prompt that follow the positions before `stop`, which have run, and have no score yet.

    `logits_of(a, b)` are the logits [b - a, vocab_size] after the positions [a, b).
    """
    first = sequence.score_from + len(sequence.prompt_token_logprobs)
    n_targets = len(sequence.prompt[first : stop + 1])
    for i in range(first, first + n_targets, LOGITS_CHUNK):
        ids = sequence.prompt[i : min(i + LOGITS_CHUNK, first + n_targets)]
        logits = logits_of(i - 1, i - 1 + len(ids))
        targets = torch.tensor(ids, device=logits.device)
        if not bool(logits.amax(dim=-1).isfinite().all()):
            sequence.fail(UNUSABLE_LOGITS)
            return
        sequence.prompt_token_logprobs += token_logprobs(logits, targets).tolist()
        sequence.prompt_is_greedy &= torch.equal(logits.argmax(dim=-1), targets)
        if sequence.options.top_logprobs:
            sequence.prompt_top_logprobs += top_logprobs(logits, sequence.options.top_logprobs)
