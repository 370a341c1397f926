"""Many sequences through one model: which slot each is in, prefill, decode steps, and when each ends.

Knows tokens and not text, and nothing of threads. The engine of each model-parallel rank runs the same steps on the
same logits and draws the same random numbers, so ranks agree on every token without talking about it.

`Engine.step` tells the whole story: sequences wait, are prefilled into a slot, decode one token a step beside all the
others, and leave their slot to the next.
"""

from collections import deque

import torch
from torch import nn

from llama.decode_step import DecodeStep, run_rows
from llama.kv_cache import Slots, shared_prefix
from llama.layers.hooks import Patches, is_looked_at
from llama.layers.packing import pack
from llama.meta_names import ForwardOnly, cache_state, run_again, runnable
from llama.model import Transformer
from llama.sequence import Counters, Search, Sequence, choose, score_prompt

# How many positions one prefill works on, padding included: enough to keep a device busy, and a bound on the memory of
# the activations. While other sequences are decoding it is less, so that they do not stall; longer prompts are cut.
PREFILL_TOKENS = 4096
PREFILL_TOKENS_WHILE_DECODING = 512
# A first prefill of this many positions gains more from packed matrices than packing them takes.
PACK_FIRST_TOKENS = 384

# What one prefill runs: sequences, where each begins, the slot of the first, where each ends.
Batch = tuple[list[Sequence], list[int], int, list[int]]


