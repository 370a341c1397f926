"""Draws against the distribution written out by hand."""

import math

import pytest
import torch

from llama import sample_top_p
from llama.sampling import N_CANDIDATES, RandomStream, inverse_cdf, next_tokens, nucleus, token_logprobs

N_DRAWS = 100_000
# Chance of a right sampler failing: one in a million.
CRITICAL = 4.8916


def chi_square_is_plausible(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    """Pearson's test, by Wilson and Hilferty's normal approximation to the chi-square distribution."""
    assert counts[expected == 0].sum() == 0, "a token outside the distribution was drawn"
    counts, expected = counts[expected > 0].double(), expected[expected > 0].double()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    if freedom == 0:
        return True
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return z < CRITICAL


# name: (probabilities, p, what is left of them)
CASES = {
    "inside": ([0.4, 0.3, 0.2, 0.1], 0.6, [4 / 7, 3 / 7, 0, 0]),
    "boundary: the set holds exactly p": ([0.5, 0.25, 0.125, 0.125], 0.75, [2 / 3, 1 / 3, 0, 0]),
    "boundary at the first token": ([0.25, 0.5, 0.25], 0.5, [0, 1, 0]),
    "a tie at the edge goes by id": ([0.2, 0.2, 0.4, 0.2], 0.7, [0.25, 0.25, 0.5, 0]),
    "all tied": ([0.125] * 8, 0.5, [0.25] * 4 + [0] * 4),
    "p so small that one is left": ([0.1, 0.2, 0.7], 1e-9, [0, 0, 1]),
    "everything": ([0.1, 0.2, 0.7], 1.0, [0.1, 0.2, 0.7]),
    "zeros stay out": ([0.0, 0.5, 0.0, 0.5], 1.0, [0, 0.5, 0, 0.5]),
}


@pytest.mark.parametrize("case", CASES)
def test_sample_top_p_draws_the_nucleus_distribution(case):
    probs, p, expected = CASES[case]
    generator = torch.Generator().manual_seed(0)
    drawn = sample_top_p(torch.tensor(probs).expand(N_DRAWS, -1), p, generator)
    assert drawn.shape == (N_DRAWS, 1)
    counts = drawn.flatten().bincount(minlength=len(probs))
    assert chi_square_is_plausible(counts, torch.tensor(expected, dtype=torch.float64) * N_DRAWS)


@pytest.mark.parametrize("temperature", [0.6, 1.5])
@pytest.mark.parametrize("top_p", [0.9, 0.5, 1.0])
def test_next_tokens_draw_the_tempered_nucleus(temperature, top_p):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.5, -1.0, -3.0])
    probs = torch.softmax(logits.double() / temperature, 0)
    expected, mass = torch.zeros(6, dtype=torch.float64), 0.0
    for token in probs.argsort(descending=True, stable=True).tolist():  # the slow obvious way
        if mass >= top_p and top_p < 1:
            break
        expected[token], mass = probs[token], mass + probs[token].item()
    stream = RandomStream(seed=3, prompt=[1, 2])
    uniform = torch.tensor([stream.uniform(i) for i in range(N_DRAWS)], dtype=torch.float64)
    settings = torch.tensor([temperature, top_p], dtype=torch.float64)[:, None].expand(2, N_DRAWS)
    drawn = next_tokens(logits.expand(N_DRAWS, -1), *settings, uniform)
    assert chi_square_is_plausible(drawn.bincount(minlength=6), expected / expected.sum() * N_DRAWS)


def test_chi_square_notices_a_wrong_distribution():
    assert not chi_square_is_plausible(torch.tensor([51_000, 49_000]), torch.tensor([50_000, 50_000]))


@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0])  # the nucleus of the first is far wider than the candidates
@pytest.mark.parametrize("rounding", [torch.float32, torch.bfloat16])  # bfloat16 logits have many ties
def test_partial_selection_finds_the_nucleus_that_a_full_sort_finds(scale, rounding):
    logits = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(1)) * scale
    probs = torch.softmax(logits.to(rounding).float(), -1)
    p = torch.tensor([0.3, 0.9, 0.99, 0.7], dtype=torch.float64)
    weights, ids = nucleus(probs, p)
    for row in range(4):
        order = probs[row].argsort(descending=True, stable=True)
        mass_before = probs[row, order].double().cumsum(0) - probs[row, order].double()
        expected = order[mass_before < p[row]]
        assert ids[row][weights[row] > 0].tolist() == expected.tolist()
    if scale == 8.0:
        assert ids.shape[1] == N_CANDIDATES  # and did so without sorting everything


def test_temperature_zero_takes_the_most_likely_beside_rows_that_sample():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([[0.0, 5.0, 0.0], [0.9, 1.0, 0.1], [0.999, 0.999, 0.999]], dtype=torch.float64)
    drawn = next_tokens(logits, *columns)
    assert drawn[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    assert drawn[1] != logits[1].argmax()


def test_a_row_draws_the_same_token_in_any_batch():
    logits = torch.randn(16, 5000, generator=torch.Generator().manual_seed(0))
    columns = torch.rand(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = next_tokens(logits, *columns)
    alone = [next_tokens(logits[i : i + 1], *columns[:, i : i + 1]).item() for i in range(16)]
    assert together.tolist() == alone


def test_inverse_cdf_never_lands_on_weight_zero():
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    for uniform, expected in ((0.0, 1), (0.25 - 2**-48, 1), (0.25, 3), (1 - 2**-48, 3)):
        assert inverse_cdf(weights, torch.tensor([uniform], dtype=torch.float64)).item() == expected


def test_random_numbers_are_a_function_of_what_identifies_the_answer():
    base = RandomStream(1, [5, 6], 0, 0)
    assert base.uniform(7) == RandomStream(1, (5, 6)).uniform(7)
    others = [RandomStream(2, [5, 6]), RandomStream(1, [56]), RandomStream(1, [5, 6], 1), RandomStream(1, [5, 6], 0, 1)]
    assert len({stream.uniform(7) for stream in [base, *others]} | {base.uniform(8)}) == 6


def test_random_numbers_are_uniform_and_uncorrelated():
    stream = RandomStream(0, [1])
    numbers = torch.tensor([stream.uniform(i) for i in range(N_DRAWS)], dtype=torch.float64)
    counts = (numbers * 100).long().bincount(minlength=100)
    assert chi_square_is_plausible(counts, torch.full((100,), N_DRAWS / 100))
    correlation = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1].item()
    assert abs(correlation) < CRITICAL / math.sqrt(N_DRAWS)


def test_the_global_random_state_decides_sample_top_p_and_nothing_else():
    probs = torch.full((1, 1000), 0.001)
    torch.manual_seed(5)
    first = sample_top_p(probs, 0.9).item()
    state = torch.random.get_rng_state()
    next_tokens(probs.log(), *torch.tensor([[1.0], [0.9], [0.3]], dtype=torch.float64))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert sample_top_p(probs, 0.9).item() == first


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, float("nan")])
def test_p_out_of_range_is_refused(p):
    with pytest.raises(ValueError, match=r"top_p = .*: expected a number in \(0, 1\]"):
        sample_top_p(torch.tensor([[0.5, 0.5]]), p)


def test_logprobs_are_minus_the_cross_entropy():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([3, 0, 29, 7])
    expected = -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    torch.testing.assert_close(token_logprobs(logits, tokens), expected)
