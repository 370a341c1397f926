"""The benchmark programs run with the current engine, and the counted function calls stay below their limits."""

from benchmarks.calls import count_greedy_chat
from benchmarks.contestants import Ours


def test_a_greedy_chat_completion_enters_at_most_100_functions_13_deep():
    """`python -m benchmarks.calls --list` lists them. Code that few answers need must not run for all."""
    entered, deepest = count_greedy_chat()
    assert len(entered) <= 100 and len(deepest) <= 13, (len(entered), deepest)


def test_the_contestant_of_the_decode_benchmark_times_the_steps_in_which_every_row_decodes(write_checkpoint):
    ours = Ours(write_checkpoint(), "cpu", {1: 64, 3: 64})
    assert ours.prefill(20) > 0
    counters = ours.engine.counters
    before = counters.prefilled, counters.decoded
    assert len(ours.decode(3, 20, 4)) == 4
    # Of each prompt only the last token runs again, the rest is in the cache; then each row decodes.
    assert (counters.prefilled - before[0], counters.decoded - before[1]) == (3, 12)
    assert ours.prefill(20) > 0 and counters.prefilled - before[0] == 23  # with nothing from the cache
