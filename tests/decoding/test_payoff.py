"""Proposals that lose are switched off and tried again. The tests advance the clock."""

import pytest
from conftest import SMALL, random_model
from test_speculative import Bytes

from llama import Llama
from llama.decoding.payoff import WAITS, Payoff


class Clock:
    """Seconds that pass only when a test adds them."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tokens_per_second(with_proposals, n_steps: int = 20_000, rows: int = 1) -> tuple[float, Payoff]:
    """Simulates steps of one row. Without proposals a step takes a second; with_proposals(i): its seconds and tokens.

    A draft first runs the tokens that it missed, at most 500, in 0.005 seconds each.
    """
    clock, tokens, missed = Clock(), 0.0, 0
    payoff = Payoff(clock=clock)
    for i in range(n_steps):
        trials, started = payoff.at(rows), clock()
        if trials.proposing:
            seconds, got = with_proposals(i)
            clock.now += seconds + 0.005 * missed
            missed = 0
            trials.note_with(clock() - started, got)
        else:
            got, missed = 1.0, min(missed + 1, 500)
            clock.now += 1.0
            trials.note_without(1.0)
        tokens += got
    return tokens / clock.now, payoff


@pytest.mark.parametrize("seconds, tokens", [(1.02, 1.0), (1.15, 1.0), (2.0, 1.0), (3.0, 2.5), (10.0, 1.0)])
def test_a_draft_that_loses_costs_less_than_two_percent(seconds, tokens):
    found, _ = tokens_per_second(lambda i: (seconds, tokens))
    assert found >= 0.98


@pytest.mark.parametrize("seconds, tokens", [(1.0, 1.05), (1.2, 3.0), (2.0, 5.0)])
def test_a_draft_that_wins_keeps_its_gain(seconds, tokens):
    found, _ = tokens_per_second(lambda i: (seconds, tokens))
    assert found >= 0.98 * tokens / seconds


def test_a_draft_that_starts_to_pay_is_used_and_one_that_stops_paying_is_not():
    late, _ = tokens_per_second(lambda i: (1.5, 1.0 if i < 5_000 else 3.0))
    assert late > 0.95 * (5_000 + 15_000 * 2) / 20_000
    early, _ = tokens_per_second(lambda i: (1.5, 3.0 if i < 5_000 else 1.0))
    assert early > 0.97 * (15_000 + 15_000) / (7_500 + 15_000)


def test_one_slow_step_decides_nothing():
    _, payoff = tokens_per_second(lambda i: (50.0 if i == 3 else 1.0, 2.0), n_steps=40)
    assert payoff.at(1).proposing


def test_each_number_of_rows_has_its_own_decision():
    _, payoff = tokens_per_second(lambda i: (2.0, 1.0), n_steps=40, rows=4)
    assert not payoff.at(4).proposing and not payoff.at(7).proposing
    assert payoff.at(1).proposing and payoff.at(3).proposing and payoff.at(8).proposing


class Words(Bytes):
    n_words = 512

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b""


class Draft:
    """Makes right or wrong proposals, and takes some time."""

    def __init__(self, clock: Clock, seconds: float, answers: dict | None):
        self.clock, self.seconds, self.answers, self.asked = clock, seconds, answers, 0

    def propose(self, sequences, limits):
        self.asked += 1
        self.clock.now += self.seconds
        known = [self.answers[s.prompt[0]][len(s.tokens) :] if self.answers else [3] * 9 for s in sequences]
        return [ids[:n] for ids, n in zip(known, limits)]


@pytest.mark.parametrize("kind", ["useless", "slow", "good"])
def test_the_engine_times_its_steps_and_gives_the_same_answers(kind):
    model = random_model(**SMALL, max_seq_len=512, max_batch_size=2)
    options = {"temperature": 0.0, "logit_bias": {3: -100.0}}
    prompts, n = [[5], [6]], 400
    expected, _ = Llama(model, Words()).generate(prompts, n, **options)
    clock = Clock()
    draft = Draft(clock, 10.0 if kind == "slow" else 0.1, None if kind == "useless" else dict(zip((5, 6), expected)))
    llama = Llama(model, Words(), proposer=draft)
    llama._engine.payoff = Payoff(clock=clock)
    run = model.run

    def timed(tokens, *where):
        clock.now += 1 + 0.1 * (tokens.shape[1] - 1)
        return run(tokens, *where)

    model.run = timed
    for _ in range(3):
        clock.now = 0.0
        assert llama.generate(prompts, n, **options)[0] == expected
    if kind == "good":  # 9 tokens in 1.9 seconds
        assert clock.now < n / 4
    else:
        assert clock.now < n / 0.98
        assert draft.asked < 40 + 3 * n // WAITS.start
