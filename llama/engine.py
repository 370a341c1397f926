"""Many sequences through one model: which slot each is in, prefill, decode steps, and when each ends.

Knows tokens and not text. The engine of each model-parallel rank runs the same steps on the same logits and draws the
same random numbers, so ranks agree on every token without talking about it.

`Engine.step` tells the whole story: sequences wait, are prefilled into a slot, decode one token a step beside all the
others, and leave their slot to the next.
"""

import contextlib
import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from llama.decode_step import DecodeStep
from llama.kv_cache import Slots, shareable
from llama.layers.packing import pack
from llama.model import Transformer
from llama.options import DecodingOptions
from llama.sampling import RandomStream, next_tokens, process_logits, token_logprobs

# How many positions one prefill works on, padding included: enough to keep a device busy, and a bound on the memory of
# the activations. While other sequences are decoding it is less, so that they do not stall; longer prompts are cut.
PREFILL_TOKENS = 4096
PREFILL_TOKENS_WHILE_DECODING = 512
# From so many on, the first prefill gains more from packed matrices than it takes to pack them (llama.products.Packed).
PACK_FIRST_TOKENS = 384
UNUSABLE_LOGITS = "the model's logits are NaN or infinite: look for damaged weights with `llama verify`"
# Logits of a prompt's positions are made this many at a time: 256 x 128,256 float32 are 131 MB.
LOGITS_CHUNK = 256


