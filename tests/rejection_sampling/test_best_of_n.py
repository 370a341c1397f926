"""The best-of-n estimator against the mean over all sets, and the text of a summary."""

import itertools
import math
import random
import re
import statistics

import pytest

from llama.rejection_sampling.best_of_n import HISTOGRAM_BINS, Summary, best_of_n, curve, histogram, mean_and_error


def test_the_estimate_is_the_mean_of_the_maximum_over_all_sets_of_n():
    rng = random.Random(0)
    for scores in ([3.0], [rng.gauss(0, 1) for _ in range(9)], [1.0, 2.0, 2.0, 2.0, 5.0, 5.0], [0, 0, 1, 1, 0, 1, 0]):
        for n in range(1, len(scores) + 1):
            expected = statistics.fmean(max(chosen) for chosen in itertools.combinations(scores, n))
            assert best_of_n(scores, n) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_scores_of_0_and_1_give_pass_at_k():
    for right in (0, 1, 7, 50):
        scores = [1.0] * right + [0.0] * (50 - right)
        for k in (1, 4, 25, 50):
            assert best_of_n(scores, k) == pytest.approx(1 - math.comb(50 - right, k) / math.comb(50, k), abs=1e-12)


def test_a_hundred_thousand_scores_do_not_overflow():
    scores = [i / 100_000 for i in range(1, 100_001)]
    random.Random(0).shuffle(scores)
    for n in (1, 1000, 50_000, 100_000):  # the expected maximum of n out of 1 … N is n (N + 1) / (n + 1)
        assert best_of_n(scores, n) == pytest.approx(n * 1.00001 / (n + 1), rel=1e-9)


def test_it_is_unbiased():
    rng = random.Random(0)
    estimates = [best_of_n([rng.random() for _ in range(8)], 4) for _ in range(4000)]
    mean, error = mean_and_error(estimates)
    assert abs(mean - 4 / 5) < 2 * error  # the mean of the largest of 4 uniform numbers


@pytest.mark.parametrize("n", [0, 4])
def test_n_above_the_number_of_scores_is_refused(n):
    with pytest.raises(ValueError, match=f"best of {n} out of 3 scores"):
        best_of_n([1, 2, 3], n)


def test_the_curve_has_its_standard_errors_and_counts_the_prompts_that_have_n_scores():
    groups = [[0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0], [1, 1]]
    points = curve(groups)
    assert [(n, n_prompts) for n, _, _, n_prompts in points] == [(1, 3), (2, 3), (4, 2), (6, 2)]
    values = [1 / 2, 1 / 6, 1]
    assert points[0][1] == pytest.approx(statistics.fmean(values))
    assert points[0][2] == pytest.approx(statistics.stdev(values) / math.sqrt(3))
    assert math.isnan(curve([[1, 2]])[0][2]) and curve([]) == []


def test_every_score_is_in_one_bin():
    rng = random.Random(0)
    scores = [rng.gauss(0, 1) for _ in range(1000)]
    bins = histogram(scores)
    assert len(bins) == HISTOGRAM_BINS and sum(count for *_, count in bins) == 1000
    assert bins[0][0] == min(scores) and bins[-1][1] == pytest.approx(max(scores))
    for low, high, count in bins[:-1]:
        assert count == sum(low <= score < high for score in scores)
    assert histogram([0, 1, 1, 0, 1]) == [(0, 0, 2), (1, 1, 3)]


def test_a_summary_says_what_was_drawn_and_what_failed():
    summary = Summary(groups=[[0.0, 1.0, None], [0.0, 0.0, 0.0]], first_error="KeyError: 'sum'")
    text = summary.text()
    assert "2 prompts, 6 answers, 1 without a score (the first: KeyError: 'sum')" in text
    assert "mean 0.2000, mean of the best of each prompt 0.5000" in text
    assert re.search(r"\n +1 \| 0\.2500 ± 0\.2500\n", text) and "3 | 0.0000   (1 prompt)" in text
    assert Summary(groups=[[None]]).text() == "1 prompt, 1 answer, 1 without a score"


def test_kept_answers_have_no_curve(tmp_path):
    summary = Summary(groups=[[1.0, 0.5], [0.0, 0.25]], is_selection=True)
    assert summary.curve == [] and "best of n" not in summary.text()
    assert summary.text().endswith("no best-of-n curve: the file has the answers that were kept, not all")
    pytest.importorskip("matplotlib", reason="pip install matplotlib to plot")
    summary.plot(tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_answers_drawn_because_the_others_were_not_good_enough_do_not_bias_the_curve():
    """Drawn two at a time up to 32 until one is right: the prompts with many answers are the hard ones."""
    rng, groups = random.Random(0), []
    for _ in range(3000):
        group: list[float | None] = []
        while len(group) < 32 and 1.0 not in group:
            group += [float(rng.random() < 0.3) for _ in range(2)]
        groups.append(group)
    summary = Summary(threshold=1.0, n_first=2, groups=groups)
    assert "acceptance rate 0." in summary.text()
    (_, one, error, _), (_, two, error2, _) = summary.curve
    assert abs(one - 0.3) < 2 * error and abs(two - (1 - 0.7**2)) < 2 * error2


def test_the_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib to plot")
    Summary(groups=[[0.1, 0.5, 0.3], [0.2, None, 0.9]]).plot(tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
