"""What the answers to a data set depend on besides its lines."""

import pytest

from llama.datasets.runs import decoding_parameters, line_seed


def test_an_option_that_is_given_its_default_changes_nothing(demo):
    plain = decoding_parameters(demo, {}, 1)
    assert decoding_parameters(demo, {"temperature": 0.6, "stop": None, "num_beams": 1}, 1) == plain
    assert decoding_parameters(demo, {"temperature": 0.7}, 1) != plain != decoding_parameters(demo, {}, 2)


def test_a_logits_processor_is_recorded_by_its_name(demo):
    class Louder:
        def __call__(self, ids, logits):
            return logits * 2

    found = decoding_parameters(demo, {"logits_processor": Louder()}, 1)["options"]["logits_processor"]
    assert found.endswith("Louder")
    assert "logits_processor" not in decoding_parameters(demo, {}, 1)["options"]


@pytest.mark.parametrize(("seed", "id"), [(1, "b"), (2, "a"), (1, None), (1, "\ud800")])
def test_the_seed_of_a_line_depends_on_the_runs_and_on_its_id(seed, id):
    assert 0 <= line_seed(seed, id) < 2**48 and line_seed(seed, id) == line_seed(seed, id) != line_seed(1, "a")
