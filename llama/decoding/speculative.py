"""Speculative decoding: a cheap proposer guesses the next tokens, and the model checks all guesses in one pass.

A pass over a few positions costs a large model about as much as a pass over one: both read every weight. So a small
model (`DraftModel`), or a search for the last tokens in the text so far (`NgramLookup`), proposes some tokens. The
large model runs them after the last token and draws its own token at each position. Each proposal that equals the
model's token saves a pass. The first that differs is replaced by the model's token; those after it are dropped.

Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318) accept proposals at random, such that
the output has the model's distribution p although the draft's is q. They accept with probability sum(min(p, q)), which
is the best possible. Here the draft draws with the same random numbers that the model will use at that position
(`sampling.race`, a Gumbel coupling: Daliri, Musco and Suresh 2024, arXiv 2408.07978), and a proposal is accepted if
both drew the same token. So the output does not just have the right distribution: for a given seed it is exactly what
the model generates alone. The price is a lower acceptance rate: at least (1 - d) / (1 + d) instead of 1 - d, where d is
the total variation distance of p and q. With greedy decoding, or a draft that puts all probability on one token, both
methods accept equally often.

Knows tokens but not text. All model-parallel ranks make the same proposals, from the same random numbers.
"""

import itertools
import os
from pathlib import Path
from typing import Protocol

import torch
from fairscale.nn.model_parallel.initialize import get_model_parallel_group

from llama.checkpoint import Checkpoint, build_model, open_checkpoint
from llama.decode_step import run_rows
from llama.decoding.payoff import Payoff
from llama.engine import PREFILL_TOKENS, Engine
from llama.kv_cache import Slots
from llama.layers.hooks import Logits
from llama.layers.packing import pack
from llama.model import Transformer
from llama.sequence import Sequence, choose, draw
from llama.tokenizer import Tokenizer

# How many tokens to propose for a sequence at first, and at most. As in Transformers' assisted generation, the number
# rises by two after a step that accepted all proposals and falls by one after any other. So it settles where about one
# step in three accepts all, and a sequence that is easy to guess gets more proposals.
N_PROPOSALS = 4
MAX_PROPOSALS = 8
# The longest n-gram to look up.
MAX_NGRAM = 3


class Proposer(Protocol):
    """Proposes tokens. Wrong proposals cost time but change no answer."""

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        """Returns up to `limits[i]` ids that may come next in sequence i. Sequences are in the order of the slots."""

    def forget(self) -> None:
        """Discards all state of the sequences: a step has failed, so the state may be incomplete."""


