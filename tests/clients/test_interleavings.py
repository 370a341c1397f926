"""Some hundred random steps of `benchmarks.interleavings`, which runs ten thousand."""

from benchmarks.interleavings import Interleavings


def test_whatever_is_done_in_whatever_order_the_answers_are_the_plain_models(tmp_path):
    steps = Interleavings(1, tmp_path)
    for _ in range(150):
        steps.step()
    assert steps.n_answers > 40 and steps.n_packed > 10 and len(steps.counts) == 13