@dataclass
class Speculation:
    """How often proposed tokens were right (`llama.decoding.speculative`); all 0 where none were made.

    Attributes:
        steps: passes of the model after the prefill, of all sequences counted.
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
        logprobs: whether to keep the log-probability of each token of the answer,
        prompt_logprobs: and of each token of the prompt, given those before it; 0 for the first.
        tokens: the answer.
        token_logprobs, prompt_token_logprobs: as asked for, in nats.
        top_logprobs, prompt_top_logprobs: `options.top_logprobs` (id, log-probability) for each of them, best first.
        finish_reason: "stop", "length" or "error" once it has ended.
        error, cause: what went wrong, for "error", and the exception of the caller's own code behind it.
        speculation: what came of the tokens proposed for it.
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
    cause: BaseException | None = None
    speculation: Speculation = field(default_factory=Speculation)

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
        self.finish_reason, self.error = "error", str(error)
        self.cause = error.__cause__ if isinstance(error, Exception) else None


@dataclass
class Counters:
    """What the engine has run, in tokens: of prompts, of prompts found in the cache instead, and of answers."""

    prefilled: int = 0
    reused: int = 0
    decoded: int = 0
    speculation: Speculation = field(default_factory=Speculation)  # of all sequences


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
        self.slots = Slots(model.cache)
        self.counters = Counters()
        self.decode_step = DecodeStep(model)
        self.reuse_prefixes = True
        self.packed = False
        self.reserved = False  # whether the slots that no sequence uses are another's

    def compile(self) -> str:
        """Compiles the decoding step, with the matrices as they will be then; says how long it took."""
        self._pack()
        self.decode_step = DecodeStep(self.model, compile=True)
        return self.decode_step.warm_up()

    def run(self, sequences: Iterable[Sequence | None]) -> Iterator[list[Sequence]]:
        """Completes sequences in place, beside those already here; after each step, yields those of them that ended.

        They are taken one after the other, as slots become free. None among them says that there is none yet, which may
        be while one of those before has not ended. Leaving the iterator early takes its sequences out again.

        Raises:
            ValueError: a beam search that has not ended holds the slots that are free.
        """
        source, unfinished = iter(sequences), []
        more = True
        try:
            while True:
                ended = []
                while more and not ended and len(self.waiting) + self.n_used < len(self.slots):
                    sequence = next(source, source)
                    if sequence is None:
                        break
                    if sequence is source:
                        more = False
                    elif sequence.max_new_tokens == 0 and not sequence.prompt_logprobs:
                        sequence.finish_reason = "length"
                        ended.append(sequence)
                    else:
                        unfinished.append(sequence)
                        self.waiting.append(sequence)
                if not ended and (more or unfinished):
                    if self.waiting and self.reserved:
                        raise ValueError("a beam search holds the slots that are free: let it end, or close it, first")
                    self.step()
                    ended = [s for s in unfinished if s.finish_reason is not None]
                    unfinished = [s for s in unfinished if s.finish_reason is None]
                yield ended
                if not more and not unfinished:
                    return
        finally:
            self._remove(set(unfinished))

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One prefill, if a prompt waits and a slot is free, and one new token for each running sequence.

        An interrupt (Ctrl-C) is raised at the end of the step. A second one, or another exception such as running out
        of memory, gives up all the sequences in progress, whose keys may be half written.
        """
        try:
            with _interrupt_afterwards():
                if self.partial is not None:
                    self._continue_partial()
                elif self.waiting and len(self.running) < len(self.slots):
                    self._admit()
                ended = self._release([s for s in self.running if s.finish_reason])
                if self.running:
                    self._decode()
                    ended += self._release([s for s in self.running if s.finish_reason])
        except _Interrupted:
            raise KeyboardInterrupt from None
        except BaseException as error:
            self._give_up(f"the step failed: {type(error).__name__}: {error}")
            raise
        return ended

    # Prefill

    def _admit(self) -> None:
        """Prefills the next prompts together, each behind what the cache already has of it."""
        budget = PREFILL_TOKENS_WHILE_DECODING if self.running else PREFILL_TOKENS
        first_slot = len(self.running)
        group: list[Sequence] = []
        starts: list[int] = []
        width = 0
        while self.waiting and first_slot + len(group) < len(self.slots):
            sequence = self.waiting[0]
            source, shared = 0, 0
            if self.reuse_prefixes and not sequence.prompt_logprobs:  # which are of every position
                source, shared = self.slots.find(sequence.prompt)
                # One that begins like a prompt of this group waits until that one's keys are there.
                if any(shareable(sequence.prompt, s.prompt) > shared for s in group):
                    break
            wider = max(width, len(sequence.prompt) - shared)
            if group and wider * (len(group) + 1) > budget:
                break
            slot = first_slot + len(group)
            self.slots.take(slot, source, shared)
            self.counters.reused += shared
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

    def _continue_partial(self) -> None:
        """Prefills the next piece of a long prompt; after the last, the sequence is running."""
        sequence, slot, done = self.partial
        budget = PREFILL_TOKENS_WHILE_DECODING if self.running else PREFILL_TOKENS
        stop = min(done + budget, len(sequence.prompt))
        self._prefill([sequence], [done], slot, [stop])
        self.partial = (sequence, slot, stop)
        if stop == len(sequence.prompt):
            self.partial = None
            self.slots.swap(slot, len(self.running))
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
        if tokens.numel() >= PACK_FIRST_TOKENS:
            self._pack()
        hidden = self._forward(tokens, starts, first_slot)
        for row, (sequence, start, stop) in enumerate(zip(group, starts, stops)):
            slot = first_slot + row
            self.counters.prefilled += stop - len(self.slots.tokens[slot])
            self.slots.record(slot, start, sequence.prompt[start:stop])
            if sequence.prompt_logprobs:
                self._score_prompt(sequence, hidden[row], start, stop)
        whole = [row for row, (s, stop) in enumerate(zip(group, stops)) if stop == len(s.prompt)]
        for row in whole:
            if group[row].max_new_tokens == 0 and group[row].finish_reason is None:
                group[row].finish_reason = "length"
        whole = [row for row in whole if group[row].finish_reason is None]
        if whole:
            last = [stops[row] - starts[row] - 1 for row in whole]
            self._choose([group[row] for row in whole], self.model.logits(hidden[whole, last]))

    def _score_prompt(self, sequence: Sequence, hidden: torch.Tensor, start: int, stop: int) -> None:
        """Log-probabilities of the tokens that follow positions start to stop, from their hidden states [T, dim]."""
        following = torch.tensor(sequence.prompt[start + 1 : stop + 1], device=self.device)
        for i in range(0, len(following), LOGITS_CHUNK):
            targets = following[i : i + LOGITS_CHUNK]
            logits = self.model.logits(hidden[i : i + len(targets)])
            if not bool(logits.amax(dim=-1).isfinite().all()):
                sequence.fail(UNUSABLE_LOGITS)
                return
            sequence.prompt_token_logprobs += token_logprobs(logits, targets).tolist()
            if sequence.options.top_logprobs:
                sequence.prompt_top_logprobs += _top_logprobs(logits, sequence.options.top_logprobs)

    # Decode

    def _decode(self) -> None:
        """Runs the last token of each running sequence, and chooses the next."""
        self._pack()
        positions = [len(s.prompt) + len(s.tokens) - 1 for s in self.running]
        spare = None if self.reserved else self.slots.spare_position
        logits = self.decode_step([s.tokens[-1] for s in self.running], positions, spare)
        for slot, (sequence, position) in enumerate(zip(self.running, positions)):
            self.slots.record(slot, position, sequence.tokens[-1:])
        self.counters.decoded += len(self.running)
        self._choose(self.running, logits)

    def _pack(self) -> None:
        """Lays the matrices out for fast products, once: not while loading, for the sake of the first token."""
        if not self.packed:
            pack(self.model)
            self.packed = True

    def _forward(self, tokens: torch.Tensor, starts: list[int], first_slot: int) -> torch.Tensor:
        return self.model.hidden_states(tokens, starts, slice(first_slot, first_slot + len(starts)))

    def _choose(self, sequences: list[Sequence], logits: torch.Tensor) -> list[int]:
        """Chooses each sequence's next token from the last logits, [B, vocab_size], and returns them."""
        if logits.device.type == "mps":  # which has no float64
            logits = logits.cpu()
        peaks = logits.amax(dim=-1).tolist()
        chosen_from = logits
        for row, sequence in enumerate(sequences):
            try:
                if not math.isfinite(peaks[row]):
                    raise ValueError(UNUSABLE_LOGITS)
                processed = _process(logits[row], sequence)
                if processed is not None and not math.isfinite(peak := processed.amax().item()):
                    left = "no token to choose" if peak == -math.inf else f"a logit of {peak}"
                    raise ValueError(f"{_names_of_penalties(sequence.options)} left {left}")
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
                    sequence.top_logprobs += _top_logprobs(logits[row : row + 1], sequence.options.top_logprobs)
        return tokens

    # Slots

    @contextlib.contextmanager
    def reserve(self) -> Iterator[int]:
        """The first of the slots that no sequence uses. They are the caller's meanwhile; what they held is given up."""
        if self.reserved:
            raise ValueError("another beam search holds the slots that are free: let it end, or close it, first")
        first = self.n_used
        self.slots.forget(first)
        self.reserved = True
        try:
            yield first
        finally:
            self.reserved = False

    @property
    def n_used(self) -> int:
        """How many slots are in use, by sequences of this and other calls."""
        return len(self.running) if self.partial is None else self.partial[1] + 1

    def _release(self, ended: list[Sequence]) -> list[Sequence]:
        """Takes sequences out of their slots; the last running ones move down into them."""
        for sequence in ended:
            slot = self.running.index(sequence)
            last = self.running.pop()
            if last is not sequence:
                self.running[slot] = last
            self.slots.swap(len(self.running), slot)
        return ended

    def _remove(self, sequences: set[Sequence]) -> None:
        """Forgets sequences that nobody waits for any more."""
        self.waiting = deque(s for s in self.waiting if s not in sequences)
        if self.partial is not None and self.partial[0] in sequences:
            self.partial = None
        self._release([s for s in self.running if s in sequences])

    def _give_up(self, reason: str) -> None:
        """Ends the sequences in progress with an error, and forgets what the slots hold."""
        for sequence in [*self.running, *([self.partial[0]] if self.partial else [])]:
            if sequence.finish_reason is None:
                sequence.fail(reason)
        self.running, self.partial = [], None
        self.slots.forget()


class _Interrupted(Exception):
    """Ctrl-C, once the step has ended."""


@contextlib.contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Holds the first Ctrl-C back until the work inside is done; the second one is raised at once."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupted = False

    def hold_back(*_: object) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    signal.signal(signal.SIGINT, hold_back)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        raise _Interrupted


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


def _process(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor | None:
    """A row's logits after its penalties, None where it has none."""
    o = sequence.options
    if not o.has_penalties:
        return None
    ids = sequence.prompt + sequence.tokens
    return process_logits(logits, ids, o.logit_bias, o.repetition_penalty, o.no_repeat_ngram_size, o.logits_processor)


def _names_of_penalties(options: DecodingOptions) -> str:
    names = ("logit_bias", "repetition_penalty", "no_repeat_ngram_size", "logits_processor")
    return " and ".join(n for n in names if getattr(options, n) != DecodingOptions.__dataclass_fields__[n].default)


def _top_logprobs(logits: torch.Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The k most likely (id, log-probability) of each row [T, vocab_size], best first."""
    values, ids = torch.log_softmax(logits, dim=-1).topk(k, dim=-1)
    return [list(zip(row_ids, row)) for row_ids, row in zip(ids.tolist(), values.tolist())]
