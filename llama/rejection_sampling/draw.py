"""Rejection sampling: n answers to a prompt, a score for each, the best kept; or drawing until one is good enough.

As training data is made in Touvron et al. 2023 (Llama 2, arXiv 2307.09288, section 3.2) and Grattafiori et al. 2024
(Llama 3, arXiv 2407.21783, section 4.2). Knows nothing of how a score comes about, or of files.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from llama import parallel
from llama.datasets.prompts import prompt_ids
from llama.decoding.answering import Answer, Job
from llama.generation import Llama
from llama.options import MAX_SEQUENCES, DecodingOptions
from llama.rejection_sampling.scorers import Scorer, score_answers
from llama.tokenizer.open_turns import has_open_turns


@dataclass(frozen=True)
class Plan:
    """How many answers are drawn for a prompt, and which of them are kept.

    Attributes:
        n: how many; with a threshold, how many at a time.
        keep: the best so many are kept; all when None.
        threshold: draw until `keep` answers (one, when that is None) have at least this score,
        max_samples: or so many have been drawn.

    Raises:
        ValueError: one is out of range, or does not go with the others.
    """

    n: int = 16
    keep: int | None = None
    threshold: float | None = None
    max_samples: int | None = None

    def __post_init__(self):
        for name in ("n", "keep", "max_samples"):
            value = getattr(self, name)
            missing_is_fine = value is None and name != "n"
            if not missing_is_fine and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} = {value!r}: expected an integer of at least 1")
        if self.threshold is None and self.max_samples is not None:
            raise ValueError(f"max_samples = {self.max_samples} without a threshold: n alone says how many are drawn")
        if self.threshold is not None:
            if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
                raise ValueError(f"threshold = {self.threshold!r}: expected a number")
            if not math.isfinite(self.threshold):
                raise ValueError(f"threshold = {self.threshold}: expected a finite number")
            if self.max_samples is None:
                raise ValueError(
                    f"threshold = {self.threshold} without max_samples: expected the most answers to draw for a prompt"
                )
            if self.max_samples < self.n:
                raise ValueError(f"max_samples = {self.max_samples}: expected at least n = {self.n}, drawn at a time")
        if self.keep is not None and self.keep > self.most:
            raise ValueError(f"keep = {self.keep}: expected at most the {self.most} answers that are drawn")

    @property
    def most(self) -> int:
        """The most answers that may be drawn for a prompt."""
        return self.n if self.threshold is None else self.max_samples

    def accepted(self, answers: Sequence[Mapping[str, Any]]) -> int:
        """How many answers reach the threshold."""
        return sum(a["score"] is not None and a["score"] >= self.threshold for a in answers)

    def n_more(self, answers: Sequence[Mapping[str, Any]]) -> int:
        """How many answers to draw after these, all that have been so far."""
        if answers and (self.threshold is None or self.accepted(answers) >= (self.keep or 1)):
            return 0
        return min(self.n, self.most - len(answers))


@dataclass(eq=False)
class Task:
    """A prompt on its way.

    Attributes:
        key: whatever its owner knows it by.
        row: what the scorer is given of it.
        prompt, option, occurrence: as in `Job`.
        answers: what has been drawn, with their scores.
    """

    key: Any
    row: Mapping[str, Any]
    prompt: list[int]
    option: DecodingOptions
    occurrence: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)

    def job(self, n: int) -> Job:
        """The next n answers: the same ones, in whatever portions they are drawn."""
        option = replace(self.option, num_return_sequences=n)
        return Job(self, self.prompt, option, self.occurrence, logprobs=True, first_sample=len(self.answers))


def draw(llama: Llama, tasks: Iterable[Task | None], scorer: Scorer, plan: Plan) -> Iterator[Task]:
    """Draws and scores the answers to prompts beside each other, on this replica; yields each prompt as it is done.

    Args:
        llama, scorer, plan: who answers, what an answer is worth, how many are drawn.
        tasks: the prompts, taken one after the other as slots become free; None says that there is none yet.
    """
    again: deque[Job] = deque()
    n_open = 0

    def jobs() -> Iterator[Job | None]:
        nonlocal n_open
        source = iter(tasks)
        more = True
        while more or n_open:
            if again:
                yield again.popleft()
                continue
            task = next(source, source) if more else None
            if task is source:
                more = False
            elif task is None:
                yield None
            else:
                n_open += 1
                yield task.job(plan.n_more([]))

    group = llama.group
    for job, answers in llama.answer_jobs(jobs()):
        task = job.key
        records = [_record(answer) for answer in answers]
        give_scores(scorer, task.row, records, group)
        task.answers += records
        if n := plan.n_more(task.answers):
            again.append(task.job(n))
        else:
            n_open -= 1
            yield task


def _record(answer: Answer) -> dict[str, Any]:
    """What is kept of an answer; its score comes later."""
    record = {"text": answer.text, "score": None, "logprob": math.fsum(answer.token_logprobs)}
    record |= {"n_tokens": len(answer.tokens), "finish_reason": answer.finish_reason}
    return record if answer.error is None else record | {"error": answer.error}


def give_scores(scorer: Scorer, row: Mapping[str, Any], answers: Sequence[dict[str, Any]], group: Any = None) -> None:
    """Puts a `score` into each answer that is not marked with an `error` already; None and an `error` if it has none.

    Arguments as in `scorers.score_answers`.
    """
    sound = [answer for answer in answers if "error" not in answer]
    for answer, (score, error) in zip(sound, score_answers(scorer, row, sound, group)):
        answer["score"] = score
        if error is not None:
            answer["error"] = error


def result(answers: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """What is said of a prompt's answers: the kept ones in the order they were drawn, the best one's text, all scores.

    Of answers with the same score, the one drawn first is the better. With a threshold, also how many reach it.
    """
    scored = [index for index, answer in enumerate(answers) if answer["score"] is not None]
    best_first = sorted(scored, key=lambda index: -answers[index]["score"])
    kept = range(len(answers)) if plan.keep is None else sorted(best_first[: plan.keep])
    said = {
        "answers": [answers[index] for index in kept],
        "best": answers[best_first[0]]["text"] if best_first else None,
        "scores": [answer["score"] for answer in answers],
    }
    if plan.threshold is not None:
        said |= {"accepted": (accepted := plan.accepted(answers)), "acceptance_rate": accepted / len(answers)}
    return said


def rejection_sample(
    llama: Llama,
    prompts: Sequence[Any],
    scorer: Scorer,
    n: int = 16,
    keep: int | None = None,
    *,
    threshold: float | None = None,
    max_samples: int | None = None,
    progress: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Draws n answers to each prompt, scores them, and keeps the best. With replicas, each takes its share of prompts.

    The answers are those of `Llama.answer` with `num_return_sequences` and the same seed, in whatever portions they are
    drawn.

    Args:
        llama: who answers.
        prompts: each a text, a dialog, or a row: a dictionary with a `prompt`, `messages` or `tokens`, and whatever
            else the scorer wants to know.
        scorer: called with (row, answers), returns a number for each answer, the larger the better; an answer is a
            dictionary with its `text`, `logprob` (nats), `n_tokens` and `finish_reason`. One that raises, or returns
            what is no finite number, marks the answer with an `error`. `llama.rejection_sampling.scorers` has some.
        n, keep, threshold, max_samples: as in `Plan`.
        progress: whether to show a bar.
        options: as in `Llama.generate`, each a value or a list with one for each prompt.

    Returns:
        For each prompt {"answers": [{"text", "score", "logprob", "n_tokens", "finish_reason"}, …] in the order they
        were drawn, "best": the text of the best, "scores": of all that were drawn}, with a threshold also "accepted"
        (how many reach it) and "acceptance_rate".

    Raises:
        ValueError, TypeError: as `Llama.generate`; a number is out of range. Nothing has run then.
    """
    plan = Plan(n, keep, threshold, max_samples)
    rows = [as_row(prompt) for prompt in prompts]
    ids = []
    for index, row in enumerate(rows):
        try:
            ids.append(prompt_to_sample(llama, row))
        except (ValueError, TypeError) as error:
            raise type(error)(f"prompt {index}: {error}") from None
    for name in ("num_return_sequences", "num_beams"):
        if name in options:
            raise TypeError(f"{name} has no part in rejection sampling: n says how many answers are drawn")
    occurrences: Counter[tuple[int, ...]] = Counter()
    tasks = []
    for index, (row, prompt, option) in enumerate(zip(rows, ids, llama.check_options(ids, options))):
        check_option(option, plan)
        tasks.append(Task(index, row, prompt, option, occurrences[tuple(prompt)]))
        occurrences[tuple(prompt)] += 1
    mine = tasks[parallel.replica() :: parallel.n_replicas()]
    with parallel.fail_at_once(), tqdm(total=len(mine), unit="prompt", disable=not progress) as bar:
        done = []
        for task in draw(llama, mine, scorer, plan):
            done.append((task.key, result(task.answers, plan)))
            bar.update()
    everything = [pair for part in parallel.gather_from_replicas(done) for pair in part]
    return [said for _, said in sorted(everything, key=lambda pair: pair[0])]


def prompt_to_sample(llama: Llama, row: Mapping[str, Any]) -> list[int]:
    """The ids of a row's prompt. Raises ValueError or TypeError as `prompt_ids`, or if turns are open."""
    if has_open_turns(row.get("messages")):
        raise ValueError(
            "the dialog has open turns: expected none but the one at its end, which needs no <PLACEHOLDER>"
        )
    return prompt_ids(llama, row)


def check_option(option: DecodingOptions, plan: Plan) -> None:
    """Raises ValueError where all answers would be the same one, or too many drawn at a time."""
    if plan.n > MAX_SEQUENCES:
        raise ValueError(f"n = {plan.n}: expected at most {MAX_SEQUENCES:,}")
    if option.temperature == 0 and plan.most > 1:
        raise ValueError(
            f"temperature = 0 with n = {plan.most}: expected more than 0, or it is the same answer each time"
        )


def as_row(prompt: Any) -> dict[str, Any]:
    """A text, a dialog, or a row, as a row."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return dict(prompt) if isinstance(prompt, Mapping) else {"messages": prompt}
