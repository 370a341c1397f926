"""Runs many sequences through one model: assigns slots, prefills prompts, decodes tokens, ends sequences.

Start reading at `Engine.step`. Sequences wait in a queue. Each is prefilled into a free slot, decodes one token a step
in one batch with the others, and frees its slot when it ends.

Knows tokens but not text, and nothing of threads. Each model-parallel rank has its own engine. All of them run the same
steps on the same logits with the same random numbers, so they agree on every token without communicating.
"""

from collections import deque

import torch
from torch import nn

from llama.decode_step import DecodeStep, run_rows
from llama.kv_cache import Slots, shared_prefix
from llama.layers.hooks import Patches, is_observed
from llama.layers.packing import pack
from llama.meta_names import ForwardOnly, cache_state, recompute_keys, runnable
from llama.model import Transformer
from llama.sequence import Counters, Search, Sequence, choose, score_prompt

# The most positions of one prefill, padding included: enough to keep a device busy, and a limit on the memory that the
# activations take. Smaller while sequences decode, so that they do not stall. Longer prompts run in pieces.
PREFILL_TOKENS = 4096
PREFILL_TOKENS_WHILE_DECODING = 512
# A prefill of at least this many positions gains more from packed matrices than packing costs.
PACK_FIRST_TOKENS = 384

# One prefill: the sequences, the start of each, the slot of the first sequence, the end of each.
Batch = tuple[list[Sequence], list[int], int, list[int]]


