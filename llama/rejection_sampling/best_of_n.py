"""How much drawing n answers and keeping the best helps: the best-of-n curve, a histogram of the scores, a summary.

Knows nothing of models or answers: scores go in, text and a PNG come out.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from llama.datasets.rows import counted

HISTOGRAM_BINS = 16
BAR_WIDTH = 40


def best_of_n(scores: Sequence[float], n: int) -> float:
    """The expected best score of n answers: an unbiased estimate from the scores of N >= n answers.

    It is the mean of the best score over all sets of n of the N answers: the i-th smallest score is the best in
    C(i - 1, n - 1) of the C(N, n) sets. For scores of 0 and 1 it is pass@n of Chen et al. 2021 (arXiv 2107.03374).
    """
    if not 1 <= n <= len(scores):
        raise ValueError(f"best of {n} out of {len(scores)} scores: expected n from 1 to {len(scores)}")
    # Each weight is computed from the one before: the binomials overflow, and their logarithms lose digits.
    weight, terms = n / len(scores), []
    for i, score in zip(range(len(scores), n - 1, -1), sorted(scores, reverse=True)):
        terms.append(weight * score)
        weight *= (i - n) / max(i - 1, 1)
    return math.fsum(terms)


def curve(groups: Sequence[Sequence[float]]) -> list[tuple[int, float, float, int]]:
    """The best-of-n curve from the scores of many prompts, for n = 1, 2, 4, … and the largest.

    Each point is (n, mean over the prompts, its standard error, number of prompts with n scores).
    """
    largest = max(map(len, groups), default=0)
    points = []
    for n in sorted({2**k for k in range(largest.bit_length())} | {largest} - {0}):
        values = [best_of_n(scores, n) for scores in groups if len(scores) >= n]
        points.append((n, *mean_and_error(values), len(values)))
    return points


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values and its standard error, NaN for a single one."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def histogram(scores: Sequence[float]) -> list[tuple[float, float, int]]:
    """(from, to, number of scores) of HISTOGRAM_BINS equal bins, or of one bin for each value if there are few."""
    values = sorted(set(scores))
    if len(values) <= HISTOGRAM_BINS // 2:
        return [(value, value, sum(score == value for score in scores)) for value in values]
    low, width = values[0], (values[-1] - values[0]) / HISTOGRAM_BINS
    counts = [0] * HISTOGRAM_BINS
    for score in scores:
        counts[min(int((score - low) / width), HISTOGRAM_BINS - 1)] += 1
    return [(low + i * width, low + (i + 1) * width, count) for i, count in enumerate(counts)]


@dataclass
class Summary:
    """The scores of a run, prompt by prompt."""

    threshold: float | None = None  # the score that ended the drawing for a prompt
    n_first: int | None = None  # how many answers to a prompt were drawn before the first was scored; None: all
    groups: list[list[float | None]] = field(default_factory=list)  # each prompt's, in the order drawn; None: no score
    first_error: str | None = None  # why the first of these has no score
    n_failed: int = 0  # prompts without answers, such as broken lines
    is_selection: bool = False  # whether some prompts have only the best answers, which an earlier run has kept

    @property
    def scores(self) -> list[float]:
        return [score for group in self.groups for score in group if score is not None]

    @property
    def curve(self) -> list[tuple[int, float, float, int]]:
        """As the function `curve`; empty for a selection.

        If answers were drawn until one was good enough, only the first n count: the others would bias the curve.
        """
        if self.is_selection:
            return []
        scored = ([s for s in group[: self.n_first] if s is not None] for group in self.groups)
        return curve([scores for scores in scored if scores])

    def text(self) -> str:
        """The summary as lines for a terminal."""
        scores, n_answers = self.scores, sum(map(len, self.groups))
        first = "" if self.first_error is None else f" (the first: {self.first_error})"
        failed = f"; {counted(self.n_failed, 'line')} failed" if self.n_failed else ""
        n_missing = n_answers - len(scores)
        head = f"{counted(len(self.groups), 'prompt')}, {counted(n_answers, 'answer')}, {n_missing:,} without a score"
        head += first + failed
        if not scores:
            return head
        best = [max(scored) for group in self.groups if (scored := [s for s in group if s is not None])]
        lines = [head, f"score: mean {fmean(scores):.4f}, mean of the best of each prompt {fmean(best):.4f}"]
        if self.threshold is not None:
            n_accepted = sum(score >= self.threshold for score in scores)
            n_reached = sum(score >= self.threshold for score in best)
            n_prompts = counted(len(self.groups), "prompt")
            lines += [
                f"at least {self.threshold:g}: {n_accepted:,} of {counted(n_answers, 'answer')} drawn, acceptance rate "
                f"{n_accepted / n_answers:.4f}; {n_reached:,} of {n_prompts} reached it"
            ]
        bins = histogram(scores)
        most = max(count for *_, count in bins)
        lines += ["", f"{'score':>21}   answers"]
        for low, high, count in bins:
            where = f"{low:21.4g}" if low == high else f"{low:9.4g} to {high:8.4g}"
            lines.append(f"{where} | {'#' * math.ceil(BAR_WIDTH * count / most)} {count:,}")
        if self.is_selection:
            return "\n".join([*lines, "", "no best-of-n curve: the file has the answers that were kept, not all"])
        lines += ["", f"{'best of n':>21}   score ± standard error over the prompts"]
        for n, mean, error, n_prompts in self.curve:
            few = f"   ({counted(n_prompts, 'prompt')})" if n_prompts < len(self.groups) else ""
            lines.append(f"{n:21,} | {mean:.4f}{'' if math.isnan(error) else f' ± {error:.4f}'}{few}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Writes histogram and curve as a PNG. Raises ImportError without matplotlib."""
        figure = require_matplotlib()(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.hist(self.scores, bins=HISTOGRAM_BINS)
        left.set(xlabel="score", ylabel="answers")
        points = self.curve
        right.set_visible(bool(points))
        errors = [0.0 if math.isnan(error) else error for _, _, error, _ in points]
        right.errorbar([n for n, *_ in points], [mean for _, mean, *_ in points], errors, marker="o", capsize=3)
        right.set_xscale("log", base=2)
        right.set(xlabel="n", ylabel="expected best score of n answers")
        figure.savefig(path, format="png", dpi=120)


def require_matplotlib() -> type:
    """matplotlib's Figure, which needs no display and touches no global state."""
    try:
        from matplotlib.figure import Figure  # an optional extra
    except ImportError:
        raise ImportError("a plot needs matplotlib: pip install matplotlib (or `pip install '.[plot]'`)") from None
    return Figure
