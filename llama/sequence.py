"""A prompt and its answer so far, which is what the engine runs, and how it gets its next token.

The engine fills a sequence in place while it runs; the caller that added it reads it once it has ended. Knows nothing
of models, slots or text.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from llama.options import DecodingOptions
from llama.sampling import RandomStream, next_tokens, token_logprobs, top_logprobs

# The logits of a prompt are computed for this many positions at a time: 256 x 128,256 float32 are 131 MB.
LOGITS_CHUNK = 256
UNUSABLE_LOGITS = "the model's logits are NaN or infinite: look for damaged weights with `llama verify`"


@dataclass
class Speculation:
    """How often proposed tokens were right (`llama.decoding.speculative`); all 0 without a draft."""

    steps: int = 0  # passes of the model after the prefill, counted for each sequence
    proposed: int = 0  # tokens proposed to the model
    accepted: int = 0  # proposed tokens that the model chose too


@dataclass
class Counters:
    """How many tokens the engine has run."""

    prefilled: int = 0  # prompt tokens
    reused: int = 0  # prompt tokens that were found in the cache instead
    decoded: int = 0  # answer tokens
    speculation: Speculation = field(default_factory=Speculation)  # summed over all sequences


@dataclass(eq=False)
class Sequence:
    """A prompt and its answer so far. Log-probabilities are in nats; the top ones are (id, value), best first."""

    prompt: list[int]  # the ids to continue, at least one
    max_new_tokens: int  # the answer's budget; with 0 the prompt is only scored
    options: DecodingOptions  # how the tokens are chosen; those that change the logits act through `process`
    random: RandomStream | None = None  # the random numbers
    stop_tokens: frozenset[int] = frozenset()  # ids that end the answer and are not part of it
    should_stop: Callable[[list[int]], bool] | None = None  # called with the answer after each token; True ends it
    logprobs: bool = False  # whether to keep the log-probability of each token of the answer
    score_from: int | None = None  # the index of the first prompt token to score; None: the prompt is not scored
    search: "Search | None" = None  # a beam search that chooses the tokens; None: the engine chooses
    process: Callable[..., torch.Tensor] | None = None  # changes logits [vocab_size], given them and the answer so far
    n_prefill: int = field(init=False)  # how many prompt tokens the model must run
    n_reusable: int = field(init=False)  # how many of the prompt's keys may come from the cache
    # Results:
    tokens: list[int] = field(default_factory=list)  # the answer
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_token_logprobs: list[float] = field(default_factory=list)  # from score_from on; 0 for the prompt's first
    prompt_top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    n_cached: int = 0  # how many of the prompt's keys were in the cache already
    prompt_is_greedy: bool = True  # whether greedy decoding would have chosen every scored token of the prompt
    finish_reason: str | None = None  # "stop", "length" or "error" once it has ended
    error: str | None = None  # what went wrong
    cause: BaseException | None = None  # the exception of the caller's own code behind the error
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
        """The most slots it needs."""
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
    beams: list[Sequence]  # the running beams, best first; each has this search; at first only the prompt's sequence

    def advance(self, logprobs: torch.Tensor) -> list[int]:
        """Replaces the beams with those that go on; no beams are left once the search has ended.

        `logprobs` are those of the token after each beam, float32 [len(beams), vocab_size]. Returns, for each new beam,
        the index of the old beam that it continues.
        """


def choose(sequences: list[Sequence], logits: torch.Tensor) -> list[int]:
    """Gives each sequence its next token by its options. Returns all tokens, also those that ended an answer.

    A sequence whose logits cannot be used, or whose `process` raises ValueError, fails; the others go on.

    `logits` are those after the last token of each sequence, float32 [B, vocab_size].
    """
    if logits.device.type == "mps":  # MPS has no float64
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
            processed = torch.zeros_like(logits[row])  # any token can be drawn from these; it is not kept
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
    """One token for each sequence, by its options and the random numbers of the token's position.

    That is the next position, or `ahead` positions later, after tokens that are not in the sequences yet. `logits`
    float32 [B, vocab_size] are those after the penalties. Returns ids, int64 [B].
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
    """Scores the tokens of a prompt up to index `stop` that have no score yet; the positions before `stop` have run.

    `logits_of(a, b)` returns the logits [b - a, vocab_size] at the positions [a, b).
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
