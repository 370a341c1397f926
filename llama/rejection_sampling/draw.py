"""Rejection sampling: draws n answers to a prompt, scores each, keeps the best; or draws until one is good enough.

Touvron et al. 2023 (Llama 2, arXiv 2307.09288, section 3.2) and Grattafiori et al. 2024 (Llama 3, arXiv 2407.21783,
section 4.2) make training data this way. Knows nothing of how a score is computed, or of files.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from llama import parallel
from llama.datasets.prompts import prompt_ids
from llama.decoding.answering import Answer, Job
from llama.decoding.rollouts import Rollout, Rollouts
from llama.generation import Llama
from llama.keywords import ANSWERS
from llama.options import MAX_SEQUENCES, DecodingOptions, as_list
from llama.rejection_sampling.scorers import Scorer, add_scores, named_scorer
from llama.tokenizer import Dialog
from llama.tokenizer.open_turns import OpenDialog, has_open_turns


@dataclass(frozen=True)
class Plan:
    """How many answers to draw for a prompt, and how many to keep. Raises ValueError if a number is out of range."""

    n: int = 16  # how many are drawn; with a threshold, how many at a time
    keep: int | None = None  # how many of the best are kept; all when None
    threshold: float | None = None  # if set, more are drawn until `keep` answers (or one) have at least this score
    max_samples: int | None = None  # with a threshold: the most that are drawn

    def __post_init__(self):
        for name in ("n", "keep", "max_samples"):
            value = getattr(self, name)
            if (value is not None or name == "n") and (type(value) is not int or value < 1):
                raise ValueError(f"{name} = {value!r}: expected an integer of at least 1")
        if (self.threshold is None) != (self.max_samples is None):
            has, lacks = ("threshold", "max_samples") if self.max_samples is None else ("max_samples", "a threshold")
            raise ValueError(f"{has} = {getattr(self, has)} without {lacks}: expected both or neither")
        if self.threshold is not None:
            is_number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
            if not is_number or not math.isfinite(self.threshold):
                raise ValueError(f"threshold = {self.threshold!r}: expected a finite number")
            if self.max_samples < self.n:
                raise ValueError(f"max_samples = {self.max_samples}: expected at least n = {self.n}, drawn at a time")
        if self.keep is not None and self.keep > self.most:
            raise ValueError(f"keep = {self.keep}: expected at most {self.most}, the number of answers drawn")

    @property
    def most(self) -> int:
        """The most answers that may be drawn for a prompt."""
        return self.n if self.threshold is None else self.max_samples

    def accepted(self, answers: Sequence[Mapping[str, Any]]) -> int:
        """How many answers reach the threshold."""
        return sum(a["score"] is not None and a["score"] >= self.threshold for a in answers)

    def n_more(self, answers: Sequence[Mapping[str, Any]]) -> int:
        """How many more answers to draw, after those drawn so far."""
        if answers and (self.threshold is None or self.accepted(answers) >= (self.keep or 1)):
            return 0
        return min(self.n, self.most - len(answers))

    def result(self, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What `rejection_sample` returns. Of answers with equal scores, the one drawn first is better."""
        scored = [index for index, answer in enumerate(answers) if answer["score"] is not None]
        best_first = sorted(scored, key=lambda index: -answers[index]["score"])
        kept = range(len(answers)) if self.keep is None else sorted(best_first[: self.keep])
        result = {
            "answers": [answers[index] for index in kept],
            "best": answers[best_first[0]]["text"] if best_first else None,
            "scores": [answer["score"] for answer in answers],
        }
        if self.threshold is not None:
            accepted = self.accepted(answers)
            result |= {"accepted": accepted, "acceptance_rate": accepted / len(answers)}
        return result


@dataclass(eq=False)
class Drawing:
    """The answers drawn for one prompt so far."""

    job: Job  # its options are for one answer; its prompt ends at the first open turn
    row: Mapping[str, Any]  # for the scorer
    plan: Plan
    scorer: Scorer
    encode: Callable[[Dialog], list[int]]  # a dialog to the ids of its prompt
    dialog: OpenDialog | None = None  # if turns are open
    answers: list[dict[str, Any]] = field(default_factory=list)  # drawn and scored
    rollouts: Rollouts | None = None  # of `dialog`, being drawn

    def __post_init__(self):
        check_option(self.job.option, self.plan)

    def next_jobs(self) -> list[Job]:
        """The next answers to draw; none when it is done. How many are drawn at a time changes no answer."""
        if (n := self.plan.n_more(self.answers)) == 0:
            return []
        option = replace(self.job.option, num_return_sequences=n)
        self.rollouts = self.dialog and Rollouts(self.dialog, option, self.encode)
        return [replace(self.job, key=self, option=option, logprobs=True, first_sample=len(self.answers))]

    def go_on(self, job: Job, answers: list[Answer]) -> list[Job] | None:
        """Takes the answers to a job, and scores those that are complete. Returns the next jobs, or None at the end."""
        if self.rollouts is None:
            drawn = [_drawn(answer) for answer in answers]
        else:
            jobs = self.rollouts.go_on(job, answers, len(self.answers))
            if self.rollouts.n_open:
                return jobs
            drawn = [_drawn_rollout(rollout) for rollout in self.rollouts.rollouts]
        add_scores(self.scorer, self.row, drawn)
        self.answers += drawn
        return self.next_jobs() or None


