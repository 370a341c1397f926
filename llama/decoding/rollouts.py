"""Answers dialogs and fills their open turns, one after the other. Knows nothing of files.

Each answer to a dialog is a rollout with its own text in each open turn. Rollout i draws sample i in each turn, so it
does not depend on the number of rollouts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from llama.decoding.answering import Answer, Answerer, Job
from llama.decoding.predictions import ChatPrediction, answers_of, details
from llama.options import DecodingOptions, as_list
from llama.tokenizer import ChatFormat, Dialog, Message
from llama.tokenizer.open_turns import OpenDialog
from llama.tokenizer.truncate import cut_dialog


@dataclass(eq=False)
class Rollout:
    """One answer to a dialog."""

    dialog: OpenDialog
    turns: list[tuple[list[int], Answer]] = field(default_factory=list)  # prompt and answer of each filled turn
    error: str | None = None  # why it ended early: a turn failed, or the next one does not fit


class Rollouts:
    """All answers to a dialog: `num_return_sequences` rollouts.

    Args:
        dialog: may have open turns.
        option: how each turn is decoded.
        encode: returns the ids of a dialog's prompt. If it raises ValueError, the rollout ends.

    Raises:
        ValueError: a beam search for several answers has open turns. All rollouts would be the same.
    """

    def __init__(self, dialog: OpenDialog, option: DecodingOptions, encode: Callable[[Dialog], list[int]]):
        n = option.num_return_sequences
        if dialog.has_placeholders and option.num_beams > 1 and n > 1:
            found = f"num_return_sequences = {n} with num_beams = {option.num_beams} where turns are open"
            raise ValueError(f"{found}: expected 1, because beam search draws no samples: all rollouts would be equal")
        self.dialog, self.option, self.encode = dialog, option, encode
        self.rollouts = [Rollout(dialog.copy()) for _ in range(n)]
        self.n_open = n  # how many rollouts are not done

    def first(self, key: Any, **fields: Any) -> Job:
        """Returns the job of the first open turn, for all rollouts. `fields` are fields of the `Job`."""
        return Job(key, self.encode(self.dialog.prompt), self.option, **fields)

    def go_on(self, job: Job, answers: list[Answer], first_sample: int = 0) -> list[Job]:
        """Takes the answers to a job and returns the jobs of the next turns. `first_sample`: that of the first job."""
        jobs = []
        for sample, answer in enumerate(answers, job.first_sample):
            rollout = self.rollouts[sample - first_sample]
            rollout.turns.append((job.prompt, answer))
            rollout.dialog.fill(answer.text)
            rollout.error = answer.error
            if rollout.error is None and not rollout.dialog.is_done:
                try:
                    prompt = self.encode(rollout.dialog.prompt)
                    option = replace(self.option, num_return_sequences=1)
                    jobs.append(replace(job, prompt=prompt, option=option, first_sample=sample))
                    continue
                except ValueError as error:
                    rollout.error = str(error)
            self.n_open -= 1
        return jobs


def open_dialogs(dialogs: Iterable[Dialog | str], formatter: ChatFormat) -> list[OpenDialog]:
    """Checks the dialogs of a call. Raises ValueError or TypeError with the index of the dialog."""
    if not isinstance(dialogs, (list, tuple)):
        single = "text" if isinstance(dialogs, str) else "dialog, itself a list of messages"
        dialogs = as_list("dialogs", dialogs, "dialogs or strings", single)
    return [named(f"dialog {index}", OpenDialog, dialog, formatter) for index, dialog in enumerate(dialogs)]


def fill_dialogs(
    answerer: Answerer,
    formatter: ChatFormat,
    opened: list[OpenDialog],
    options: dict[str, Any],
    logprobs: bool = False,
    progress: bool = False,
    generate: Callable[..., tuple] | None = None,
) -> list[ChatPrediction]:
    """Answers dialogs with open turns: see `Llama.chat_completion`.

    `generate`: what a caller put in place of `Llama.generate`, if anything.
    """
    settings = answerer.check_options(opened, options)
    groups, jobs = [], []
    for index, (dialog, option) in enumerate(zip(opened, settings)):
        encode = partial(encode_dialog, answerer, formatter, index, option=option)
        groups.append(named(f"dialog {index}", Rollouts, dialog, option, encode))
        jobs.append(groups[-1].first(index, logprobs=logprobs))
    while jobs:
        if generate is None:
            done = answerer.answer(jobs, progress)
        else:
            done = answers_of(generate, answerer, [job.prompt for job in jobs], logprobs, False, options)
            options = {name: value for name, value in options.items() if name != "num_return_sequences"}  # then 1
        jobs = [next_job for job, answers in zip(jobs, done) for next_job in groups[job.key].go_on(job, answers)]
        if errors := [rollout.error for group in groups for rollout in group.rollouts if rollout.error is not None]:
            raise ValueError(errors[0])
    predictions: list[ChatPrediction] = []
    for group in groups:
        for rollout in group.rollouts:
            prompt, answer = rollout.turns[-1]
            message: Message = {"role": "assistant", "content": answer.text}
            prediction: ChatPrediction = {"generation": message}
            if group.dialog.has_placeholders:
                prediction["dialog"] = rollout.dialog.messages
            prediction |= details(answerer, prompt, answer, logprobs, False, options)
            predictions.append(prediction)
    return predictions


def encode_dialog(
    answerer: Answerer, formatter: ChatFormat, index: int, dialog: Dialog, option: DecodingOptions
) -> list[int]:
    """Encodes, checks and, with `truncate`, cuts the prompt of a dialog. Errors give its index."""
    if option.truncate is None:
        return answerer.check_prompt(index, named(f"dialog {index}", formatter.encode_dialog_prompt, dialog))
    return answerer.check_prompt(index, named(f"dialog {index}", dialog_ids, answerer, formatter, dialog, option))


def dialog_ids(answerer: Answerer, formatter: ChatFormat, dialog: Dialog, option: DecodingOptions) -> list[int]:
    """Returns the ids of a dialog's prompt; with `truncate`, cut. Raises ValueError for an invalid dialog."""
    ids = formatter.encode_dialog_prompt(dialog)
    if option.truncate is None or len(ids) <= (room := answerer.prompt_room(option)):
        return ids
    return cut_dialog(dialog, room, option.truncate, formatter)


def named(name: str, call: Callable[..., Any], *args: Any) -> Any:
    """Returns call(*args). Puts `name` before the message of a ValueError."""
    try:
        return call(*args)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