class SpeculativeEngine(Engine):
    """An engine whose decode steps check proposals. Each row accepts its own number of them.

    `Payoff` decides from measured times whether a step has proposals.
    """

    def __init__(self, model: Transformer, proposer: Proposer):
        super().__init__(model)
        self.proposer = proposer
        self.payoff = Payoff(get_model_parallel_group(), self.model.device)
        self._n_proposals: dict[Sequence, int] = {}  # for each running sequence
        self._has_decoded = False  # whether a step without proposals has run: the first one packs the matrices

    def _decode(self) -> None:
        sampled = [s for s in self.running if s.search is None]  # beams get no proposals
        self._n_proposals = {s: self._n_proposals.get(s, N_PROPOSALS) for s in sampled}
        # The step adds one token to the accepted ones, so the last token of the budget is never proposed.
        limits = [min(n, s.max_new_tokens - len(s.tokens) - 1) for s, n in self._n_proposals.items()]
        proposals: dict[Sequence, list[int]] = {}
        may_propose = self._has_decoded and any(limits) and not self.is_observed
        trials, n_rows, n_decoded = self.payoff.at(len(self.running)), len(self.running), self.counters.decoded
        started = self.payoff.clock()
        if may_propose and trials.proposing:
            proposals = dict(zip(sampled, self.proposer.propose(sampled, limits)))
        proposed = self.payoff.clock()
        self.counters.speculation.steps += len(sampled)
        for sequence in sampled:
            sequence.speculation.steps += 1
        if any(proposals.values()):
            self._decode_with([proposals.get(s, []) for s in self.running])
            trials.note_with(self.payoff.clock() - started, (self.counters.decoded - n_decoded) / n_rows)
        else:
            super()._decode()
            if may_propose:
                trials.note_without(self.payoff.clock() - proposed, proposed - started)
            self._has_decoded = True

    def _decode_with(self, proposals: list[list[int]]) -> None:
        """Runs each sequence's last token and its proposals. Chooses tokens up to the first that was not proposed.

        Chooses at a position only when all proposals before it are accepted, so a logits_processor gets exactly the
        calls that it would get without proposals.
        """
        sequences = list(self.running)
        n_held = [len(s.prompt) + len(s.tokens) - 1 for s in sequences]
        texts = [s.prompt + s.tokens + proposal for s, proposal in zip(sequences, proposals)]
        found, at = run_rows(self.model, texts, n_held, 0)
        rows = [row for row, proposal in enumerate(proposals) for _ in range(1 + len(proposal))]
        columns = [first + i for first, proposal in zip(at, proposals) for i in range(1 + len(proposal))]
        logits = found[rows, columns]
        firsts = [0, *itertools.accumulate(1 + len(proposal) for proposal in proposals)]
        accepted = [0] * len(sequences)
        alive = [row for row, sequence in enumerate(sequences) if sequence.search is None]
        while alive:
            positions = [firsts[row] + accepted[row] for row in alive]
            chosen = choose([sequences[row] for row in alive], logits[positions])
            self.counters.decoded += len(alive)
            agreed = [row for row, token in zip(alive, chosen) if proposals[row][accepted[row] :][:1] == [token]]
            for row in agreed:
                accepted[row] += 1
            alive = [row for row in agreed if sequences[row].finish_reason is None]
        for slot, (sequence, n) in enumerate(zip(sequences, accepted)):
            # The keys of rejected proposals come after these. The next step overwrites them.
            self.slots.record(slot, n_held[slot], texts[slot][n_held[slot] :][: n + 1])
            if sequence.search is None:
                self._count(sequence, len(proposals[slot]), n)
        beams = [row for row, sequence in enumerate(sequences) if sequence.search is not None]
        if beams:
            self.counters.decoded += len(beams)
            self._choose([sequences[row] for row in beams], logits[[firsts[row] for row in beams]])

    def _count(self, sequence: Sequence, n_proposed: int, n_accepted: int) -> None:
        for counts in (self.counters.speculation, sequence.speculation):
            counts.proposed += n_proposed
            counts.accepted += n_accepted
        if n_proposed:
            n = self._n_proposals[sequence] + (2 if n_accepted == n_proposed else -1)
            self._n_proposals[sequence] = min(max(n, 1), MAX_PROPOSALS)

    def _give_up(self, reason: str) -> None:
        super()._give_up(reason)
        self.proposer.forget()


