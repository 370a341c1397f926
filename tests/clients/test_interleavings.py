"""Some hundred random steps of `benchmarks.interleavings`, which runs ten thousand."""

import pytest

from benchmarks.interleavings import Interleavings


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_is_done_in_whatever_order_the_answers_are_the_plain_models(seed, tmp_path):
    steps = Interleavings(seed, tmp_path)
    for _ in range(150):
        steps.step()
    assert steps.n_answers > 40 and steps.n_packed > 10 and len(steps.counts) == 11
