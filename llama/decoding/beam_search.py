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
- Penalties (`process`) apply to log-probabilities, not to logits: numbers below 0, that then sum to 1 no longer.

Knows tokens and not text. Draws no random numbers: every model-parallel rank finds the same.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from llama.engine import PREFILL_TOKENS
from llama.kv_cache import KVCache
from llama.model import Transformer


@dataclass
class Hypothesis:
    """An answer without prompt and stop token, the log-probability of each of its tokens under the model (nats, before
    `process` changed any), its score, and why it ended: "stop" or "length"."""

    tokens: list[int]
    token_logprobs: list[float]
    score: float
    finish_reason: str


@dataclass
class Beam:
    """A beginning of an answer. `row` of the cache holds the keys of the prompt and of all but the last token."""

    row: int
    tokens: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    score: float = 0.0


@dataclass
class BeamSearch:
    """The search for the answers to one prompt, and how far it is.

    Attributes:
        prompt: the ids to continue, at least one.
        max_new_tokens: an answer's budget.
        num_beams: how many beginnings are kept. 1 is greedy decoding, unless early_stopping is "never".
        length_penalty: above 0 favours long answers, below 0 short ones.
        early_stopping: with num_beams hypotheses found, stop; False: only if the best beam, were it to end now, would
            not beat the worst of them; "never": only if it would not at its best possible length.
        num_return_sequences: how many hypotheses to keep in the end, at most num_beams.
        stop_tokens: ids that end an answer.
        process: (ids of prompt and answer so far, log-probabilities [vocab_size]) to the ones to search by.
        beams: those still running, best first.
        hypotheses: the answers found, best first.
        error: why none were found, from NaN, from `process` (a ValueError), or because all else was ruled out (-inf).
    """

    prompt: list[int]
    max_new_tokens: int
    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    stop_tokens: Collection[int] = ()
    process: Callable[[list[int], torch.Tensor], torch.Tensor] | None = None
    beams: list[Beam] = field(default_factory=list)
    hypotheses: list[Hypothesis] = field(default_factory=list)
    error: ValueError | None = None
    done: bool = False

    def advance(self, logprobs: torch.Tensor) -> None:
        """Takes each beam one token further, by the log-probabilities of that token, float32 [n_beams, vocab_size]."""
        try:
            candidates = self._candidates(logprobs)
        except ValueError as error:
            self.end(error)
            return
        length = len(self.beams[0].tokens) + 1
        self.beams = []
        for rank, (parent, token, logprob, score) in enumerate(candidates):
            tokens, token_logprobs = parent.tokens, parent.token_logprobs
            is_stop = token in self.stop_tokens
            if not is_stop:
                tokens, token_logprobs = [*tokens, token], [*token_logprobs, logprob]
            if not is_stop and length < self.max_new_tokens:
                self.beams.append(Beam(parent.row, tokens, token_logprobs, score))
            elif rank < self.num_beams:
                reason = "stop" if is_stop else "length"
                self.hypotheses.append(Hypothesis(tokens, token_logprobs, score / length**self.length_penalty, reason))
        del self.beams[self.num_beams :]
        self.hypotheses.sort(key=lambda hypothesis: hypothesis.score, reverse=True)
        del self.hypotheses[self.num_beams :]
        if not self.beams or (len(self.hypotheses) == self.num_beams and not self._can_improve(length)):
            self.end()

    def _candidates(self, logprobs: torch.Tensor) -> list[tuple[Beam, int, float, float]]:
        """The best continuations: of which beam, the token, its log-probability under the model, the whole's score."""
        processed = logprobs
        if self.process is not None:
            rows = zip(self.beams, logprobs.clone())
            processed = torch.stack([self.process(self.prompt + beam.tokens, row) for beam, row in rows])
        totals = processed + logprobs.new_tensor([[beam.score] for beam in self.beams])
        n_candidates = max(2, 1 + len(set(self.stop_tokens))) * self.num_beams
        scores, places = totals.flatten().topk(min(n_candidates, totals.numel()))
        token_logprobs, scores = logprobs.flatten()[places].tolist(), scores.tolist()
        if math.isnan(scores[0]):  # which topk takes for the greatest
            raise ValueError(f"the log-probabilities of the answer's token {len(self.beams[0].tokens) + 1} are NaN")
        places = [divmod(place, logprobs.shape[-1]) for place in places.tolist()]
        candidates = zip(places, token_logprobs, scores)
        return [(self.beams[i], token, *rest) for (i, token), *rest in candidates if rest[-1] > -math.inf]

    def _can_improve(self, length: int) -> bool:
        """Whether beams of `length` tokens may, by early_stopping's measure, still displace a hypothesis."""
        if self.early_stopping is True:
            return False
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_new_tokens
        return self.beams[0].score / length**self.length_penalty > self.hypotheses[-1].score

    def end(self, error: ValueError | None = None) -> None:
        """Ends the search with what it has found, or with an error if that is not enough."""
        n_found, n_wanted = len(self.hypotheses), self.num_return_sequences
        if error is None and n_found < n_wanted:
            found = f"{n_found} answers, and all other continuations are ruled out (log-probability -inf)"
            error = ValueError(f"{found}: expected num_return_sequences = {n_wanted}")
        self.beams, self.error, self.done = [], error, True
        del self.hypotheses[0 if error else n_wanted :]


