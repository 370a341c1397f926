"""Beam search: the likeliest answers, found by keeping the `num_beams` best beginnings at every step.

A step scores each continuation of each beam by the log-probability of the whole answer. The best go on as beams; one
that ends, at a stop token or the budget, becomes a hypothesis, its score log-probability / length ** length_penalty.
This is Transformers' beam search, to the token. Where that differs from the literature:

- Its length counts the stop token and not the prompt; Wu et al. 2016 (arXiv 1609.08144) divide by
  ((5 + length) / 6) ** alpha instead, so that an alpha of theirs is not a length_penalty.
- In the textbook a finished answer takes up a beam. Here `num_beams` others run on: the best (1 + number of stop
  tokens) x num_beams continuations are looked at, but one that ends counts only if it is among the first num_beams.
- The textbook stops once no beam can overtake a hypothesis. Only `early_stopping="never"` does; False, the default,
  compares as if each beam ended now, and with a length_penalty above 0 may miss a longer and better answer.
- Penalties apply to log-probabilities, not to logits: numbers below 0, which no longer sum to 1 afterwards.

The engine runs the beams beside all other sequences, and gives each the keys of the one that it continues; which of
them go on is decided here. Knows tokens and not text. Draws no random numbers: every rank finds the same.
"""

import math
from dataclasses import dataclass, field

import torch

from llama.sequence import Sequence


@dataclass
class Hypothesis:
    """An answer without prompt and stop token, the log-probability of each of its tokens under the model (nats, before
    penalties changed any), its score, and why it ended: "stop" or "length"."""

    tokens: list[int]
    token_logprobs: list[float]
    score: float
    finish_reason: str


@dataclass(eq=False)
class Beam(Sequence):
    """A beginning of an answer, and its score so far: the log-probability after penalties."""

    total: float = 0.0


@dataclass(eq=False)
class BeamSearch:
    """The search for the answers to one prompt, and how far it is. Its options are the sequence's.

    Attributes:
        sequence: the prompt and the budget, which stands for the search until it ends.
        beams: those still running, best first.
        hypotheses: the answers found, best first; all that were asked for, or none if the sequence has failed: by NaN,
            by a logits_processor, or because all other continuations are ruled out.
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
        """Takes each beam one token further: see `llama.sequence.Search`."""
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
        """The best continuations: of which beam, the token, its log-probability under the model, the new total."""
        process, processed = self.sequence.process, logprobs
        if process is not None:
            processed = torch.stack([process(row, beam.tokens) for beam, row in zip(self.beams, logprobs)])
        totals = processed + logprobs.new_tensor([[getattr(beam, "total", 0.0)] for beam in self.beams])
        n_candidates = max(2, 1 + len(self.sequence.stop_tokens)) * self.n_slots
        totals, places = totals.flatten().topk(min(n_candidates, totals.numel()))
        token_logprobs, totals = logprobs.flatten()[places].tolist(), totals.tolist()
        if math.isnan(totals[0]):  # which topk takes for the greatest
            raise ValueError(f"the log-probabilities of the answer's token {len(self.beams[0].tokens) + 1} are NaN")
        places = [divmod(place, logprobs.shape[-1]) for place in places.tolist()]
        return [(*place, *rest) for place, *rest in zip(places, token_logprobs, totals) if rest[-1] > -math.inf]

    def _can_improve(self, length: int) -> bool:
        """Whether beams of `length` tokens may, by early_stopping's measure, still displace a hypothesis."""
        early_stopping = self.sequence.options.early_stopping
        if early_stopping is True:
            return False
        if early_stopping == "never" and self.length_penalty > 0:
            length = self.sequence.max_new_tokens
        return self.beams[0].total / length**self.length_penalty > self.hypotheses[-1].score

    def _end(self, error: ValueError | None = None) -> list[int]:
        """Ends the search with what it has found, or with an error if that is not enough."""
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
