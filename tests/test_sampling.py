"""Draws against the distribution written out by hand."""

import math

import pytest
import torch

from llama import sample_top_p
from llama.sampling import (
    N_CANDIDATES,
    RandomStream,
    filtered,
    next_tokens,
    race,
    token_logprobs,
    uniforms,
)

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


def written_out(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The distribution computed the slow, simple way: temperature, top_k, top_p of what is left, min_p."""
    probs = torch.softmax(logits.double() / temperature, 0)
    if top_k:
        kth = probs.sort(descending=True).values[min(top_k, len(probs)) - 1]
        probs = torch.where(probs >= kth, probs, 0)
        probs = probs / probs.sum()
    if top_p < 1:
        kept, mass = torch.zeros_like(probs), 0.0
        for token in probs.argsort(descending=True, stable=True).tolist():
            if mass >= top_p:
                break
            kept[token], mass = probs[token], mass + probs[token].item()
        probs = kept / kept.sum()
    probs = torch.where(probs >= min_p * probs.max(), probs, 0)
    return probs / probs.sum()


FILTERS = [  # top_k, top_p, min_p
    (0, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.5, 0.0),
    (3, 1.0, 0.0),  # 0.5 and 0.5 tie for the third place
    (1, 1.0, 0.0),
    (0, 1.0, 0.2),
    (5, 0.8, 0.0),
    (5, 1.0, 0.15),
    (0, 0.95, 0.15),
    (4, 0.7, 0.3),
]


@pytest.mark.parametrize("temperature", [0.6, 1.5])
@pytest.mark.parametrize("filters", FILTERS)
def test_next_tokens_draw_the_written_out_distribution(temperature, filters):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.5, -1.0, -3.0, 0.0])
    stream = RandomStream(seed=3, prompt=[1, 2])
    seeds = torch.tensor([stream.seed(i) for i in range(N_DRAWS)])
    settings = torch.tensor([temperature, *filters], dtype=torch.float64)[:, None].expand(4, N_DRAWS)
    drawn = next_tokens(logits.expand(N_DRAWS, -1), seeds, *settings)
    expected = written_out(logits, temperature, *filters)
    assert chi_square_is_plausible(drawn.bincount(minlength=7), expected * N_DRAWS)


def test_chi_square_notices_a_wrong_distribution():
    assert not chi_square_is_plausible(torch.tensor([51_000, 49_000]), torch.tensor([50_000, 50_000]))


@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0])  # what is left of the first is far more than the candidates
@pytest.mark.parametrize("rounding", [torch.float32, torch.bfloat16])  # bfloat16 logits have many ties
def test_partial_selection_keeps_what_a_full_sort_keeps(scale, rounding):
    logits = torch.randn(len(FILTERS), 20_000, generator=torch.Generator().manual_seed(1)) * scale
    logits = logits.to(rounding).float()
    settings = [(0, 0.3, 0.0), (0, 0.9, 0.0), (50, 1.0, 0.0), (2000, 0.9, 0.0), (0, 1.0, 0.01), (5000, 0.99, 0.001)]
    settings += [(0, 0.99, 0.0), (40, 0.7, 0.05), (1, 1.0, 0.0), (0, 0.7, 0.0)]
    weights, ids = filtered(torch.softmax(logits, -1), *torch.tensor(settings, dtype=torch.float64).T)
    for row, (k, p, min_p) in enumerate(settings):
        expected = written_out(logits[row], 1.0, int(k), p, min_p)
        kept = ids[row][weights[row] > 0]
        assert sorted(kept.tolist()) == expected.nonzero().flatten().tolist()
        assert weights[row].diff().le(0).all()  # most likely first
    if scale == 8.0:
        narrow = torch.tensor([[0.0], [0.5], [0.0]], dtype=torch.float64)
        assert filtered(torch.softmax(logits, -1), *narrow)[1].shape[1] == N_CANDIDATES  # and sorted no more than that


def test_temperature_zero_takes_the_most_likely_beside_rows_that_sample():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([[0.0, 1e9, 0.0], [0, 0, 5], [0.9, 1.0, 0.1], [0, 0, 0]], dtype=torch.float64)
    draws = [next_tokens(logits, torch.full((3,), seed), *columns) for seed in range(20)]
    assert {(d[0].item(), d[2].item()) for d in draws} == {tuple(logits.argmax(-1)[[0, 2]].tolist())}
    assert len({d[1].item() for d in draws}) > 10


def test_a_row_draws_the_same_token_in_any_batch():
    logits = torch.randn(16, 5000, generator=torch.Generator().manual_seed(0))
    columns = torch.rand(4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    columns[1] = (columns[1] * 100).round()
    seeds = torch.arange(16)
    together = next_tokens(logits, seeds, *columns)
    alone = [next_tokens(logits[i : i + 1], seeds[i : i + 1], *columns[:, i : i + 1]).item() for i in range(16)]
    assert together.tolist() == alone


def test_rounding_of_the_logits_hardly_ever_changes_a_draw():
    # What another shape of batch does to logits. By inverting the running sum some 1 in 300 of these would change.
    logits = torch.randn(20_000, 500, generator=torch.Generator().manual_seed(0))
    noise = 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    columns = torch.tensor([1.0, 0, 0.95, 0], dtype=torch.float64)[:, None].expand(4, len(logits))
    draws = [next_tokens(logits + error, torch.arange(len(logits)), *columns) for error in (0, noise)]
    assert (draws[0] != draws[1]).sum() <= 2


def test_the_race_never_ends_at_weight_zero():
    weights = torch.tensor([[0.0, 1e-300, 0.0]], dtype=torch.float64)
    for uniform in (2**-54, 0.5, 1 - 2**-53):
        assert race(weights, torch.full((1, 3), uniform, dtype=torch.float64)).item() == 1


def test_splitmix64_gives_its_published_numbers():
    # The first outputs of the generator seeded with 1234567, as its reference implementation prints them.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    numbers = uniforms(torch.tensor([[1234567]]), torch.arange(4)[None])[0]
    assert numbers.tolist() == [((z >> 12) + 0.5) / 2**52 for z in published]


def test_random_numbers_are_a_function_of_what_identifies_the_answer():
    base = RandomStream(1, [5, 6], 0, 0)
    assert base.seed(7) == RandomStream(1, (5, 6)).seed(7)
    others = [RandomStream(2, [5, 6]), RandomStream(1, [56]), RandomStream(1, [5, 6], 1), RandomStream(1, [5, 6], 0, 1)]
    assert len({stream.seed(7) for stream in [base, *others]} | {base.seed(8)}) == 6


@pytest.mark.parametrize("along", ["positions", "tokens"])
def test_random_numbers_are_uniform_and_uncorrelated(along):
    stream = RandomStream(0, [1])
    if along == "positions":
        numbers = uniforms(torch.tensor([[stream.seed(i)] for i in range(N_DRAWS)]), torch.tensor([[17]]))[:, 0]
    else:
        numbers = uniforms(torch.tensor([[stream.seed(0)]]), torch.arange(N_DRAWS)[None])[0]
    counts = (numbers * 100).long().bincount(minlength=100)
    assert chi_square_is_plausible(counts, torch.full((100,), N_DRAWS / 100))
    correlation = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1].item()
    assert abs(correlation) < CRITICAL / math.sqrt(N_DRAWS)


def test_the_global_random_state_decides_sample_top_p_and_nothing_else():
    probs = torch.full((1, 1000), 0.001)
    torch.manual_seed(5)
    first = sample_top_p(probs, 0.9).item()
    state = torch.random.get_rng_state()
    next_tokens(probs.log(), torch.tensor([3]), *torch.tensor([[1.0], [0], [0.9], [0]], dtype=torch.float64))
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
