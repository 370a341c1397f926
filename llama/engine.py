"""Many sequences through one model: which slot each is in, prefill, decode steps, and when each ends.

Knows tokens and not text. The engine of each model-parallel rank runs the same steps on the same logits and draws the
same random numbers, so ranks agree on every token without talking about it.

`Engine.step` tells the whole story: sequences wait, are prefilled into a slot, decode one token a step beside all the
others, and leave their slot to the next.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from llama.model import Transformer
from llama.options import DecodingOptions
from llama.sampling import RandomStream, next_tokens, process_logits, token_logprobs

# How many positions one prefill works on, padding included: enough to keep a device busy, and a bound on the memory of
# the activations. While other sequences are decoding it is less, so that they do not stall; longer prompts are cut.
PREFILL_TOKENS = 4096
PREFILL_TOKENS_WHILE_DECODING = 512
# A shared beginning shorter than this is not worth copying.
MIN_SHARED_PREFIX = 16
# Logits of a prompt's positions are made this many at a time: 256 x 128,256 float32 are 131 MB.
LOGITS_CHUNK = 256


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
        logprobs: whether to keep the log-probability of each token of the answer,
        prompt_logprobs: and of each token of the prompt, given those before it; 0 for the first.
        tokens: the answer.
        token_logprobs, prompt_token_logprobs: as asked for, in nats.
        top_logprobs, prompt_top_logprobs: `options.top_logprobs` (id, log-probability) for each of them, best first.
        finish_reason: "stop", "length" or "error" once it has ended.
        error: what went wrong, for "error".
    """

    prompt: list[int]
    max_new_tokens: int
    options: DecodingOptions
    random: RandomStream
    stop_tokens: frozenset[int] = frozenset()
    should_stop: Callable[[list[int]], bool] | None = None
    logprobs: bool = False
    prompt_logprobs: bool = False
    tokens: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    prompt_token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

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

    def fail(self, error: str) -> None:
        self.finish_reason, self.error = "error", error


@dataclass
class Counters:
    """What the engine has run, in tokens: of prompts, of prompts found in the cache instead, and of answers."""

    prefilled: int = 0
    reused: int = 0
    decoded: int = 0


