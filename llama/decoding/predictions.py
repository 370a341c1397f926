"""Answers as `Llama` returns them: dicts with the text, and what else was asked for. Dialogs are answered turn by turn.

Knows nothing of the engine's steps.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypedDict

from llama.decoding.answering import Answer, Answerer, TopLogprobs
from llama.decoding.speculative import SpeculativeEngine
from llama.options import DecodingOptions
from llama.tokenizer import Dialog, Message
from llama.tokenizer.open_turns import OpenDialog


class Details(TypedDict, total=False):
    """What a prediction has besides its text, when asked for."""

    tokens: list[str]  # with logprobs=True: the text of each token,
    logprobs: list[float]  # and its natural-log probability
    top_logprobs: TopLogprobs  # with top_logprobs=k
    speculation: dict[str, int]  # with build(draft=...): see `Speculation`


class CompletionPrediction(Details, total=False):
    generation: str


class ChatPrediction(Details, total=False):
    generation: Message
    dialog: Dialog  # of a dialog with open turns: the whole of it, filled


def completions(
    answerer: Answerer,
    prompts: list[list[int]],
    groups: list[list[Answer]],
    logprobs: bool,
    echo: bool,
    options: dict[str, Any],
) -> list[CompletionPrediction]:
    """The answers to each prompt, one after the other."""
    pairs = [(prompt, answer) for prompt, group in zip(prompts, groups) for answer in group]
    return [{"generation": a.text, **details(answerer, p, a, logprobs, echo, options)} for p, a in pairs]


def details(
    answerer: Answerer, prompt: list[int], answer: Answer, logprobs: bool, echo: bool, options: dict[str, Any]
) -> dict:
    """The keys of a prediction that are there when asked for. The text of a token has its leading space."""
    found: dict = {}
    if isinstance(answerer.shared.engine, SpeculativeEngine):
        found["speculation"] = asdict(answer.speculation)
    if logprobs or wants_top(options):
        found["tokens"] = [answerer.token_text(token) for token in (prompt if echo else []) + answer.tokens]
        found["logprobs"] = answer.prompt_token_logprobs + answer.token_logprobs
    if wants_top(options):
        found["top_logprobs"] = answer.prompt_top_logprobs + answer.top_logprobs
    return found


def wants_top(options: dict[str, Any]) -> bool:
    """Whether top_logprobs are asked for, of any of the prompts."""
    top = options.get("top_logprobs")
    return any(top) if isinstance(top, (list, tuple)) else bool(top)


def answer_dialogs(
    dialogs: list[OpenDialog],
    settings: list[DecodingOptions],
    encode: Callable[[int, OpenDialog], list[int]],
    answer: Callable[..., list[list[Answer]]],
    logprobs: bool,
    progress: bool,
) -> list[tuple[list[int], list[Answer]]]:
    """Fills the open turns of dialogs, the first of each together, then the second, and so on.

    Args:
        dialogs: filled in place.
        settings: the options of each.
        encode: the prompt of the next open turn of a dialog, by its index.
        answer: the answers to prompts; called as `Answerer.answer` is.
        logprobs, progress: as there.

    Returns:
        For each dialog the prompt of its last turn, and the answers to it.

    Raises:
        ValueError: several answers to a dialog with open turns are asked for.
    """
    for index, (dialog, option) in enumerate(zip(dialogs, settings)):
        if dialog.has_placeholders and option.num_return_sequences > 1:
            n = option.num_return_sequences
            raise ValueError(f"dialog {index}: num_return_sequences = {n}: expected 1 where there are open turns")
    last: list[tuple[list[int], list[Answer]]] = [([], [])] * len(settings)
    while turn := [index for index, dialog in enumerate(dialogs) if not dialog.is_done]:
        prompts = [encode(index, dialogs[index]) for index in turn]
        groups = answer(prompts, [settings[index] for index in turn], logprobs, False, progress, True, turn)
        for index, prompt, group in zip(turn, prompts, groups):
            dialogs[index].fill(group[0].text)
            last[index] = prompt, group
    return last


def messages(
    answerer: Answerer,
    dialogs: list[OpenDialog],
    last: list[tuple[list[int], list[Answer]]],
    logprobs: bool,
    options: dict[str, Any],
) -> list[ChatPrediction]:
    """The answers to each dialog, one after the other; `last` as of `answer_dialogs`."""
    predictions: list[ChatPrediction] = []
    for dialog, (prompt, group) in zip(dialogs, last):
        whole = {"dialog": dialog.messages} if dialog.has_placeholders else {}
        for a in group:
            message: Message = {"role": "assistant", "content": a.text}
            rest = details(answerer, prompt, a, logprobs, False, options)
            predictions.append({"generation": message, **whole, **rest})
    return predictions


def answers_of(
    generate: Callable[..., tuple],
    answerer: Answerer,
    prompts: list[list[int]],
    logprobs: bool,
    echo: bool,
    options: dict[str, Any],
) -> list[list[Answer]]:
    """What a `generate` that somebody has put in place of `Llama`'s gives for prompts, called as Meta's code calls it.

    Raises:
        ValueError: it does not give as many answers to each prompt.
    """
    found = generate(prompt_tokens=prompts, logprobs=logprobs, **({"echo": True} if echo else {}), **options)
    tokens, values, *top = found if isinstance(found, tuple) else (found, None)
    if not prompts or len(tokens) % len(prompts):
        raise ValueError(f"generate gave {len(tokens)} answers to {len(prompts)} prompts: expected as many of each")
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
