"""Speculative decoding: something cheap proposes the next tokens, and the model checks them all in one pass.

A pass over a few positions costs a large model about as much as one over a single position: both read every weight.
So a small model (`DraftModel`), or a look at what the text has said before (`NgramLookup`), proposes some tokens; the
model runs them behind the last one and draws its own token at each position. Where the two agree the proposal has saved
a pass; the first that differs is replaced by the model's, and what was proposed after it is forgotten.

In Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318) a coin decides whether a proposal
drawn from q is accepted as one from p, so that the output has the model's distribution; it is with probability
sum(min(p, q)), the most that is possible. Here the draft draws with the very random numbers that the model will draw
with at that position (`sampling.race`, a Gumbel coupling: Daliri, Musco and Suresh 2024, arXiv 2408.07978), and is
accepted if both have drawn the same token. So the output does not only have the model's distribution: it *is* what the
model alone gives for the seed, token for token, whatever proposes. The price is acceptance: with d, the total variation
distance of p and q, it is at least (1 - d) / (1 + d) instead of 1 - d. Greedy, and for proposals that put all on one
token, both methods accept the same.

Knows tokens and not text. Every model-parallel rank makes the same proposals, from the same numbers.
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

# How many tokens are proposed for a sequence at first, and at most. In between, two more after proposals that were all
# accepted and one less after others, which settles where about one step in three accepts all (the schedule of
# Transformers' assisted generation): a sequence that is easy to guess gets more guesses.
N_PROPOSALS = 4
MAX_PROPOSALS = 8
# The longest run of last tokens that is looked for in what came before.
MAX_NGRAM = 3


class Proposer(Protocol):
    """Where proposals come from. They may be anything: no answer depends on them, only how soon it is there."""

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        """For each running sequence, in the order of the slots, up to its limit of ids that may come next."""

    def forget(self) -> None:
        """Forgets all sequences: a step was broken off, and what is remembered of them may be half written."""


class SpeculativeEngine(Engine):
    """An engine whose decode steps check proposals, each row at its own acceptance.

    Measured times decide whether there are proposals (`Payoff`). All else is the engine's: which sequences run beside
    each other, prefill, prefixes, and how a token is chosen.
    """

    def __init__(self, model: Transformer, proposer: Proposer):
        super().__init__(model)
        self.proposer = proposer
        self.payoff = Payoff(get_model_parallel_group(), self.model.device)
        self._n_proposals: dict[Sequence, int] = {}  # how many each running sequence gets
        self._has_decoded = False  # a token without proposals, which packs the matrices

    def _decode(self) -> None:
        sampled = [s for s in self.running if s.search is None]  # beams are not proposed for
        self._n_proposals = {s: self._n_proposals.get(s, N_PROPOSALS) for s in sampled}
        # The step adds one token to those accepted, so the last of the budget is never proposed.
        limits = [min(n, s.max_new_tokens - len(s.tokens) - 1) for s, n in self._n_proposals.items()]
        proposals: dict[Sequence, list[int]] = {}
        may_propose = self._has_decoded and any(limits) and not self.is_looked_at
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
            if may_propose:  # the first step packs the matrices
                trials.note_without(self.payoff.clock() - proposed, proposed - started)
            self._has_decoded = True

    def _decode_with(self, proposals: list[list[int]]) -> None:
        """Runs each sequence's last token and its proposals, and chooses tokens as long as these are what was proposed.

        Each position is chosen from only once all before it are accepted: a logits_processor sees what it would see
        without proposals, call by call.
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
            # Behind these lie the keys of what was rejected, which the next step overwrites.
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
    """Proposes what came after the last tokens the last time they occurred: the longest run of up to MAX_NGRAM of them.

    For answers that repeat their prompt (a summary, a correction, code) or themselves. "Prompt lookup decoding" (Saxena
    2023, github.com/apoorvumang/prompt-lookup-decoding).
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
    """The ids of a text that grows, and where each n-gram of it last ended."""

    def __init__(self, ids: list[int]):
        self.ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self.extend(ids)

    def extend(self, ids: list[int]) -> None:
        """Takes more ids. The n-grams noted are those that end before the last id, which has nothing after it."""
        for token in ids:
            for n in range(1, min(MAX_NGRAM, len(self.ids)) + 1):
                self._ends[tuple(self.ids[-n:])] = len(self.ids)
            self.ids.append(token)

    def following(self, limit: int) -> list[int]:
        """At most `limit` ids that came after the last occurrence of the longest run of last ids that has another."""
        for n in range(min(MAX_NGRAM, len(self.ids)), 0, -1):
            if (end := self._ends.get(tuple(self.ids[-n:]))) is not None:
                # What reaches the end of the text goes on with its own beginning, as a text with a period does.
                period = len(self.ids) - end
                return [self.ids[end + i % period] for i in range(limit)]
        return []


class DraftModel:
    """Proposes what a smaller model draws, with the random numbers that the large one will draw with.

    It has a cache of its own, and keeps its own record of what that holds: whatever the engine has done meanwhile
    (taken sequences in, ended some, moved others, rejected proposals), the draft runs those ids that it lacks. It
    follows every option but `logits_processor`: a caller's code is not called with tokens that nobody has chosen.

    Args:
        model: with the vocabulary of the large one, and as many slots and positions.
    """

    def __init__(self, model: Transformer):
        self.model = model
        if model.cache is None:
            model.allocate_cache()
        self.slots = Slots(model.cache)
        self._lengths: dict[Sequence, int] = {}  # those of last time, in the order of their slots, and their ids then

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
        """Gives each sequence the slot of its place in the list: what it held until now, or a shared beginning."""
        held = self.slots.tokens
        order = [*self._lengths, *[None] * (len(self.slots) - len(self._lengths))]
        for slot, (sequence, text) in enumerate(zip(sequences, texts)):
            if sequence not in self._lengths:
                continue
            at = order.index(sequence)
            self.slots.swap(slot, at)
            order[slot], order[at] = order[at], order[slot]
            # Of what was proposed then, what has become the text.
            kept = min(self._lengths[sequence], len(held[slot]))
            while kept < min(len(held[slot]), len(text) - 1) and held[slot][kept] == text[kept]:
                kept += 1
            del held[slot][kept:]
        new = [slot for slot, sequence in enumerate(sequences) if sequence not in self._lengths]
        for i, slot in enumerate(new):
            source, shared = self.slots.find(texts[slot], len(texts[slot]) - 1)
            if len(sequences) - slot == len(new) - i:  # all slots from here on are free
                self.slots.take(slot, source, shared)
            else:  # steps without proposals came before, and a slot above this one has its sequence already
                self.slots.record(slot, shared if source == slot else 0, [])
                if shared and source != slot:
                    self.slots.copy([source], [slot], 0, shared)

    def _prefill(self, texts: list[list[int]]) -> None:
        """Runs new texts up to their last ids, one pass a step. Long ones take several, and get no proposals before."""
        new = [slot for slot, text in enumerate(texts) if len(self._lacks(slot, text)) > 2]
        if new:
            longest = max(len(self._lacks(slot, texts[slot])) - 1 for slot in new)
            width = min(longest, max(1, PREFILL_TOKENS // (new[-1] + 1 - new[0])))
            self._run({slot: self._lacks(slot, texts[slot])[:-1][:width] for slot in new})

    def _lacks(self, slot: int, text: list[int]) -> list[int]:
        return text[len(self.slots.tokens[slot]) :]

    def _run(self, wanted: dict[int, list[int]]) -> tuple[Logits, list[int], list[int]]:
        """Runs ids behind what their slots hold. Returns the logits, and the row and the column of the last id of each.

        Slots in between that want nothing run padding, which is written behind what they hold.
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
        """The token that each sequence would get if this were its model."""
        logits = logits.cpu() if logits.device.type == "mps" else logits  # which has no float64
        for row, (sequence, text) in enumerate(zip(sequences, texts)):
            if sequence.process is not None:
                logits[row] = sequence.process(logits[row], text[len(sequence.prompt) :], is_guess=True)
        return draw(sequences, logits, ahead).tolist()


def open_draft(
    draft: str | os.PathLike | None, target: Tokenizer, max_seq_len: int, max_batch_size: int
) -> Checkpoint | None:
    """The checkpoint of a draft, of which no weight has been read; None if it has none.

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
            Transformer(checkpoint.args)  # whose heads must be shared out too
    except ValueError as error:
        raise ValueError(f"draft {draft} cannot propose tokens to this model: {error}") from error
    return checkpoint


def make_proposer(
    draft: str | os.PathLike | None, checkpoint: Checkpoint | None, dtype: torch.dtype, device: torch.device
) -> Proposer | None:
    """What `Llama.build(draft=…)` asks for; `checkpoint` is what `open_draft` found."""
    if checkpoint is None:
        return None if draft is None else NgramLookup()
    return DraftModel(build_model(checkpoint, dtype, device)[0])


def check_tokenizer(draft: Tokenizer, target: Tokenizer) -> None:
    """Raises ValueError if a draft's tokens are not the model's, naming the first difference.

    Names of special tokens may differ (Llama 3.1 has given some reserved ones names), but not which ids are special.
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