def _drawn(answer: Answer) -> dict[str, Any]:
    drawn = {"text": answer.text, "score": None, "logprob": math.fsum(answer.token_logprobs)}
    drawn |= {"n_tokens": len(answer.tokens), "finish_reason": answer.finish_reason}
    return drawn if answer.error is None else drawn | {"error": answer.error}


def _drawn_rollout(rollout: Rollout) -> dict[str, Any]:
    """The last answer of a rollout, with the whole dialog."""
    drawn = _drawn(rollout.turns[-1][1]) | {"messages": rollout.dialog.messages}
    return drawn if rollout.error is None else drawn | {"finish_reason": "error", "error": rollout.error}


def rejection_sample(
    llama: Llama,
    prompts: Sequence[Any],
    scorer: Scorer | str,
    n: int = 16,
    keep: int | None = None,
    *,
    threshold: float | None = None,
    max_samples: int | None = None,
    progress: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Draws n answers to each prompt, scores them, and keeps the best. With replicas, each takes its share of prompts.

    The answers are those of `Llama.answer` with `num_return_sequences` and the same seed, however many are drawn at a
    time.

    Args:
        prompts: each is a text, a dialog, or a row: a dictionary with a `prompt`, `messages` or `tokens`, and any other
            fields for the scorer. With open turns, each answer is a rollout, scored as the end of its `messages`.
        scorer: a function of (row, answers) that returns a number for each answer, the larger the better. An answer is
            a dictionary with its `text`, `logprob` (nats), `n_tokens` and `finish_reason`. If the function raises, or
            returns anything but finite numbers, the answer gets an `error`. Or a name, as in `llama sample`: "logprob",
            "mean_logprob", "judge", "reward:DIR", "judge:DIR", "module:function".
        n, keep, threshold, max_samples: as in `Plan`.
        options: as in `Llama.generate`, each a value or a list with one for each prompt.

    Returns:
        For each prompt {"answers": [{"text", "score", "logprob", "n_tokens", "finish_reason"}, …] in the order drawn,
        "best": the text of the best, "scores": of all answers drawn}; with a threshold also "accepted" (how many reach
        it) and "acceptance_rate".

    Raises:
        ValueError, TypeError: as `Llama.generate`; a number is out of range. Nothing has run then.
    """
    plan = Plan(n, keep, threshold, max_samples)
    prompts = as_list("prompts", prompts, "texts, dialogs or rows", "prompt")
    scorer = named_scorer(scorer, llama)
    for name in ("num_return_sequences", "num_beams", *ANSWERS):
        if name in options:
            raise TypeError(f"{name} has no part in rejection sampling: n says how many answers are drawn")
    occurrences: Counter[tuple[int, ...]] = Counter()
    drawings = []
    for index, (prompt, option) in enumerate(zip(prompts, llama.answerer.check_options(prompts, options))):
        kind = "prompt" if isinstance(prompt, str) else "messages"
        row = dict(prompt) if isinstance(prompt, Mapping) else {kind: prompt}
        try:
            ids = prompt_to_sample(llama, row, option)
        except (ValueError, TypeError) as error:
            raise type(error)(f"prompt {index}: {error}") from None
        job = Job(index, ids, option, occurrences[tuple(ids)])
        drawings.append(drawing_of(llama, job, row, plan, scorer))
        occurrences[tuple(ids)] += 1
    waiting = deque(drawings[parallel.replica() :: parallel.n_replicas()])
    results: dict[int, dict[str, Any]] = {}
    bar = tqdm(total=len(waiting), unit="prompt", disable=not progress)
    with parallel.fail_at_once(), bar, llama.open_jobs() as jobs:
        while waiting or jobs.n_open:
            while waiting and jobs.has_room:
                jobs.add(*waiting.popleft().next_jobs())
            for done in jobs.step():
                drawing = done.key
                if (more := drawing.go_on(done, jobs.answers(done))) is None:
                    results[drawing.job.key] = plan.result(drawing.answers)
                    bar.update()
                for job in more or ():
                    jobs.add(job)
    results = {key: result for part in parallel.gather_from_replicas(results) for key, result in part.items()}
    return [results[index] for index in range(len(prompts))]


def prompt_to_sample(llama: Llama, row: Mapping[str, Any], option: DecodingOptions) -> list[int]:
    """The ids of a row's prompt, up to its first open turn. Raises ValueError or TypeError as `prompt_ids`."""
    if has_open_turns(row.get("messages")):
        row = {**row, "messages": OpenDialog(row["messages"], llama.formatter).prompt}
    return prompt_ids(llama, row, option)


def drawing_of(llama: Llama, job: Job, row: Mapping[str, Any], plan: Plan, scorer: Scorer) -> Drawing:
    """The drawing for a row, whose turns may be open. Raises ValueError as `OpenDialog` and `check_option`."""
    is_open = has_open_turns(row.get("messages"))
    dialog = OpenDialog(row["messages"], llama.formatter) if is_open else None
    return Drawing(job, row, plan, scorer, lambda dialog: prompt_ids(llama, {"messages": dialog}, job.option), dialog)


def check_option(option: DecodingOptions, plan: Plan) -> None:
    """Raises ValueError if all answers would be the same, or too many are drawn at a time."""
    if plan.n > MAX_SEQUENCES:
        raise ValueError(f"n = {plan.n}: expected at most {MAX_SEQUENCES:,}")
    if option.temperature == 0 and plan.most > 1:
        found = f"temperature = 0 with n = {plan.most}"
        raise ValueError(f"{found}: expected more than 0, because all answers would be the same")
