"""Beam search: finds likely answers by keeping the `num_beams` best beginnings at every step.

A step scores each continuation of each beam by the log-probability of the whole answer. The best continue as beams. One
that ends, at a stop token or the budget, becomes a hypothesis, with score log-probability / length ** length_penalty.
This is Transformers' beam search and gives the same tokens. It differs from the literature:

- The length includes the stop token, but not the prompt. Wu et al. 2016 (arXiv 1609.08144) divide by
  ((5 + length) / 6) ** alpha instead, so their alpha is not a length_penalty.
- In the textbook a finished answer occupies a beam. Here `num_beams` other beams continue: a step considers the best
  (1 + number of stop tokens) x num_beams continuations, and one that ends counts only among the first num_beams.
- The textbook stops once no beam can beat a hypothesis. Only `early_stopping="never"` does that. False, the default,
  compares as if each beam ended now, so with a length_penalty above 0 it may miss a longer and better answer.
- Penalties change log-probabilities instead of logits: negative numbers, whose exponentials then no longer sum to 1.

This file decides which beams continue. The engine runs them in one batch with all other sequences, and copies the keys
of a beam to its children. Knows tokens but not text. Draws no random numbers, so every rank finds the same beams.
"""

import math
from dataclasses import dataclass, field

import torch

from llama.sequence import Sequence


@dataclass
class Hypothesis:
    """A finished answer."""

    tokens: list[int]  # without prompt and stop token
    token_logprobs: list[float]  # of each token under the model, before penalties, nats
    score: float
    finish_reason: str  # "stop" or "length"


@dataclass(eq=False)
class Beam(Sequence):
    """The beginning of an answer."""

    total: float = 0.0  # its log-probability after penalties, nats


@dataclass(eq=False)
class BeamSearch:
    """The state of the search for the answers to one prompt.

    Attributes:
        sequence: the prompt, the options and the budget. It ends when the search ends.
        beams: those still running, best first.
        hypotheses: the answers found, best first. After the search, as many as requested, or none if the sequence
            failed because of NaN, a logits_processor, or too few possible continuations.
    """

    sequence: Sequence
    beams: list[Sequence] = field(default_factory=list)
    hypotheses: list[Hypothesis] = field(default_factory=list)

    def __post_init__(self):
        options = self.sequence.options
        self.n_slots, self.length_penalty = options.num_beams, options.length_penalty
        self.beams = [self.sequence]
        if self.sequence.max_new_tokens == 0:
            self.hypotheses = [Hypothesis([], [], 0.0, "length") for _ in range(options.num_return_sequences)]

    def advance(self, logprobs: torch.Tensor) -> list[int]:
        """Chooses the next beams: see `llama.sequence.Search`."""
        try:
            candidates = self._candidates(logprobs)
        except ValueError as error:
            return self._end(error)
        sequence, stop_tokens = self.sequence, self.sequence.stop_tokens
        length = len(self.beams[0].tokens) + 1
        parents, beams = [], []
        for rank, (parent, token, logprob, total) in enumerate(candidates):
            tokens, token_logprobs = self.beams[parent].tokens, self.beams[parent].token_logprobs
            if token not in stop_tokens:
                tokens, token_logprobs = [*tokens, token], [*token_logprobs, logprob]
                if length < sequence.max_new_tokens:
                    if len(beams) < self.n_slots:
                        beam = Beam(
                            sequence.prompt, sequence.max_new_tokens, sequence.options, search=self, total=total
                        )
                        beam.tokens, beam.token_logprobs = tokens, token_logprobs
                        beams.append(beam)
                        parents.append(parent)
                    continue
            if rank < self.n_slots:
                reason = "stop" if token in stop_tokens else "length"
                self.hypotheses.append(Hypothesis(tokens, token_logprobs, total / length**self.length_penalty, reason))
        self.beams = beams
        self.hypotheses.sort(key=lambda hypothesis: hypothesis.score, reverse=True)
        del self.hypotheses[self.n_slots :]
        if not beams or (len(self.hypotheses) == self.n_slots and not self._can_improve(length)):
            return self._end()
        return parents

    def _candidates(self, logprobs: torch.Tensor) -> list[tuple[int, int, float, float]]:
        """The best continuations: index of the beam, token, its log-probability under the model, new total."""
        process, processed = self.sequence.process, logprobs
        if process is not None:
            processed = torch.stack([process(row, beam.tokens) for beam, row in zip(self.beams, logprobs)])
        totals = processed + logprobs.new_tensor([[getattr(beam, "total", 0.0)] for beam in self.beams])
        n_candidates = max(2, 1 + len(self.sequence.stop_tokens)) * self.n_slots
        totals, places = totals.flatten().topk(min(n_candidates, totals.numel()))
        token_logprobs, totals = logprobs.flatten()[places].tolist(), totals.tolist()
        if math.isnan(totals[0]):  # topk sorts NaN before all numbers
            raise ValueError(f"the log-probabilities of the answer's token {len(self.beams[0].tokens) + 1} are NaN")
        places = [divmod(place, logprobs.shape[-1]) for place in places.tolist()]
        return [(*place, *rest) for place, *rest in zip(places, token_logprobs, totals) if rest[-1] > -math.inf]

    def _can_improve(self, length: int) -> bool:
        """Whether, as early_stopping defines it, beams of `length` tokens may still replace a hypothesis."""
        early_stopping = self.sequence.options.early_stopping
        if early_stopping is True:
            return False
        if early_stopping == "never" and self.length_penalty > 0:
            length = self.sequence.max_new_tokens
        return self.beams[0].total / length**self.length_penalty > self.hypotheses[-1].score

    def _end(self, error: ValueError | None = None) -> list[int]:
        """Ends the search with the hypotheses found, or with an error if there are too few."""
        n_found, n_wanted = len(self.hypotheses), self.sequence.options.num_return_sequences
        if error is None and n_found < n_wanted:
            found = f"{n_found} answers, and all other continuations are ruled out (log-probability -inf)"
            error = ValueError(f"{found}: expected num_return_sequences = {n_wanted}")
        self.beams = []
        if error is None:
            self.sequence.finish_reason = self.hypotheses[0].finish_reason
        else:
            self.sequence.fail(error)
        del self.hypotheses[0 if error else n_wanted :]
        return []