def beam_search(
    model: Transformer, prompt: list[int], max_new_tokens: int, num_beams: int, *, first_slot: int = 0, **options
) -> list[Hypothesis]:
    """The best answers to one prompt, best first. `options` are further fields of `BeamSearch`; else as `run_beams`."""
    (search,) = run_beams(model, [BeamSearch(prompt, max_new_tokens, num_beams, **options)], first_slot)
    if search.error is not None:
        raise search.error
    return search.hypotheses


@torch.inference_mode()
def run_beams(model: Transformer, searches: Iterable[BeamSearch | None], first_slot: int = 0) -> Iterator[BeamSearch]:
    """Completes searches in place, as many at a time as their beams find rows, and yields each as it is done.

    Args:
        model: with a cache, of whose rows those from `first_slot` on are the searches' until the last is done.
        searches: any number, each with its own options, taken as rows become free. None among them says that there is
            none yet, which may be while one of those before is not done.

    Raises:
        ValueError: a search has more beams than there are rows, or no room for its budget. If `searches` is a list,
            nothing has run then.
    """
    source, n_rows = iter(searches), model.cache.max_batch_size - first_slot
    for search in searches if isinstance(searches, list) else ():
        _check(search, n_rows, model.cache.max_seq_len)
    more, waiting = True, None
    running: list[BeamSearch] = []  # their beams are in rows first_slot, first_slot + 1, …, in this order
    owners: dict[int, BeamSearch] = {}  # whose prompt is in a row
    while True:
        n_used = sum(search.num_beams for search in running)
        if more and waiting is None and n_used < n_rows:
            waiting = next(source, source)
            if waiting is source:
                more, waiting = False, None
            elif waiting is not None:
                _check(waiting, n_rows, model.cache.max_seq_len)
        if waiting is not None and n_used + waiting.num_beams <= n_rows:
            row = first_slot + sum(len(search.beams) for search in running)
            search, waiting = waiting, None
            running.append(search)
            if search.max_new_tokens == 0:
                search.hypotheses = [Hypothesis([], [], 0.0, "length") for _ in range(search.num_return_sequences)]
                search.end()
            else:
                owners[row] = search
                search.beams = [Beam(row)]
                search.advance(_prefill(model, search.prompt, row).log_softmax(-1))
        elif running:
            beams = [(search, beam) for search in running for beam in search.beams]
            logprobs = _decode(model, beams, first_slot).log_softmax(-1)
            for search, rows in zip(running, logprobs.split([len(search.beams) for search in running])):
                search.advance(rows)
        elif not more:
            return
        yield from [search for search in running if search.done]
        running = [search for search in running if not search.done]
        _move_beams(model.cache, running, owners, first_slot)


def _check(search: BeamSearch, n_rows: int, max_seq_len: int) -> None:
    length = len(search.prompt) + search.max_new_tokens
    if search.num_beams > n_rows:
        raise ValueError(f"num_beams = {search.num_beams}: expected at most the {n_rows} free rows of the cache")
    if length > max_seq_len:
        raise ValueError(f"prompt and budget are {length} tokens: expected at most {max_seq_len}")


def _prefill(model: Transformer, prompt: list[int], row: int) -> torch.Tensor:
    """Logits after the prompt, [1, vocab_size]."""
    tokens = torch.tensor([prompt], device=model.rotary.device)
    for start in range(0, len(prompt), PREFILL_TOKENS):
        hidden = model.hidden_states(tokens[:, start : start + PREFILL_TOKENS], start, slice(row, row + 1))
    return model.logits(hidden[:, -1])


def _decode(model: Transformer, beams: list[tuple[BeamSearch, Beam]], first_slot: int) -> torch.Tensor:
    """Logits after each beam, [n_beams, vocab_size]."""
    positions = [len(search.prompt) + len(beam.tokens) - 1 for search, beam in beams]
    tokens = torch.tensor([[beam.tokens[-1]] for _, beam in beams], device=model.rotary.device)
    start_pos = positions[0] if len(set(positions)) == 1 else torch.tensor(positions, device=tokens.device)
    hidden = model.hidden_states(tokens, start_pos, slice(first_slot, first_slot + len(beams)))
    return model.logits(hidden[:, -1])


def _move_beams(cache: KVCache, running: list[BeamSearch], owners: dict[int, BeamSearch], first_slot: int) -> None:
    """Gives each beam a row of its own, in order, with what its parent's row holds; the prompt may be there already."""
    sources, targets, start, stop = [], [], cache.max_seq_len, 0
    beams = [(search, beam) for search in running for beam in search.beams]
    for row, (search, beam) in enumerate(beams, first_slot):
        if beam.row != row:
            sources.append(beam.row)
            targets.append(row)
            start = min(start, len(search.prompt) if owners.get(row) is search else 0)
            stop = max(stop, len(search.prompt) + len(beam.tokens) - 1)
        owners[row], beam.row = search, row
    if start < stop:
        cache.move(sources, targets, start, stop)