class NgramLookup:
    """Finds the last tokens earlier in the text, at most MAX_NGRAM of them, and proposes what followed them there.

    For answers that repeat parts of their prompt (summaries, corrections, code) or of themselves. "Prompt lookup
    decoding" (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self):
        self._indices: dict[Sequence, NgramIndex] = {}

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        self._indices = {s: self._indices.get(s) or NgramIndex(s.prompt) for s in sequences}
        for sequence, index in self._indices.items():
            index.extend(sequence.tokens[len(index.ids) - len(sequence.prompt) :])
        return [index.following(limit) for index, limit in zip(self._indices.values(), limits)]

    def forget(self) -> None:
        self._indices = {}


class NgramIndex:
    """The ids of a growing text, and where each of its n-grams last ended."""

    def __init__(self, ids: list[int]):
        self.ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self.extend(ids)

    def extend(self, ids: list[int]) -> None:
        """Appends ids. Indexes the n-grams that end before the last id, because nothing follows that one yet."""
        for token in ids:
            for n in range(1, min(MAX_NGRAM, len(self.ids)) + 1):
                self._ends[tuple(self.ids[-n:])] = len(self.ids)
            self.ids.append(token)

    def following(self, limit: int) -> list[int]:
        """Returns up to `limit` ids that followed an earlier occurrence of the last ids; the longest match counts."""
        for n in range(min(MAX_NGRAM, len(self.ids)), 0, -1):
            if (end := self._ends.get(tuple(self.ids[-n:]))) is not None:
                # At the end of the text it starts over, as if the text were periodic.
                period = len(self.ids) - end
                return [self.ids[end + i % period] for i in range(limit)]
        return []


class DraftModel:
    """Proposes the tokens that a smaller model draws, with the random numbers that the large model will use.

    It has its own cache and its own record of what the cache holds. Between calls the engine may add, end or move
    sequences and reject proposals: the draft runs whatever ids it lacks. It follows every option but
    `logits_processor`, because a caller's code must not be called with mere proposals.

    Args:
        model: has the vocabulary of the large model, and as many slots and positions.
    """

    def __init__(self, model: Transformer):
        self.model = model
        if model.cache is None:
            model.allocate_cache()
        self.slots = Slots(model.cache)
        self._lengths: dict[Sequence, int] = {}  # number of ids at the last call, in the order of the slots

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        pack(self.model)
        texts = [s.prompt + s.tokens for s in sequences]
        self._place(sequences, texts)
        self._prefill(texts)
        self._lengths = {s: len(text) for s, text in zip(sequences, texts)}
        wanted = {slot: self._lacks(slot, text) for slot, text in enumerate(texts) if limits[slot] > 0}
        wanted = {slot: ids for slot, ids in wanted.items() if len(ids) <= 2}
        proposals: list[list[int]] = [[] for _ in sequences]
        for ahead in range(max(limits)):
            if not wanted:
                break
            found, rows, columns = self._run(wanted)
            some, theirs = [sequences[slot] for slot in wanted], [texts[slot] for slot in wanted]
            tokens = self._draw(some, theirs, found[rows, columns], ahead)
            for slot, token in zip(wanted, tokens):
                proposals[slot].append(token)
                texts[slot].append(token)
            wanted = {
                slot: [token]
                for slot, token in zip(wanted, tokens)
                if ahead + 1 < limits[slot] and token not in sequences[slot].stop_tokens
            }
        return proposals

    def forget(self) -> None:
        self._lengths = {}
        self.slots.forget()

    def _place(self, sequences: list[Sequence], texts: list[list[int]]) -> None:
        """Moves sequence i to slot i, with the keys that it has. A new sequence takes those of a shared beginning."""
        held = self.slots.tokens
        order = [*self._lengths, *[None] * (len(self.slots) - len(self._lengths))]
        for slot, (sequence, text) in enumerate(zip(sequences, texts)):
            if sequence not in self._lengths:
                continue
            at = order.index(sequence)
            self.slots.swap(slot, at)
            order[slot], order[at] = order[at], order[slot]
            # Keep the keys of proposals that were accepted.
            kept = min(self._lengths[sequence], len(held[slot]))
            while kept < min(len(held[slot]), len(text) - 1) and held[slot][kept] == text[kept]:
                kept += 1
            del held[slot][kept:]
        new = [slot for slot, sequence in enumerate(sequences) if sequence not in self._lengths]
        for i, slot in enumerate(new):
            source, shared = self.slots.find(texts[slot], len(texts[slot]) - 1)
            if len(sequences) - slot == len(new) - i:  # all slots from this one on are free
                self.slots.take(slot, source, shared)
            else:  # after steps without proposals, a slot above this one may have its sequence already
                self.slots.record(slot, shared if source == slot else 0, [])
                if shared and source != slot:
                    self.slots.copy([source], [slot], 0, shared)

    def _prefill(self, texts: list[list[int]]) -> None:
        """Runs new texts except their last ids, in one pass. A long text takes several steps before its proposals."""
        new = [slot for slot, text in enumerate(texts) if len(self._lacks(slot, text)) > 2]
        if new:
            longest = max(len(self._lacks(slot, texts[slot])) - 1 for slot in new)
            width = min(longest, max(1, PREFILL_TOKENS // (new[-1] + 1 - new[0])))
            self._run({slot: self._lacks(slot, texts[slot])[:-1][:width] for slot in new})

    def _lacks(self, slot: int, text: list[int]) -> list[int]:
        return text[len(self.slots.tokens[slot]) :]

    def _run(self, wanted: dict[int, list[int]]) -> tuple[Logits, list[int], list[int]]:
        """Runs ids after what their slots hold. Returns the logits, and row and column of each slot's last id.

        Slots between them that have no ids run padding, which is written after what they hold.
        """
        first, last = min(wanted), max(wanted)
        held = self.slots.tokens[first : last + 1]
        texts = [tokens + wanted.get(slot, []) for slot, tokens in enumerate(held, first)]
        logits, at = run_rows(self.model, texts, list(map(len, held)), first)
        columns = [at[slot - first] + len(ids) - 1 for slot, ids in wanted.items()]
        for slot, ids in wanted.items():
            self.slots.record(slot, len(self.slots.tokens[slot]), ids)
        return logits, [slot - first for slot in wanted], columns

    def _draw(self, sequences: list[Sequence], texts: list[list[int]], logits: torch.Tensor, ahead: int) -> list[int]:
        """Returns the token that each sequence would get from this model."""
        logits = logits.cpu() if logits.device.type == "mps" else logits  # MPS has no float64
        for row, (sequence, text) in enumerate(zip(sequences, texts)):
            if sequence.process is not None:
                logits[row] = sequence.process(logits[row], text[len(sequence.prompt) :], is_guess=True)
        return draw(sequences, logits, ahead).tolist()


def open_draft(
    draft: str | os.PathLike | None, target: Tokenizer, max_seq_len: int, max_batch_size: int
) -> Checkpoint | None:
    """Opens the checkpoint of a draft without reading weights. Returns None if the draft is no model.

    Arguments and errors as in `Llama.build`.
    """
    if draft is None or draft == "ngram":
        return None
    if not isinstance(draft, (str, os.PathLike)):
        raise TypeError(f"draft = {draft!r}: expected a directory, 'ngram' or None")
    if not Path(draft).is_dir():
        raise FileNotFoundError(f"draft = {str(draft)!r}: expected the directory of a smaller model, or 'ngram'")
    tokenizer, checkpoint = open_checkpoint(draft, None, max_seq_len, max_batch_size)
    try:
        check_tokenizer(tokenizer, target)
        with torch.device("meta"):
            Transformer(checkpoint.args)  # raises if these processes cannot share its heads
    except ValueError as error:
        raise ValueError(f"draft {draft} cannot propose tokens to this model: {error}") from error
    return checkpoint


def make_proposer(
    draft: str | os.PathLike | None, checkpoint: Checkpoint | None, dtype: torch.dtype, device: torch.device
) -> Proposer | None:
    """Creates the proposer for `Llama.build(draft=…)`. `checkpoint` is the result of `open_draft`."""
    if checkpoint is None:
        return None if draft is None else NgramLookup()
    return DraftModel(build_model(checkpoint, dtype, device)[0])


def check_tokenizer(draft: Tokenizer, target: Tokenizer) -> None:
    """Raises ValueError with the first difference if a draft's tokens differ from the model's.

    Names of special tokens may differ (Llama 3.1 named some reserved ones), but the same ids must be special.
    """
    for name in ("n_words", "bos_id", "eos_id", "eot_id"):
        if (found := getattr(draft, name)) != (expected := getattr(target, name)):
            raise ValueError(f"the draft's tokenizer has {name} = {found}: expected the model's, {expected}")
    special, expected_special = (set(t.special_tokens.values()) for t in (draft, target))
    for token in range(target.n_words):
        if token in special ^ expected_special:
            which = "draft's" if token in special else "model's"
            raise ValueError(f"token {token} is special in the {which} tokenizer alone: expected it in both")
        found, expected = draft.token_bytes(token), target.token_bytes(token)
        if found != expected and token not in special:
            raise ValueError(f"token {token} is {found!r} in the draft's tokenizer: expected the model's, {expected!r}")