class Engine:
    """Runs sequences through a model, as many at a time as its cache has slots.

    Slot i holds sequence i of `running`, so a decode step reads one slice of the cache. A slot after these may hold a
    sequence whose prompt is prefilled in pieces. A freed slot keeps its keys and values until they are overwritten. A
    new prompt with the same beginning copies them instead of computing them.
    """

    def __init__(self, model: Transformer):
        self.module, self.model = model, runnable(model)  # what callers see, and what the engine runs
        self.model_is_held = True  # whether a caller has a reference to it, and may change or run it at any time
        self.is_observed, self.patches = is_observed(model), Patches(model)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.partial: tuple[Sequence, int, int] | None = None  # a sequence, its slot, how many prompt tokens have run
        self.model.allocate_cache()
        self.slots = Slots(self.model.cache)
        self._cache_state: tuple | None = None  # at the end of the last step
        self.counters = Counters()
        self.decode_step = DecodeStep(self.model)
        self.reuse_prefixes = True
        self._ended: list[Sequence] = []  # the next step returns these

    def compile(self) -> None:
        """Compiles the decode step when it first runs. Raises ValueError for a model with hooks."""
        runnable(self.module, compiled=True)
        self.decode_step = DecodeStep(self.model, compile=True)

    def check(self, model: nn.Module) -> "Transformer | ForwardOnly":
        """Returns what the engine would run for `model`. Raises ValueError or TypeError if it cannot run it."""
        return runnable(model, self.decode_step.compiled)

    def refresh_model(self) -> None:
        """Runs the model as callers have changed it. Fails or recomputes what is in progress. Raises as `check`."""
        now = self.check(self.module)
        now.allocate_cache()  # for casts and replaced modules
        if now != self.model:
            self._give_up("the model was replaced by another, or runs one sequence at a time from now on")
            self.model, self.slots = now, Slots(now.cache)
            self.decode_step = DecodeStep(now, self.decode_step.compiled)
            for sequence in [s for s in self.waiting if s.n_slots > len(self.slots)]:
                self.waiting.remove(sequence)
                self._ended.append(sequence)
                sequence.fail("beams share keys, which a model that runs one sequence at a time cannot")
        self.is_observed = is_observed(self.module)
        if cache_state(self.model) != self._cache_state:  # a caller ran the model, or changed its cache
            lengths = {slot: len(sequence.prompt) for slot, sequence in enumerate(self.running)}
            if self.partial:
                lengths[self.partial[1]] = self.partial[2]
            recompute_keys(self.model, self.slots, lengths, self.is_observed)
            self._cache_state = cache_state(self.model)

    def add(self, sequence: Sequence) -> None:
        """Appends a sequence to the queue. `step` returns it once it has ended."""
        if sequence.n_slots > len(self.slots):
            raise ValueError(f"{sequence.n_slots} beams: expected at most the {len(self.slots)} slots of the cache")
        if sequence.n_prefill == 0:
            sequence.finish_reason = "length"
            self._ended.append(sequence)
        else:
            self.waiting.append(sequence)

    def cancel(self, sequences: set[Sequence]) -> None:
        """Drops sequences and frees their slots. `step` will not return them."""
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
        """Prefills waiting prompts if a slot is free, then gives each running sequence one more token.

        Returns the sequences that have ended since the last step. Raises whatever the model raises, for example when
        memory runs out. All sequences in progress fail then, because their keys may be incomplete. The queue is kept.
        """
        try:
            if self.model_is_held:
                self.refresh_model()
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
        """Moves waiting prompts into free slots. Returns the batch to prefill, without what the cache already holds."""
        budget = PREFILL_TOKENS_WHILE_DECODING if self.running else PREFILL_TOKENS
        # A search counts as the most slots that it may need.
        taken = {sequence.search or sequence: sequence.n_slots for sequence in self.running}
        n_free = len(self.slots) - sum(taken.values()) - (0 if self.partial is None else self.partial[0].n_slots)
        first_slot = len(self.running)
        group, starts, stops, width = [], [], [], 0
        while self.waiting and self.waiting[0].n_slots <= n_free:
            sequence = self.waiting[0]
            limit = 0 if self.is_observed or not self.reuse_prefixes else sequence.n_reusable
            source, shared = self.slots.find(sequence.prompt, limit)
            # A prompt that shares a longer beginning with one of this group waits, and copies those keys next time.
            if group and any(shared_prefix(sequence.prompt, s.prompt[: s.n_prefill], limit) > shared for s in group):
                break
            wider = max(width, sequence.n_prefill - shared)
            if group and (wider * (len(group) + 1) > budget or (self.is_observed and sequence.n_prefill != width)):
                break  # it is too much for one prefill, or a hook would see padding
            self.waiting.popleft()
            self.slots.take(first_slot + len(group), source, shared)
            self.counters.reused += shared
            sequence.n_cached = shared
            if wider > budget and not self.is_observed:  # runs alone, in pieces
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
        """Returns the next piece of a long prompt. With the last piece, the sequence joins `running`."""
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
        """Runs prompt[start:stop] of each sequence. A sequence whose prompt is complete gets its first token."""
        texts = [sequence.prompt[:stop] for sequence, stop in zip(group, stops)]
        if sum(stops) - sum(starts) >= PACK_FIRST_TOKENS:
            pack(self.model)
        logits, at = run_rows(self.model, texts, starts, first_slot)
        whole, last = [], []  # rows whose prompt is complete, and the column of its last token
        for row, (sequence, start, stop) in enumerate(zip(group, starts, stops)):
            self.counters.prefilled += stop - start
            self.slots.record(first_slot + row, start, sequence.prompt[start:stop])
            if sequence.score_from is not None and sequence.finish_reason is None:
                column = at[row] - start  # where position 0 would be
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
        packed = pack(self.model)  # not while loading, so that the first token does not wait for it
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
        """Chooses the next token of each sequence, and the next beams of each search, from logits [B, vocab_size]."""
        sampled, searches = [], {}  # rows, and for each search the row of each of its beams
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
        """Advances a search by one token, and gives each new beam a slot with the keys of its parent.

        The first child of a beam keeps its slot. Other children take slots of beams without children, then free ones.
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
        start = len(search.sequence.prompt) if len(free) >= len(movers) else 0  # new slots need the prompt's keys too
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
        """Adds the slot after the running ones to them; moves a prompt that is prefilled there to the next slot."""
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
        self._cache_state = cache_state(self.model)  # the step writes nothing after this

    def _release(self, sequence: Sequence) -> None:
        """Frees the slot of a sequence, and moves the last running sequence into it."""
        slot = self.running.index(sequence)
        if (last := self.running.pop()) is not sequence:
            self.running[slot] = last
        self.slots.swap(len(self.running), slot)

    def _give_up(self, reason: str) -> None:
        """Fails the sequences in progress, and discards the record of what the slots hold."""
        lost = [*self.running, *([self.partial[0]] if self.partial else [])]
        for sequence in dict.fromkeys(s if s.search is None else s.search.sequence for s in lost):
            if sequence.finish_reason is None:
                sequence.fail(reason)
            self._ended.append(sequence)
        self.running, self.partial = [], None
        self.slots.forget()
