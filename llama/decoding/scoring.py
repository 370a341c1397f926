"""How likely a model finds texts: the log-probability of each token, perplexity, and where it was least certain.

Texts of any length: one longer than the context is read in windows that overlap by half, or by what `stride` leaves.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from llama.decoding.answering import GenerationError

if TYPE_CHECKING:
    from llama.generation import Llama


class Score(TypedDict, total=False):
    tokens: list[str]  # the text of each token
    ids: list[int]
    logprobs: list[float]  # of each token given those before it, nats; 0.0 for the first
    top_logprobs: list[list[tuple[int, float]]]  # with top_logprobs=k


def score(llama: "Llama", texts: Sequence, top_logprobs: int = 0, stride: int | None = None) -> list[Score]:
    """The log-probability of each token of texts, without generating.

    Args:
        llama: the model.
        texts: texts, which get a begin-of-text token before them, or lists of token ids, which are taken as they are.
        top_logprobs: how many of the most likely tokens to report at each position.
        stride: by how many tokens the windows over a text longer than max_seq_len advance; half of that when None.

    Raises:
        ValueError, TypeError: as in `Llama.generate`, naming the text by its index.
    """
    limit = llama.model.args.max_seq_len
    stride = max(1, limit // 2) if stride is None else stride
    if not isinstance(stride, int) or not 1 <= stride < max(limit, 2):
        raise ValueError(f"stride = {stride!r}: expected an integer from 1 to max_seq_len - 1 = {limit - 1}")
    if isinstance(texts, str):
        raise TypeError("texts is a str: expected a list of them, so pass [text]")
    ids = [llama.tokenizer.encode(text, bos=True) if isinstance(text, str) else text for text in texts]
    ids = [llama.check_prompt(index, prompt, any_length=True) for index, prompt in enumerate(ids)]
    if limit < 2 and any(len(tokens) > limit for tokens in ids):
        raise ValueError("a text of more than one token needs a context of at least 2: build with a larger max_seq_len")
    windows = [
        (index, start, stop) for index, tokens in enumerate(ids) for start, stop in _windows(len(tokens), limit, stride)
    ]
    prompts = [ids[index][max(0, stop - limit) : stop] for index, _, stop in windows]
    try:
        answers = llama.answer(prompts, True, True, max_gen_len=0, temperature=0, top_logprobs=top_logprobs)
    except GenerationError as error:
        bad = next(window[0] for window, (a,) in zip(windows, error.answers) if a.error)
        raise GenerationError(f"text {bad}: {str(error).partition(': ')[2]}", error.answers) from error
    scores: list[Score] = [{"tokens": [llama.token_text(i) for i in t], "ids": t, "logprobs": []} for t in ids]
    for (index, start, stop), (answer,) in zip(windows, answers):
        scores[index]["logprobs"] += answer.prompt_token_logprobs[start - stop :]
        if top_logprobs:
            scores[index].setdefault("top_logprobs", []).extend(answer.prompt_top_logprobs[start - stop :])
    return scores


def _windows(length: int, limit: int, stride: int) -> list[tuple[int, int]]:
    """[start, stop) of the tokens that each window adds; a window itself is the `limit` tokens before its stop."""
    stops = [*range(min(limit, length), length, stride), length]
    return list(zip([0, *stops], stops))


def perplexity(llama: "Llama", texts: Sequence, stride: int | None = None) -> list[float]:
    """exp of the mean negative log-probability of each text's tokens after its first; arguments as in `score`."""
    values = [s["logprobs"][1:] for s in score(llama, texts, stride=stride)]
    return [math.exp(-math.fsum(v) / len(v)) if v else math.nan for v in values]


def least_certain(score: Score, n: int = 5, context: int = 30) -> str:
    """A line for each of the n least likely tokens of a text: its log-probability, the text before it, and itself."""
    order = sorted(range(1, len(score["logprobs"])), key=lambda i: score["logprobs"][i])[:n]
    lines = []
    for i in order:
        before = "".join(score["tokens"][1:i])[-context:]
        lines.append(f"{score['logprobs'][i]:8.2f}  token {i:5}  {before!r} -> {score['tokens'][i]!r}")
    return "\n".join(lines)