class Engine:
    """Runs sequences through a model, as many at a time as its cache has slots.

    Slots 0, 1, … hold the sequences in `running`, in their order, so that a decode step reads one slice of the cache.
    A slot after them may hold one whose prompt is being prefilled in pieces. What a slot held stays in it until it is
    overwritten, and a new prompt that begins alike takes the keys and values of the shared beginning from there.
    """

    def __init__(self, model: Transformer):
        self.opened, self.model = model, runnable(model)  # what users see, and how it is run
        self.model_is_held = True  # by somebody who may change it, or run it, at any time
        self.is_looked_at, self.patches = is_looked_at(model), Patches(model)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.partial: tuple[Sequence, int, int] | None = None  # a sequence, its slot, how much of its prompt is done
        self.model.allocate_cache()
        self.slots = Slots(self.model.cache)
        self._cache_state: tuple | None = None  # after the last step
        self.counters = Counters()
        self.decode_step = DecodeStep(self.model)
        self.reuse_prefixes = True
        self._ended: list[Sequence] = []  # since the last step returned

    def compile(self) -> None:
        """Has the decoding step compiled when it first runs. Raises ValueError for a model with hooks."""
        runnable(self.opened, compiled=True)
        self.decode_step = DecodeStep(self.model, compile=True)

    def check(self, model: nn.Module) -> "Transformer | ForwardOnly":
        """How a model would be run. Raises ValueError or TypeError if it cannot be, or not in a compiled step."""
        return runnable(model, self.decode_step.compiled)

    def look_again(self) -> None:
        """Runs the model as it is now; what was in progress in another has failed. Raises as `check`."""
        now = self.check(self.opened)
        now.allocate_cache()  # which follows casts, and modules that were exchanged
        if now != self.model:
            self._give_up("the model was exchanged for another, or runs one sequence at a time from now on")
            self.model, self.slots = now, Slots(now.cache)
            self.decode_step = DecodeStep(now, self.decode_step.compiled)
            for sequence in [s for s in self.waiting if s.n_slots > len(self.slots)]:
                self.waiting.remove(sequence)
                self._ended.append(sequence)
                sequence.fail("beams share keys, which a model that runs one sequence at a time cannot")
        self.is_looked_at = is_looked_at(self.opened)
        if cache_state(self.model) != self._cache_state:  # somebody else has run the model, or changed its cache
            partial = [self.partial[1:]] if self.partial else []  # a slot, and how long its prompt is so far
            held = [*enumerate(len(sequence.prompt) for sequence in self.running), *partial]
            run_again(self.model, self.slots, dict(held), self.is_looked_at)
            self._cache_state = cache_state(self.model)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of those that wait for a slot; `step` returns it once it has ended."""
        if sequence.n_slots > len(self.slots):
            raise ValueError(f"{sequence.n_slots} beams: expected at most the {len(self.slots)} slots of the cache")
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
        is_ours = cache_state(self.model) == self._cache_state
        for sequence in [s for s in self.running if s in sequences or s.search in searches]:
            self._release(sequence)
        self._cache_state = cache_state(self.model) if is_ours else None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.partial or self._ended)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One prefill, if a prompt waits and a slot is free, and one new token for each running sequence.

        Returns the sequences that have ended since the last step. Raises whatever the model raises, such as running out
        of memory: all sequences in progress have failed then, for their keys may be half written; the others wait on.
        """
        try:
            if self.model_is_held:
                self.look_again()
            if self.partial is not None:
                self._prefill(*self._next_piece())
            elif self.waiting and (batch := self._admit()) is not None:
                self._prefill(*batch)
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

    def _admit(self) -> Batch | None:
        """The next prompts that are prefilled together, each behind what the cache already has of it."""
        budget = PREFILL_TOKENS_WHILE_DECODING if self.running else PREFILL_TOKENS
        # Slots that neither a sequence has nor a search may still grow into.
        taken = {sequence.search or sequence: sequence.n_slots for sequence in self.running}
        n_free = len(self.slots) - sum(taken.values()) - (0 if self.partial is None else self.partial[0].n_slots)
        first_slot = len(self.running)
        group, starts, stops, width = [], [], [], 0
        while self.waiting and self.waiting[0].n_slots <= n_free:
            sequence = self.waiting[0]
            limit = 0 if self.is_looked_at or not self.reuse_prefixes else sequence.n_reusable
            source, shared = self.slots.find(sequence.prompt, limit)
            # One that begins like a prompt of this group waits until that one's keys are there.
            if group and any(shared_prefix(sequence.prompt, s.prompt[: s.n_prefill], limit) > shared for s in group):
                break
            wider = max(width, sequence.n_prefill - shared)
            if group and (wider * (len(group) + 1) > budget or (self.is_looked_at and sequence.n_prefill != width)):
                break  # who looks sees no padding
            self.waiting.popleft()
            self.slots.take(first_slot + len(group), source, shared)
            self.counters.reused += shared
            sequence.n_cached = shared
            if wider > budget and not self.is_looked_at:  # alone, and in pieces
                self.partial = (sequence, first_slot, shared)
                return self._next_piece()
            group.append(sequence)
            starts.append(shared)
            stops.append(sequence.n_prefill)
            width = wider
            n_free -= sequence.n_slots
        self.running += group
        return (group, starts, first_slot, stops) if group else None

    def _next_piece(self) -> Batch:
        """The next piece of a long prompt; with the last, the sequence is running."""
        sequence, slot, done = self.partial
        budget = PREFILL_TOKENS_WHILE_DECODING if self.running else PREFILL_TOKENS
        if (stop := min(done + budget, sequence.n_prefill)) == sequence.n_prefill:
            self.slots.swap(slot, len(self.running))
            slot, self.partial = len(self.running), None
            self.running.append(sequence)
        else:
            self.partial = (sequence, slot, stop)
        return [sequence], [done], slot, [stop]

    def _prefill(self, group: list[Sequence], starts: list[int], first_slot: int, stops: list[int]) -> None:
        """Runs prompt[start:stop] of each sequence; one whose whole prompt has run gets its next token."""
        texts = [sequence.prompt[:stop] for sequence, stop in zip(group, stops)]
        if sum(stops) - sum(starts) >= PACK_FIRST_TOKENS:
            pack(self.model)
        logits, at = run_rows(self.model, texts, starts, first_slot)
        whole, last = [], []  # the rows that get a token now, and their last columns
        for row, (sequence, start, stop) in enumerate(zip(group, starts, stops)):
            self.counters.prefilled += stop - start
            self.slots.record(first_slot + row, start, sequence.prompt[start:stop])
            if sequence.score_from is not None and sequence.finish_reason is None:
                column = at[row] - start  # of position 0
                score_prompt(sequence, lambda a, b, r=row, c=column: logits[r, a + c : b + c], stop)
            if stop == sequence.n_prefill and sequence.finish_reason is None:
                if sequence.max_new_tokens == 0:
                    sequence.finish_reason = "length"
                else:
                    whole.append(row)
                    last.append(at[row] + stop - start - 1)
        if whole:
            self._choose([group[row] for row in whole], logits[whole, last])

    # Decode

    def _decode(self) -> None:
        """Runs the last token of each running sequence, and chooses the next."""
        packed = pack(self.model)  # here and not while loading, so that the first token comes at once
        tokens, positions = [], []
        for sequence in self.running:
            tokens.append(sequence.tokens[-1])
            positions.append(len(sequence.prompt) + len(sequence.tokens) - 1)
        step = self.decode_step.for_changed_model() if packed and self.model_is_held else self.decode_step
        self.decode_step = step or self.decode_step
        logits = self.decode_step(tokens, positions, self.slots.spare_position, not packed or step is None)
        for slot, (token, position) in enumerate(zip(tokens, positions)):
            self.slots.record(slot, position, [token])
        self.counters.decoded += len(self.running)
        self._choose(self.running, logits)

    def _choose(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Gives each sequence its next token, from the logits after its last [B, vocab_size]; a search its beams."""
        sampled, searches = [], {}  # rows; and the row of each beam of each search
        for row, sequence in enumerate(sequences):
            if sequence.search is None:
                sampled.append(row)
            else:
                searches.setdefault(sequence.search, {})[sequence] = row
        if not searches:
            choose(sequences, logits)
        elif sampled:
            choose([sequences[row] for row in sampled], logits[sampled])
        for search, rows in searches.items():
            self._advance(search, logits[[rows[beam] for beam in search.beams]])

    def _advance(self, search: Search, logits: torch.Tensor) -> None:
        """Lets a search choose the beams that go on, and gives each a slot with its keys.

        A beam's first continuation stays in its slot; the others take those of beams that have none, then free ones.
        """
        slots = [self.running.index(beam) for beam in search.beams]
        parents = search.advance(logits.log_softmax(-1))
        stays, sources, movers = set(), [], []
        for slot, beam in zip([slots[parent] for parent in parents], search.beams):
            if slot in stays:
                sources.append(slot)
                movers.append(beam)
            else:
                stays.add(slot)
                self.running[slot] = beam
        free = [slot for slot in slots if slot not in stays]
        start = len(search.sequence.prompt) if len(free) >= len(movers) else 0  # a new slot lacks the prompt
        while len(free) < len(movers):
            free.append(self._new_slot())
        for slot, beam in zip(free, movers):
            self.running[slot] = beam
        if movers:
            stop = max(len(self.slots.tokens[slot]) for slot in sources)
            self.slots.copy(sources, free[: len(movers)], start, stop)
        for beam in [self.running[slot] for slot in free[len(movers) :]]:
            self._release(beam)
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
        for sequence in [sequence for sequence in self.running if sequence.finish_reason is not None]:
            self._release(sequence)
            self._ended.append(sequence)
        self._cache_state = cache_state(self.model)  # no step writes anything after this

    def _release(self, sequence: Sequence) -> None:
        """Takes a sequence out of its slot; the last running one moves down into it."""
        slot = self.running.index(sequence)
        if (last := self.running.pop()) is not sequence:
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