class Engine:
    """Runs sequences through a model that has a cache, as many at a time as the cache has slots.

    Slots 0, 1, … hold the sequences in `running`, in their order, so that a decode step reads one slice of the cache.
    The slot after them may hold one whose prompt is being prefilled in pieces. What a slot held stays in it until it
    is overwritten, and a new prompt that begins alike takes the keys and values of the shared beginning from there.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self.device = model.rotary.device
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.partial: tuple[Sequence, int, int] | None = None  # a sequence, its slot, how much of its prompt is done
        self.slot_tokens: list[list[int]] = [[] for _ in range(model.cache.max_batch_size)]  # whose keys each holds
        self.counters = Counters()
        self.reuse_prefixes = True

    def run(self, sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        """Completes sequences in place, beside those already here; after each step, yields which of all have ended.

        Leaving the iterator early takes its sequences out again.
        """
        for sequence in sequences:
            if sequence.max_new_tokens == 0 and not sequence.prompt_logprobs:
                sequence.finish_reason = "length"
        unfinished = [s for s in sequences if s.finish_reason is None]
        self.waiting.extend(unfinished)
        try:
            while unfinished:
                yield self.step()
                unfinished = [s for s in unfinished if s.finish_reason is None]
        finally:
            self._remove(set(unfinished))

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One prefill, if a prompt waits and a slot is free, and one new token for each running sequence."""
        if self.partial is None and self.waiting and len(self.running) < self.model.cache.max_batch_size:
            self._admit()
        elif self.partial is not None:
            self._continue_partial()
        if self.running and not any(s.finish_reason for s in self.running):
            self._decode()
        return self._release([s for s in self.running if s.finish_reason])

    # Prefill

    def _admit(self) -> None:
        """Prefills the next prompts together, each behind what the cache already has of it."""
        budget = PREFILL_TOKENS_WHILE_DECODING if self.running else PREFILL_TOKENS
        first_slot = len(self.running)
        group: list[Sequence] = []
        starts: list[int] = []
        width = 0
        while self.waiting and first_slot + len(group) < self.model.cache.max_batch_size:
            sequence = self.waiting[0]
            source, shared = self._find_prefix(sequence)
            # One that begins like a prompt of this group waits until that one's keys are there.
            if any(self._shareable(sequence, s.prompt) > shared for s in group):
                break
            wider = max(width, len(sequence.prompt) - shared)
            if group and wider * (len(group) + 1) > budget:
                break
            slot = first_slot + len(group)
            self._take_slot(slot, source, shared, sequence)
            self.waiting.popleft()
            group.append(sequence)
            starts.append(shared)
            width = wider
            if width > budget:  # alone, and in pieces
                self.partial = (sequence, slot, shared)
                self._continue_partial()
                return
        self._prefill(group, starts, first_slot, [len(s.prompt) for s in group])
        self.running += group

    def _find_prefix(self, sequence: Sequence) -> tuple[int, int]:
        """The slot that shares the longest beginning with a prompt, and how much of it can be taken over."""
        lengths = [self._shareable(sequence, tokens) for tokens in self.slot_tokens]
        slot = max(range(len(lengths)), key=lengths.__getitem__)
        return slot, lengths[slot]

    def _shareable(self, sequence: Sequence, tokens: list[int]) -> int:
        """How many of the keys of `tokens` serve for a prompt.

        The last token of a prompt is always run, for the logits after it; all are, where the prompt is to be scored.
        """
        if sequence.prompt_logprobs or not self.reuse_prefixes:
            return 0
        length = _common_prefix(sequence.prompt[:-1], tokens)
        return length if length >= min(MIN_SHARED_PREFIX, len(sequence.prompt) - 1) else 0

    def _take_slot(self, slot: int, source: int, shared: int, sequence: Sequence) -> None:
        """Gives a slot to a sequence, with the keys of the first `shared` tokens of its prompt from the source's."""
        if shared and source != slot:
            self.slot_tokens[slot] = []
            self.model.cache.copy_slot(source, slot, shared)
        self.slot_tokens[slot] = sequence.prompt[:shared]
        self.counters.reused += shared

    def _continue_partial(self) -> None:
        """Prefills the next piece of a long prompt; after the last, the sequence is running."""
        sequence, slot, done = self.partial
        budget = PREFILL_TOKENS_WHILE_DECODING if self.running else PREFILL_TOKENS
        stop = min(done + budget, len(sequence.prompt))
        self._prefill([sequence], [done], slot, [stop])
        self.partial = (sequence, slot, stop)
        if stop == len(sequence.prompt):
            self.partial = None
            self._move(slot, len(self.running))
            self.running.append(sequence)

    def _prefill(self, group: list[Sequence], starts: list[int], first_slot: int, stops: list[int]) -> None:
        """Runs prompt[start:stop] of each sequence, right-padded to one width, and chooses the token after the last.

        Rows whose padding would leave the cache start earlier instead, and write again what is there already.
        """
        for sequence, start in zip(group, starts):
            if sequence.prompt_logprobs and start == 0:
                sequence.prompt_token_logprobs = [0.0]
                sequence.prompt_top_logprobs = [[]] if sequence.options.top_logprobs else []
        width = max(stop - start for start, stop in zip(starts, stops))
        starts = [min(start, self.model.args.max_seq_len - width) for start in starts]
        rows = [s.prompt[start:stop] for s, start, stop in zip(group, starts, stops)]
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        hidden = self._forward(tokens, starts, first_slot)
        for row, (sequence, start, stop) in enumerate(zip(group, starts, stops)):
            slot = first_slot + row
            self.counters.prefilled += stop - len(self.slot_tokens[slot])
            self.slot_tokens[slot] = sequence.prompt[:stop]
            if sequence.prompt_logprobs:
                self._score_prompt(sequence, hidden[row], start, stop)
        whole = [row for row, (s, stop) in enumerate(zip(group, stops)) if stop == len(s.prompt)]
        for row in whole:
            if group[row].max_new_tokens == 0:
                group[row].finish_reason = "length"
        whole = [row for row in whole if group[row].finish_reason is None]
        if whole:
            last = [stops[row] - starts[row] - 1 for row in whole]
            self._choose([group[row] for row in whole], hidden[whole, last])

    def _score_prompt(self, sequence: Sequence, hidden: torch.Tensor, start: int, stop: int) -> None:
        """Log-probabilities of the tokens that follow positions start to stop, from their hidden states [T, dim]."""
        following = torch.tensor(sequence.prompt[start + 1 : stop + 1], device=self.device)
        for i in range(0, len(following), LOGITS_CHUNK):
            targets = following[i : i + LOGITS_CHUNK]
            logits = self.model.logits(hidden[i : i + len(targets)])
            sequence.prompt_token_logprobs += token_logprobs(logits, targets).tolist()
            if sequence.options.top_logprobs:
                sequence.prompt_top_logprobs += _top_logprobs(logits, sequence.options.top_logprobs)

    # Decode

    def _decode(self) -> None:
        """Runs the last token of each running sequence, and chooses the next."""
        tokens = torch.tensor([[s.tokens[-1]] for s in self.running], device=self.device)
        positions = [len(s.prompt) + len(s.tokens) - 1 for s in self.running]
        hidden = self._forward(tokens, positions, 0)
        for slot, sequence in enumerate(self.running):
            self.slot_tokens[slot].append(sequence.tokens[-1])
        self.counters.decoded += len(self.running)
        self._choose(self.running, hidden[:, -1])

    def _forward(self, tokens: torch.Tensor, starts: list[int], first_slot: int) -> torch.Tensor:
        same = min(starts) == max(starts)
        start_pos = starts[0] if same else torch.tensor(starts, device=self.device)
        return self.model.hidden_states(tokens, start_pos, slice(first_slot, first_slot + len(starts)))

    def _choose(self, sequences: list[Sequence], hidden: torch.Tensor) -> None:
        """Chooses each sequence's next token from its last hidden state, [B, dim]."""
        logits = self.model.logits(hidden)
        if logits.device.type == "mps":  # which has no float64
            logits = logits.cpu()
        broken = logits.isnan().any(dim=-1).tolist()
        chosen_from = logits.nan_to_num() if any(broken) else logits
        for row, sequence in enumerate(sequences):
            try:
                if broken[row]:
                    raise ValueError("the model's logits are NaN: look for damaged weights with `llama verify`")
                processed = _process(logits[row], sequence)
            except ValueError as error:
                sequence.fail(str(error))
                continue
            if processed is not None:
                chosen_from = logits.clone() if chosen_from is logits else chosen_from
                chosen_from[row] = processed
        # The position of the token to come, counted from the start of the prompt.
        seeds = torch.tensor([s.random.seed(len(s.prompt) + len(s.tokens)) for s in sequences], device=logits.device)
        settings = [(o.temperature, o.top_k or 0, o.top_p, o.min_p or 0) for o in (s.options for s in sequences)]
        columns = torch.tensor(settings, dtype=torch.float64).T.to(logits.device)
        chosen = next_tokens(chosen_from, seeds, *columns)
        logprobs = token_logprobs(logits, chosen).tolist() if any(s.logprobs for s in sequences) else None
        for row, (sequence, token) in enumerate(zip(sequences, chosen.tolist())):
            if sequence.finish_reason is None and sequence.append(token) and sequence.logprobs:
                sequence.token_logprobs.append(logprobs[row])
                if sequence.options.top_logprobs:
                    sequence.top_logprobs += _top_logprobs(logits[row : row + 1], sequence.options.top_logprobs)

    # Slots

    def reserve(self) -> int:
        """The first of the slots that no sequence uses; what they held is given up to the caller."""
        first = len(self.running) if self.partial is None else self.partial[1] + 1
        for slot in range(first, len(self.slot_tokens)):
            self.slot_tokens[slot] = []
        return first

    def _release(self, ended: list[Sequence]) -> list[Sequence]:
        """Takes sequences out of their slots; the last running ones move down into them."""
        for sequence in ended:
            slot = self.running.index(sequence)
            last = self.running.pop()
            if last is not sequence:
                self.running[slot] = last
                self._move(len(self.running), slot)
        return ended

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self.slot_tokens[target] = []  # should an interrupt come between
            self.model.cache.copy_slot(source, target, len(self.slot_tokens[source]))
            self.slot_tokens[target] = list(self.slot_tokens[source])

    def _remove(self, sequences: set[Sequence]) -> None:
        """Forgets sequences that nobody waits for any more."""
        self.waiting = deque(s for s in self.waiting if s not in sequences)
        if self.partial is not None and self.partial[0] in sequences:
            self.partial = None
        self._release([s for s in self.running if s in sequences])


def _process(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor | None:
    """A row's logits after its penalties, None where it has none."""
    o = sequence.options
    if not o.logit_bias and o.repetition_penalty == 1 and o.no_repeat_ngram_size == 0 and o.logits_processor is None:
        return None
    ids = sequence.prompt + sequence.tokens
    return process_logits(logits, ids, o.logit_bias, o.repetition_penalty, o.no_repeat_ngram_size, o.logits_processor)


def _top_logprobs(logits: torch.Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The k most likely (id, log-probability) of each row [T, vocab_size], best first."""
    values, ids = torch.log_softmax(logits, dim=-1).topk(k, dim=-1)
    return [list(zip(row_ids, row)) for row_ids, row in zip(ids.tolist(), values.tolist())]


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with in common."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
