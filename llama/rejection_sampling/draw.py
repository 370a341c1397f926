"""Rejection sampling: n answers to a prompt, a score for each, the best kept; or drawing until one is good enough.

Training data is made so in Touvron et al. 2023 (Llama 2, arXiv 2307.09288, section 3.2) and Grattafiori et al. 2024
(Llama 3, arXiv 2407.21783, section 4.2). Knows nothing of how a score is computed, or of files.
"""

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from llama import parallel
from llama.datasets.prompts import prompt_ids
from llama.decoding.answering import Answer, Job
from llama.generation import Llama
from llama.options import MAX_SEQUENCES, DecodingOptions
from llama.rejection_sampling.scorers import Scorer, give_scores
from llama.tokenizer.open_turns import has_open_turns


@dataclass(frozen=True)
class Plan:
    """How many answers are drawn for a prompt, and how many of them are kept.

    Attributes:
        n: how many are drawn; with a threshold, how many at a time.
        keep: how many of the best are kept; all when None.
        threshold: if set, more are drawn until `keep` answers (one, when that is None) have at least this score,
        max_samples: or until this many have been drawn.

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
        """How many answers to draw next, after all those drawn so far."""
        if answers and (self.threshold is None or self.accepted(answers) >= (self.keep or 1)):
            return 0
        return min(self.n, self.most - len(answers))

    def result(self, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The kept answers in the order they were drawn, the text of the best one, and all scores.

        Of answers with the same score, the one drawn first is the better one. With a threshold, also how many reach it.
        """
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
    """The answers drawn for one prompt so far.

    Attributes:
        key: the owner's, to tell its drawings apart.
        row: what the scorer is given of the prompt.
        prompt, option, occurrence: as in `Job`.
        plan, scorer: how many are drawn, and what an answer is worth.
        answers: what has been drawn, with the scores.
    """

    key: Any
    row: Mapping[str, Any]
    prompt: list[int]
    option: DecodingOptions
    plan: Plan
    scorer: Scorer
    occurrence: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)

    def next_job(self) -> Job | None:
        """The next answers to draw; None when it is done. An answer is the same in whatever portions it is drawn."""
        if (n := self.plan.n_more(self.answers)) == 0:
            return None
        option = replace(self.option, num_return_sequences=n)
        return Job(self, self.prompt, option, self.occurrence, logprobs=True, first_sample=len(self.answers))

    def add(self, answers: Sequence[Answer], group: dist.ProcessGroup) -> None:
        """Takes the answers to its job and scores them. The ranks of the model, `group`, do it together."""
        drawn = []
        for answer in answers:
            drawn.append({"text": answer.text, "score": None, "logprob": math.fsum(answer.token_logprobs)})
            drawn[-1] |= {"n_tokens": len(answer.tokens), "finish_reason": answer.finish_reason}
            if answer.error is not None:
                drawn[-1]["error"] = answer.error
        give_scores(self.scorer, self.row, drawn, group)
        self.answers += drawn


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
        llama: the model.
        prompts: each a text, a dialog, or a row: a dictionary with a `prompt`, `messages` or `tokens`, and whatever
            else the scorer reads.
        scorer: called with (row, answers), returns a number for each answer, the larger the better; an answer is a
            dictionary with its `text`, `logprob` (nats), `n_tokens` and `finish_reason`. If it raises, or returns
            something other than finite numbers, the answer is marked with an `error`. `llama.rejection_sampling` has
            some scorers.
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
    for name in ("num_return_sequences", "num_beams"):
        if name in options:
            raise TypeError(f"{name} has no part in rejection sampling: n says how many answers are drawn")
    rows, ids = [as_row(prompt) for prompt in prompts], []
    for index, row in enumerate(rows):
        try:
            ids.append(prompt_to_sample(llama, row))
        except (ValueError, TypeError) as error:
            raise type(error)(f"prompt {index}: {error}") from None
    occurrences: Counter[tuple[int, ...]] = Counter()
    drawings = []
    for index, (row, prompt, option) in enumerate(zip(rows, ids, llama.answerer.check_options(ids, options))):
        check_option(option, plan)
        drawings.append(Drawing(index, row, prompt, option, plan, scorer, occurrences[tuple(prompt)]))
        occurrences[tuple(prompt)] += 1
    waiting = deque(drawings[parallel.replica() :: parallel.n_replicas()])
    results: dict[int, dict[str, Any]] = {}
    bar = tqdm(total=len(waiting), unit="prompt", disable=not progress)
    with parallel.fail_at_once(), bar, llama.open_jobs() as jobs:
        while waiting or jobs.n_open:
            while waiting and jobs.has_room:
                jobs.add(waiting.popleft().next_job())
            for done, answers in jobs.step():
                drawing = done.key
                drawing.add(answers, llama.group)
                if (job := drawing.next_job()) is not None:
                    jobs.add(job)
                else:
                    results[drawing.key] = plan.result(drawing.answers)
                    bar.update()
    results = {key: result for part in parallel.gather_from_replicas(results) for key, result in part.items()}
    return [results[index] for index in range(len(rows))]


def prompt_to_sample(llama: Llama, row: Mapping[str, Any]) -> list[int]:
    """The ids of a row's prompt. Raises ValueError or TypeError as `prompt_ids`, or if turns are open."""
    if has_open_turns(row.get("messages")):
        raise ValueError(
            "the dialog has open turns: expected none but the one at its end, which needs no <PLACEHOLDER>"
        )
    return prompt_ids(llama, row)


def check_option(option: DecodingOptions, plan: Plan) -> None:
    """Raises ValueError where all answers would be the same, or too many are drawn at a time."""
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
