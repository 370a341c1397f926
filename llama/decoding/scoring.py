"""Scores given tokens: computes their log-probabilities, for perplexity, judges and multiple-choice questions.

Each text is scored from some token on. What comes before that token is its context, which runs once for all texts that
share it. A text longer than the model's context is read in overlapping windows, which advance by `stride` tokens. Knows
nothing of dialogs or files.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TypedDict

from llama import parallel
from llama.decoding.answering import Answerer, GenerationError, TopLogprobs
from llama.decoding.shared_engine import Call
from llama.options import DecodingOptions, as_list
from llama.sequence import Sequence


class Score(TypedDict, total=False):
    tokens: list[str]  # the text of each token
    ids: list[int]
    logprobs: list[float]  # of each token given the tokens before it, nats; 0.0 for the first
    top_logprobs: TopLogprobs  # with top_logprobs=k


@dataclass
class TokenScores:
    """The scores of some tokens of a text.

    Attributes:
        logprobs: of each token given the tokens before it, nats.
        is_greedy: whether greedy decoding would choose all of the tokens.
        top_logprobs: the most likely (id, log-probability) at each position.
        error: why scoring failed.
    """

    logprobs: list[float]
    is_greedy: bool
    top_logprobs: TopLogprobs = field(default_factory=list)
    error: str | None = None


def score_tokens(
    answerer: Answerer, texts: SequenceOf[tuple[list[int], int]], top_logprobs: int = 0, shared: bool = True
) -> list[TokenScores]:
    """Scores the tokens of each text from some token on.

    Args:
        answerer: has the model.
        texts: (ids, start): scores ids[start:]. At most max_seq_len + 1 ids, because the model need not run the last.
        top_logprobs: how many of the most likely tokens to report at each position.
        shared: whether the replicas share the texts. If not, this replica scores all of them.

    Raises:
        ValueError, TypeError: a text has nothing to score, is too long, or has ids out of range. Nothing has run then.
    """
    limit = answerer.args.max_seq_len + 1
    for index, (ids, start) in enumerate(texts):
        if not 0 <= start < len(ids) <= limit:
            found = f"a context of {start} tokens and a continuation of {len(ids) - start}"
            raise ValueError(f"text {index} has {found}: expected a continuation, and {limit} together at most")
        answerer.check_prompt(f"text {index}", ids, any_length=True)
    option = DecodingOptions(max_gen_len=0, temperature=0, top_logprobs=top_logprobs)
    engine = answerer.shared.engine
    waiting = _ordered([tuple(ids[:start]) for ids, start in texts], len(engine.slots), shared)[::-1]
    results: dict[int, TokenScores] = {}
    owners: dict[Sequence, int] = {}
    with parallel.fail_at_once(), Call(answerer.shared) as call:
        while waiting or call.n_open:
            while waiting and call.has_room:
                ids, start = texts[index := waiting.pop()]
                owners[sequence := Sequence(ids, 0, option, score_from=start)] = index
                call.add(sequence)
            for s in call.step():
                scores = TokenScores(s.prompt_token_logprobs, s.prompt_is_greedy, s.prompt_top_logprobs, s.error)
                results[owners.pop(s)] = scores
    if shared:
        results = {key: found for part in parallel.gather_from_replicas(results) for key, found in part.items()}
    return [results[index] for index in range(len(texts))]


def _ordered(contexts: list[tuple[int, ...]], n_slots: int, shared: bool) -> list[int]:
    """Orders texts so that a shared context is still in its slot when the next text with it runs.

    Takes as many contexts at a time as there are slots: the first text of each, then the second of each, and so on. The
    longest contexts come first, so that texts of similar length run together and a lack of memory shows early.
    """
    by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, context in enumerate(contexts):
        by_context[context].append(index)
    queues = [by_context[context] for context in sorted(by_context, key=lambda context: (-len(context), context))]
    if shared:
        queues = queues[parallel.replica() :: parallel.n_replicas()]
    order = []
    for i in range(0, len(queues), n_slots):
        for turn in itertools.zip_longest(*queues[i : i + n_slots]):
            order += [index for index in turn if index is not None]
    return order


def score_texts(
    answerer: Answerer, texts: SequenceOf[str | list[int]], top_logprobs: int = 0, stride: int | None = None
) -> list[Score]:
    """Scores each token of texts of any length: see `Llama.score`.

    Raises:
        ValueError, TypeError: a text is invalid (the message gives its index), or `stride` is out of range.
        GenerationError: the model's logits are unusable; the message gives the index of the text.
    """
    texts = as_list("texts", texts, "texts", "text")
    texts = [answerer.tokenizer.encode(text, bos=True) if isinstance(text, str) else text for text in texts]
    texts = [answerer.check_prompt(f"text {index}", text, any_length=True) for index, text in enumerate(texts)]
    limit = answerer.args.max_seq_len
    stride = max(1, limit // 2) if stride is None else stride
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride < max(limit, 2):
        raise ValueError(f"stride = {stride!r}: expected an integer from 1 to max_seq_len - 1 = {limit - 1}")
    if limit < 2 and any(len(ids) > limit for ids in texts):
        raise ValueError("a text of more than one token needs a context of at least 2: build with a larger max_seq_len")
    windows = []  # (index of the text, ids of the window, position of the first id to score)
    for index, ids in enumerate(texts):
        stops = [*range(min(limit, len(ids)), len(ids), stride), len(ids)]
        for start, stop in zip([0, *stops], stops):
            first = max(0, stop - limit)
            windows.append((index, ids[first:stop], start - first))
    results = score_tokens(answerer, [window[1:] for window in windows], top_logprobs)
    scores: list[Score] = [
        {"tokens": [answerer.token_text(i) for i in ids], "ids": ids, "logprobs": []} for ids in texts
    ]
    for (index, *_), found in zip(windows, results):
        if found.error is not None:
            raise GenerationError(f"text {index}: {found.error}", [])
        scores[index]["logprobs"] += found.logprobs
        if top_logprobs:
            scores[index].setdefault("top_logprobs", []).extend(found.top_logprobs)
    return scores


def perplexities(answerer: Answerer, texts: SequenceOf[str | list[int]], stride: int | None = None) -> list[float]:
    """Returns the perplexity of each text: see `Llama.perplexity`."""
    texts = as_list("texts", texts, "texts", "text")
    for index, text in enumerate(texts):
        if not hasattr(text, "__len__"):
            raise TypeError(f"text {index} is a {type(text).__name__}: expected a text, or a list of token ids")
        if len(text) == 0 or (not isinstance(text, str) and len(text) == 1):
            found = "is empty" if len(text) == 0 else "has one token"
            raise ValueError(f"text {index} {found}: a perplexity needs a token after the first")
    return [perplexity(score) for score in score_texts(answerer, texts, stride=stride)]


def perplexity(score: Score) -> float:
    """exp of the mean negative log-probability of a text's tokens after the first; NaN if there are none."""
    logprobs = score["logprobs"][1:]
    return math.exp(-math.fsum(logprobs) / len(logprobs)) if logprobs else math.nan


def least_certain(score: Score, n: int = 5, context: int = 30) -> str:
    """Returns a line for each of the n least likely tokens: log-probability, position, text before it, the token."""
    order = sorted(range(1, len(score["logprobs"])), key=lambda i: score["logprobs"][i])[:n]
    lines = []
    for i in order:
        before = "".join(score["tokens"][1:i])[-context:]
        lines.append(f"{score['logprobs'][i]:8.2f}  token {i:5}  {before!r} -> {score['tokens'][i]!r}")
    return "\n".join(lines)
