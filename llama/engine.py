"""Many sequences through one model: which slot each is in, prefill, decode steps, and when each ends.

Knows tokens and not text, and nothing of threads. The engine of each model-parallel rank runs the same steps on the
same logits and draws the same random numbers, so ranks agree on every token without talking about it.

`Engine.step` tells the whole story: sequences wait, are prefilled into a slot, decode one token a step beside all the
others, and leave their slot to the next.
"""

from collections import deque
from dataclasses import dataclass, field

import torch

from llama.decode_step import DecodeStep
from llama.kv_cache import Slots, shared_prefix
from llama.layers.packing import pack
from llama.model import Transformer
from llama.sampling import token_logprobs, top_logprobs
from llama.sequence import UNUSABLE_LOGITS, Search, Sequence, Speculation, choose

# How many positions one prefill works on, padding included: enough to keep a device busy, and a bound on the memory of
# the activations. While other sequences are decoding it is less, so that they do not stall; longer prompts are cut.
PREFILL_TOKENS = 4096
PREFILL_TOKENS_WHILE_DECODING = 512
# A first prefill of this many positions gains more from packed matrices than packing them takes.
PACK_FIRST_TOKENS = 384
# Logits of a prompt's positions are made this many at a time: 256 x 128,256 float32 are 131 MB.
LOGITS_CHUNK = 256


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
    A slot after them may hold one whose prompt is being prefilled in pieces. What a slot held stays in it until it is
    overwritten, and a new prompt that begins alike takes the keys and values of the shared beginning from there.
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
        self._ended: list[Sequence] = []  # since the last step returned

    def compile(self) -> str:
        """Compiles the decoding step, with the matrices as they will be then; says how long it took."""
        self._pack()
        self.decode_step = DecodeStep(self.model, compile=True)
        return self.decode_step.warm_up()

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of those that wait for a slot; `step` returns it once it has ended."""
        if sequence.n_slots > len(self.slots):
            raise ValueError(f"{sequence.n_slots} beams: expected at most the {len(self.slots)} slots of the cache")
        if sequence.score_from == 0:  # nothing comes before the first token
            sequence.prompt_token_logprobs = [0.0]
            sequence.prompt_top_logprobs = [[]] if sequence.options.top_logprobs else []
        if sequence.n_prefill == 0:
            sequence.finish_reason = "length"
            self._ended.append(sequence)
        else:
            self.waiting.append(sequence)

    def cancel(self, sequences: set[Sequence]) -> None:
        """Forgets sequences that nobody waits for any more; their slots are free."""
        self.waiting = deque(s for s in self.waiting if s not in sequences)
        self._ended = [s for s in self._ended if s not in sequences]
        if self.partial is not None and self.partial[0] in sequences:
            self.partial = None
        searches = {s.search for s in sequences} - {None}
        self._release([s for s in self.running if s in sequences or s.search in searches])

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.partial or self._ended)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One prefill, if a prompt waits and a slot is free, and one new token for each running sequence.

        Returns:
            the sequences that have ended since the last step.

        Raises:
            Exception: whatever the model raises, such as running out of memory. All sequences in progress have failed
                then, since their keys may be half written; those that wait go on waiting.
        """
        try:
            if self.partial is not None:
                self._continue_partial()
            elif self.waiting:
                self._admit()
            self._release_ended()
            if self.running:
                self._decode()
                self._release_ended()
        except BaseException as error:
            self._give_up(f"the step failed: {type(error).__name__}: {error}")
            raise
        ended, self._ended = self._ended, []
        return ended

    # Prefill

    def _admit(self) -> None:
        """Prefills the next prompts together, each behind what the cache already has of it."""
        budget = PREFILL_TOKENS_WHILE_DECODING if self.running else PREFILL_TOKENS
        first_slot, n_free = len(self.running), self.n_free
        group: list[Sequence] = []
        starts: list[int] = []
        width = 0
        while self.waiting and self.waiting[0].n_slots <= n_free:
            sequence = self.waiting[0]
            source, shared = 0, 0
            if self.reuse_prefixes:
                limit = sequence.n_reusable
                source, shared = self.slots.find(sequence.prompt, limit)
                # One that begins like a prompt of this group waits until that one's keys are there.
                if any(shared_prefix(sequence.prompt, s.prompt[: s.n_prefill], limit) > shared for s in group):
                    break
            wider = max(width, sequence.n_prefill - shared)
            if group and wider * (len(group) + 1) > budget:
                break
            self.waiting.popleft()
            self.slots.take(first_slot + len(group), source, shared)
            self.counters.reused += shared
            if wider > budget:  # alone, and in pieces
                self.partial = (sequence, first_slot, shared)
                self._continue_partial()
                return
            group.append(sequence)
            starts.append(shared)
            width = wider
            n_free -= sequence.n_slots
        if group:
            self.running += group
            self._prefill(group, starts, first_slot, [s.n_prefill for s in group])

    @property
    def n_free(self) -> int:
        """How many slots neither a sequence has nor a search may still grow into."""
        searches = {s.search for s in self.running} - {None}
        n_used = sum(s.search is None for s in self.running) + sum(search.n_slots for search in searches)
        return len(self.slots) - n_used - (0 if self.partial is None else self.partial[0].n_slots)

    def _continue_partial(self) -> None:
        """Prefills the next piece of a long prompt; after the last, the sequence is running."""
        sequence, slot, done = self.partial
        budget = PREFILL_TOKENS_WHILE_DECODING if self.running else PREFILL_TOKENS
        stop = min(done + budget, sequence.n_prefill)
        if stop == sequence.n_prefill:
            self.slots.swap(slot, len(self.running))
            slot, self.partial = len(self.running), None
            self.running.append(sequence)
        else:
            self.partial = (sequence, slot, stop)
        self._prefill([sequence], [done], slot, [stop])

    def _prefill(self, group: list[Sequence], starts: list[int], first_slot: int, stops: list[int]) -> None:
        """Runs prompt[start:stop] of each sequence, right-padded to one width; a whole prompt gets its next token.

        Rows whose padding would leave the cache start earlier instead, and write again what is there already.
        """
        width = max(stop - start for start, stop in zip(starts, stops))
        starts = [min(start, self.model.args.max_seq_len - width) for start in starts]
        rows = [s.prompt[start:stop] for s, start, stop in zip(group, starts, stops)]
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        if tokens.numel() >= PACK_FIRST_TOKENS:
            self._pack()
        hidden = self.model.hidden_states(tokens, starts, slice(first_slot, first_slot + len(group)))
        whole, last = [], []  # the rows that get a token now, and their last columns
        for row, (sequence, start, stop) in enumerate(zip(group, starts, stops)):
            slot = first_slot + row
            self.counters.prefilled += stop - len(self.slots.tokens[slot])
            self.slots.record(slot, start, rows[row])
            if sequence.score_from is not None and sequence.finish_reason is None:
                self._score_prompt(sequence, hidden[row], start, stop)
            if stop == sequence.n_prefill and sequence.finish_reason is None:
                if sequence.max_new_tokens == 0:
                    sequence.finish_reason = "length"
                else:
                    whole.append(row)
                    last.append(stop - start - 1)
        if whole:
            self._choose([group[row] for row in whole], self.model.logits(hidden[whole, last]))

    def _score_prompt(self, sequence: Sequence, hidden: torch.Tensor, start: int, stop: int) -> None:
        """Scores the tokens after positions [start, stop) that have no score yet, from the hidden states [T, dim]."""
        first = sequence.score_from + len(sequence.prompt_token_logprobs)
        following = torch.tensor(sequence.prompt[first : stop + 1], device=self.device)
        hidden = hidden[first - 1 - start :]
        for i in range(0, len(following), LOGITS_CHUNK):
            targets = following[i : i + LOGITS_CHUNK]
            logits = self.model.logits(hidden[i : i + len(targets)])
            if not bool(logits.amax(dim=-1).isfinite().all()):
                sequence.fail(UNUSABLE_LOGITS)
                return
            sequence.prompt_token_logprobs += token_logprobs(logits, targets).tolist()
            sequence.prompt_is_greedy &= torch.equal(logits.argmax(dim=-1), targets)
            if sequence.options.top_logprobs:
                sequence.prompt_top_logprobs += top_logprobs(logits, sequence.options.top_logprobs)

    # Decode

    def _decode(self) -> None:
        """Runs the last token of each running sequence, and chooses the next."""
        self._pack()
        positions = [len(s.prompt) + len(s.tokens) - 1 for s in self.running]
        logits = self.decode_step([s.tokens[-1] for s in self.running], positions, self.slots.spare_position)
        for slot, (sequence, position) in enumerate(zip(self.running, positions)):
            self.slots.record(slot, position, sequence.tokens[-1:])
        self.counters.decoded += len(self.running)
        self._choose(self.running, logits)

    def _pack(self) -> None:
        """Lays the matrices out for fast decoding, once: not while loading, for the sake of the first token."""
        if not self.packed and getattr(self.model, "packable", True):
            pack(self.model)
            self.packed = True

    def _choose(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Gives each sequence its next token, from the logits after its last [B, vocab_size]; a search its beams."""
        searches = dict.fromkeys(s.search for s in sequences if s.search is not None)
        if not searches:
            choose(sequences, logits)
            return
        rows = {sequence: row for row, sequence in enumerate(sequences)}
        if sampled := [sequence for sequence in rows if sequence.search is None]:
            choose(sampled, logits[[rows[sequence] for sequence in sampled]])
        for search in searches:
            self._advance(search, logits[[rows[beam] for beam in search.beams]])

    def _advance(self, search: Search, logits: torch.Tensor) -> None:
        """Lets a search choose the beams that go on, and gives each a slot with its keys.

        The first of a beam's continuations stays in its slot. The others take the slots of beams that have none, then
        free ones; slots that are left over are released.
        """
        slots = [self.running.index(beam) for beam in search.beams]
        n_prompt = len(search.sequence.prompt)
        parents = search.advance(logits.log_softmax(-1))
        stays, sources, movers = set(), [], []
        for parent, beam in zip(parents, search.beams):
            slot = slots[parent]
            if slot in stays:
                sources.append(slot)
                movers.append(beam)
            else:
                stays.add(slot)
                self.running[slot] = beam
        free = [slot for slot in slots if slot not in stays]
        start = n_prompt if len(free) >= len(movers) else 0  # a new slot lacks the prompt
        while len(free) < len(movers):
            free.append(self._new_slot())
        for slot, beam in zip(free, movers):
            self.running[slot] = beam
        if movers:
            stop = max(len(self.slots.tokens[slot]) for slot in sources)
            self.slots.copy(sources, free[: len(movers)], start, stop)
        self._release([self.running[slot] for slot in free[len(movers) :]])
        if not search.beams:
            self._ended.append(search.sequence)

    # Slots

    def _new_slot(self) -> int:
        """The slot behind the running ones, for one more of them; a prompt that is being prefilled there makes room."""
        slot = len(self.running)
        if self.partial is not None and self.partial[1] == slot:
            self.slots.swap(slot, slot + 1)
            self.partial = (self.partial[0], slot + 1, self.partial[2])
        self.slots.record(slot, 0, [])
        self.running.append(None)
        return slot

    def _release_ended(self) -> None:
        ended = [s for s in self.running if s.finish_reason is not None]
        self._release(ended)
        self._ended += ended

    def _release(self, sequences: list[Sequence]) -> None:
        """Takes sequences out of their slots; the last running ones move down into them."""
        for sequence in sequences:
            slot = self.running.index(sequence)
            last = self.running.pop()
            if last is not sequence:
                self.running[slot] = last
            self.slots.swap(len(self.running), slot)

    def _give_up(self, reason: str) -> None:
        """Ends the sequences in progress with an error, and forgets what the slots hold."""
        lost = [*self.running, *([self.partial[0]] if self.partial else [])]
        for sequence in dict.fromkeys(s if s.search is None else s.search.sequence for s in lost):
            if sequence.finish_reason is None:
                sequence.fail(reason)
            self._ended.append(sequence)
        self.running, self.partial = [], None
        self.slots.forget()
