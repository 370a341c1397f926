"""Answers to dialogs, turn by turn where turns are open: each answer is a rollout with turns of its own.

Rollout i is sample i in each of its turns, so it does not depend on how many others there are. Knows nothing of files.
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
    """One answer to a dialog, and how far it is."""

    dialog: OpenDialog
    turns: list[tuple[list[int], Answer]] = field(default_factory=list)  # the prompt and the answer of each filled turn
    error: str | None = None  # why it ended early: a turn failed, or there was no room for the next


class Rollouts:
    """All answers to a dialog, `num_return_sequences` of them.

    Args:
        dialog: whose turns may be open.
        option: how each turn is decoded.
        encode: the ids of a dialog's prompt; a ValueError of its ends a rollout.

    Raises ValueError for a beam search for several answers with open turns: it draws nothing, so all would be the same.
    """

    def __init__(self, dialog: OpenDialog, option: DecodingOptions, encode: Callable[[Dialog], list[int]]):
        n = option.num_return_sequences
        if dialog.has_placeholders and option.num_beams > 1 and n > 1:
            found = f"num_return_sequences = {n} with num_beams = {option.num_beams} where turns are open"
            raise ValueError(f"{found}: expected 1, for a beam search draws nothing: the rollouts would be the same")
        self.dialog, self.option, self.encode = dialog, option, encode
        self.rollouts = [Rollout(dialog.copy()) for _ in range(n)]
        self.n_open = n  # how many are not done

    def first(self, key: Any, **fields: Any) -> Job:
        """The job of the first open turn, for all rollouts together; `fields` are those of a `Job`."""
        return Job(key, self.encode(self.dialog.prompt), self.option, **fields)

    def go_on(self, job: Job, answers: list[Answer], first_sample: int = 0) -> list[Job]:
        """Takes the answers to a job; returns the jobs of the next turns. `first_sample` is that of the first job."""
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
    """The dialogs of a call. Raises ValueError or TypeError, naming the dialog by its index."""
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
    """The answers to dialogs some of whose turns are open: see `Llama.chat_completion`.

    `generate` is what somebody has put in place of `Llama.generate`, if so.
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
            options = {name: value for name, value in options.items() if name != "num_return_sequences"}  # later: 1
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
    """The prompt of a dialog, checked, and cut if the option says so; errors name it by its index."""
    if option.truncate is None:
        return answerer.check_prompt(index, named(f"dialog {index}", formatter.encode_dialog_prompt, dialog))
    return answerer.check_prompt(index, named(f"dialog {index}", dialog_ids, answerer, formatter, dialog, option))


def dialog_ids(answerer: Answerer, formatter: ChatFormat, dialog: Dialog, option: DecodingOptions) -> list[int]:
    """The ids of a dialog's prompt, cut if the option says so. Raises ValueError if the dialog is none."""
    ids = formatter.encode_dialog_prompt(dialog)
    if option.truncate is None or len(ids) <= (room := answerer.prompt_room(option)):
        return ids
    return cut_dialog(dialog, room, option.truncate, formatter)


def named(name: str, call: Callable[..., Any], *args: Any) -> Any:
    """call(*args), whose ValueError says which of a call's inputs it is about."""
    try:
        return call(*args)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
