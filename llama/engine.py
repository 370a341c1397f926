"""Many sequences through one model: which slot each is in, prefill, decode steps, and when each ends.

Knows tokens and not text. The engine of each model-parallel rank runs the same loop on the same logits and draws the
same random numbers, so ranks agree on every token without talking about it.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from llama.model import Transformer
from llama.sampling import RandomStream, next_tokens, token_logprobs

# Prompts are prefilled together up to this many positions, padding included: enough to keep a device busy, and a bound
# on the memory of the activations.
MAX_PREFILL_TOKENS = 4096
# Logits of a prompt's positions are made this many at a time: 256 x 128,256 float32 are 131 MB.
LOGITS_CHUNK = 256


@dataclass
class Sequence:
    """A prompt and its answer so far.

    Attributes:
        prompt: the ids to continue, at least one.
        max_new_tokens: the answer's budget; with 0 the prompt is only scored.
        random: where the answer's random numbers come from.
        temperature, top_p: how its tokens are chosen; temperature 0 takes the most likely.
        stop_tokens: ids that end the answer, and are not part of it.
        logprobs: whether to keep the log-probability of each token of the answer,
        prompt_logprobs: and of each token of the prompt, given those before it; 0 for the first.
        tokens: the answer.
        token_logprobs: of the answer.
        prompt_token_logprobs: of the prompt.
        finish_reason: "stop" or "length" once it has ended.
    """

    prompt: list[int]
    max_new_tokens: int
    random: RandomStream
    temperature: float = 0.0
    top_p: float = 1.0
    stop_tokens: frozenset[int] = frozenset()
    logprobs: bool = False
    prompt_logprobs: bool = False
    tokens: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    prompt_token_logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def needs_model(self) -> bool:
        return self.max_new_tokens > 0 or (self.prompt_logprobs and len(self.prompt) > 1)

    def append(self, token: int, logprob: float | None) -> None:
        """Takes the next token, or ends the answer at it."""
        if token in self.stop_tokens:
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
        if logprob is not None:
            self.token_logprobs.append(logprob)
        if len(self.tokens) == self.max_new_tokens:
            self.finish_reason = "length"


class Engine:
    """Runs sequences through a model that has a cache, as many at a time as the cache has slots."""

    def __init__(self, model: Transformer):
        self.model = model
        self.device = model.rotary.device

    @torch.inference_mode()
    def run(self, sequences: Iterable[Sequence]) -> Iterator[Sequence]:
        """Completes the sequences in place, and yields each one as it ends.

        A slot whose sequence has ended is given to the next one at once. The sequences in progress are those of the
        first slots, so that a decode step works on one slice of the cache.
        """
        waiting = deque(sequences)
        running: list[Sequence] = []  # by slot
        while waiting or running:
            while waiting and len(running) < self.model.cache.max_batch_size:
                group = self._next_group(waiting, self.model.cache.max_batch_size - len(running))
                self._prefill(group, first_slot=len(running))
                running += group
            if not any(s.finish_reason for s in running):
                self._decode(running)
            yield from self._remove_ended(running)

    def _next_group(self, waiting: deque[Sequence], n_slots: int) -> list[Sequence]:
        """The next sequences to prefill together: at least one, and no more than fit the budget once padded."""
        group: list[Sequence] = []
        longest = 0
        while waiting and len(group) < n_slots:
            longest = max(longest, len(waiting[0].prompt))
            if group and longest * (len(group) + 1) > MAX_PREFILL_TOKENS:
                break
            group.append(waiting.popleft())
        return group

    def _prefill(self, group: list[Sequence], first_slot: int) -> None:
        """Runs whole prompts, right-padded to the longest, and chooses the first token of each answer."""
        for sequence in group:
            if sequence.prompt_logprobs:
                sequence.prompt_token_logprobs = [0.0]
            if sequence.max_new_tokens == 0:
                sequence.finish_reason = "length"
        if not any(sequence.needs_model for sequence in group):
            return
        lengths = [len(sequence.prompt) for sequence in group]
        tokens = torch.zeros(len(group), max(lengths), dtype=torch.long)
        for row, sequence in enumerate(group):
            tokens[row, : lengths[row]] = torch.tensor(sequence.prompt)
        tokens = tokens.to(self.device)
        hidden = self.model.hidden_states(tokens, 0, slice(first_slot, first_slot + len(group)))
        for row, sequence in enumerate(group):
            if sequence.prompt_logprobs:
                for start in range(0, lengths[row] - 1, LOGITS_CHUNK):
                    stop = min(start + LOGITS_CHUNK, lengths[row] - 1)
                    logits = self.model.logits(hidden[row, start:stop])
                    logprobs = token_logprobs(logits, tokens[row, start + 1 : stop + 1])
                    sequence.prompt_token_logprobs += logprobs.tolist()
        rows = torch.arange(len(group), device=self.device)
        self._choose(group, hidden[rows, torch.tensor(lengths, device=self.device) - 1])

    def _decode(self, running: list[Sequence]) -> None:
        """Runs the last token of each sequence, and chooses the next."""
        tokens = torch.tensor([[sequence.tokens[-1]] for sequence in running], device=self.device)
        positions = [len(sequence.prompt) + len(sequence.tokens) - 1 for sequence in running]
        start_pos = positions[0] if min(positions) == max(positions) else torch.tensor(positions, device=self.device)
        hidden = self.model.hidden_states(tokens, start_pos, slice(0, len(running)))
        self._choose(running, hidden[:, -1])

    def _choose(self, sequences: list[Sequence], hidden: torch.Tensor) -> None:
        """Chooses each sequence's next token from its last hidden state, [B, dim]."""
        logits = self.model.logits(hidden)
        # The position of the token to come, counted from the start of the prompt.
        uniform = [s.random.uniform(len(s.prompt) + len(s.tokens)) for s in sequences]
        columns = torch.tensor(
            [[s.temperature for s in sequences], [s.top_p for s in sequences], uniform], dtype=torch.float64
        )
        tokens = next_tokens(logits, *columns.to(self.device))
        logprobs = token_logprobs(logits, tokens).tolist() if any(s.logprobs for s in sequences) else None
        for row, (sequence, token) in enumerate(zip(sequences, tokens.tolist())):
            if sequence.finish_reason is None:
                sequence.append(token, logprobs[row] if sequence.logprobs else None)

    def _remove_ended(self, running: list[Sequence]) -> Iterator[Sequence]:
        """Yields the sequences that have ended; the last ones in progress move down into their slots."""
        for slot in reversed(range(len(running))):
            if running[slot].finish_reason is None:
                continue
            ended, last = running[slot], running.pop()
            if last is not ended:
                running[slot] = last
                self.model.cache.copy_slot(len(running), slot, len(last.prompt) + len(last.tokens))
            yield ended
