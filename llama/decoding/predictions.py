"""Answers as `Llama` returns them: dicts with the text, and log-probabilities and the like if requested.

Knows nothing of the engine's steps.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from typing_extensions import Required, TypedDict

from llama.decoding.answering import Answer, Answerer, TopLogprobs
from llama.decoding.speculative import SpeculativeEngine
from llama.tokenizer import Dialog, Message
from llama.tokenizer.truncate import CutPrompt


class Details(TypedDict, total=False):
    """The keys of a prediction besides its text."""

    finish_reason: Required[str]  # "stop" or "length"
    score: float  # in a beam search
    tokens: list[str]  # with logprobs=True: the text of each token
    logprobs: list[float]  # with logprobs=True: the log-probability of each token, nats
    top_logprobs: TopLogprobs  # with top_logprobs=k
    truncated: int  # with truncate, if the prompt was cut: how many tokens are missing
    speculation: dict[str, int]  # with build(draft=...): see `Speculation`


class CompletionPrediction(Details, total=False):
    generation: Required[str]


class ChatPrediction(Details, total=False):
    generation: Required[Message]
    dialog: Dialog  # for a dialog with open turns: all messages, with the turns filled


def as_ids(
    prompts: list[list[int]], groups: list[list[Answer]], logprobs: bool, echo: bool, options: dict[str, Any]
) -> tuple:
    """Returns the answers to all prompts in order, as `Llama.generate` does."""
    answers = [(prompt, answer) for prompt, group in zip(prompts, groups) for answer in group]
    tokens = [prompt + answer.tokens if echo else answer.tokens for prompt, answer in answers]
    values = [a.prompt_token_logprobs + a.token_logprobs for _, a in answers] if logprobs else None
    if not wants_top(options):
        return tokens, values
    return tokens, values, [a.prompt_top_logprobs + a.top_logprobs for _, a in answers]


def completions(
    answerer: Answerer,
    prompts: list[list[int]],
    groups: list[list[Answer]],
    logprobs: bool,
    echo: bool,
    options: dict[str, Any],
) -> list[CompletionPrediction]:
    """Returns the answers to all prompts in order, as `Llama.text_completion` does."""
    found: list[CompletionPrediction] = []
    for prompt, group in zip(prompts, groups):
        for answer in group:
            found.append({"generation": answer.text, **details(answerer, prompt, answer, logprobs, echo, options)})
    return found


def chats(
    answerer: Answerer, prompts: list[list[int]], groups: list[list[Answer]], logprobs: bool, options: dict[str, Any]
) -> list[ChatPrediction]:
    """Returns the answers to all dialogs in order, as `Llama.chat_completion` does."""
    found: list[ChatPrediction] = []
    for prompt, group in zip(prompts, groups):
        for answer in group:
            message: Message = {"role": "assistant", "content": answer.text}
            found.append({"generation": message, **details(answerer, prompt, answer, logprobs, False, options)})
    return found


def details(
    answerer: Answerer, prompt: list[int], answer: Answer, logprobs: bool, echo: bool, options: dict[str, Any]
) -> dict:
    """Returns the keys of a prediction besides its text. The text of a token includes its leading space."""
    found: dict = {"finish_reason": answer.finish_reason}
    if answer.score is not None:
        found["score"] = answer.score
    if isinstance(prompt, CutPrompt):
        found["truncated"] = prompt.n_cut
    if isinstance(answerer.shared.engine, SpeculativeEngine):
        found["speculation"] = asdict(answer.speculation)
    top_logprobs = "top_logprobs" in options and wants_top(options)
    if logprobs or top_logprobs:
        found["tokens"] = [answerer.token_text(token) for token in (prompt if echo else []) + answer.tokens]
        found["logprobs"] = answer.prompt_token_logprobs + answer.token_logprobs
    if top_logprobs:
        found["top_logprobs"] = answer.prompt_top_logprobs + answer.top_logprobs
    return found


def wants_top(options: dict[str, Any]) -> bool:
    """Whether top_logprobs are requested for any of the prompts."""
    top = options.get("top_logprobs")
    return any(top) if isinstance(top, (list, tuple)) else bool(top)


def answers_of(
    generate: Callable[..., tuple],
    answerer: Answerer,
    prompts: list[list[int]],
    logprobs: bool,
    echo: bool,
    options: dict[str, Any],
) -> list[list[Answer]]:
    """Answers prompts with a `generate` that a caller put in place of `Llama`'s. Calls it as Meta's code does.

    Raises:
        ValueError: it does not return the same number of answers to each prompt.
    """
    found = generate(prompt_tokens=prompts, logprobs=logprobs, **({"echo": True} if echo else {}), **options)
    tokens, values, *top = found if isinstance(found, tuple) else (found, None)
    if not prompts or len(tokens) % len(prompts):
        raise ValueError(f"generate gave {len(tokens)} answers to {len(prompts)} prompts: expected as many to each")
    n, groups = len(tokens) // len(prompts), []
    for row, ids in enumerate(map(list, tokens)):
        prompt = prompts[row // n]
        ids = ids[len(prompt) :] if echo and ids[: len(prompt)] == prompt else ids
        text = answerer.tokenizer.decode(prompt + ids if echo else ids)
        answer = Answer(ids, text, "stop", token_logprobs=list(values[row]) if values else [])
        answer.top_logprobs = top[0][row] if top else []
        groups += [[answer]] if row % n == 0 else []
        if row % n:
            groups[-1].append(answer)
    return groups
