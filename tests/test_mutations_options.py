"""Random options, sensible and absurd: each call answers, or fails with an error that names the option."""

import math
import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, random_model, write_byte_tokenizer
from mutate import STRANGE, changed, is_refused

from llama import GenerationError, Llama, Tokenizer
from llama.datasets.prompts import from_json
from llama.options import NAMES, DecodingOptions, per_prompt

EXTREME: list[Any] = [
    *(10**30, 10**400, 10**5000, -(10**5000), 2**63, 2**64, -(2**64), 1e308, -1e308, 5e-324, 1e-320, 1e30, 1e38, 1e-30),
    *(Fraction(1, 3), Fraction(10**400, 3), Decimal("0.5"), 1j, np.float16(0.5), np.int64(3), np.float32("nan")),
    *(torch.tensor(2), torch.tensor(0.5), torch.tensor([0.5]), np.array([1, 2]), object(), b"x", range(3), {1, 2}),
    *({10**30: 1.0}, {1: 1e300}, {1: -1e300}, {1: 1e30}, {1: 10**400}, {2: -math.inf}, {3: math.inf}, {"1": 2}),
    *(["a", 5], [["a"], None], [10**5000], [None], [[]], "never", max, 5, 0.7, 1.5, 0, 4, 12, -2),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Llama:
    path = tmp_path_factory.mktemp("options") / "tokenizer.model"
    write_byte_tokenizer(path)
    return Llama(random_model(max_seq_len=24, max_batch_size=2, **SMALL), Tokenizer(path))


def drawn(rng: random.Random) -> dict[str, Any]:
    """One to three options with strange values, extreme values, or damaged sensible values."""
    options: dict[str, Any] = {}
    sensible = {"stop": ["a", 5], "logit_bias": {1: 2.0, 7: -1.0}, "early_stopping": True, "seed": 5, "top_p": 0.9}
    for name in rng.sample(NAMES, rng.choice((1, 1, 2, 3))):
        values = (rng.choice(STRANGE), rng.choice(EXTREME), rng.choice(EXTREME), changed(rng, sensible.get(name, [1])))
        options[name] = rng.choice(values)
    if rng.random() < 0.5:
        options.setdefault("temperature", 0)
    return options


def test_a_call_answers_or_names_the_option_that_it_refuses(small):
    """Options that are accepted run, and all numbers are finite: no option makes logits NaN."""
    n, n_refused = 1500, 0
    for number in range(n):
        options = drawn(random.Random(number))

        def call(options=options):
            _, logprobs = small.generate([[1, 2, 3, 1, 2]], **{"max_gen_len": 2, "logprobs": True} | options)[:2]
            assert all(math.isfinite(value) for answer in logprobs for value in answer), "not finite"

        try:
            n_refused += is_refused(call, options, (ValueError, TypeError, GenerationError), seconds=10)
        except AssertionError as error:
            raise AssertionError(f"case {number}, {list(options)}: {error}") from error.__context__
    assert 0.4 * n < n_refused < 0.95 * n


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 10**30}, r"repetition_penalty = 1000.*: expected a number of at most 1,000,000.0"),
        ({"repetition_penalty": 1e-20}, "repetition_penalty = 1e-20: expected a number of at least 1e-06"),
        ({"repetition_penalty": 10**400}, r"repetition_penalty = 1000.*\.\.\..*: expected a number of at most"),
        ({"temperature": 1e308}, r"temperature = 1e\+308: expected a number of at most 1e\+30"),
        ({"temperature": 10**5000}, "temperature = a number of thousands of digits: expected a number of at most"),
        ({"top_p": 5e-324}, "top_p = 5e-324: expected a number of at least 1e-30"),
        ({"top_k": 10**30}, "top_k = 1000.*: expected an integer of at most 9,223,372,036,854,775,807"),
        ({"max_gen_len": 10**30}, "max_gen_len = 1000.*: expected an integer of at most 9,223"),
        ({"seed": 10**400}, r"seed = 1000.*: expected an integer of at most 18,446,744,073,709,551,615"),
        ({"seed": -(10**5000)}, "seed = a number of thousands of digits: expected an integer of at least -9,223"),
        ({"num_beams": 10**30, "temperature": 0}, "num_beams = 1000.*: expected an integer of at most 10,000"),
        ({"repetition_penalty": Fraction(3, 2)}, r"repetition_penalty = Fraction\(3, 2\): expected a number$"),
        ({"logit_bias": {1: 1e300}}, r"logit_bias = .*: expected a dictionary .* at most 1e\+30"),
        ({"logit_bias": {10**5000: 1}}, "logit_bias names token a number of thousands of digits: expected ids from 0"),
        ({"stop": [10**30]}, "stop names token 1000.*: expected ids from 0 to 511"),
    ],
)
def test_numbers_out_of_range_are_refused_with_the_limit(small, options, message):
    with pytest.raises(ValueError, match=message):
        small.generate([[1, 2]], **{"max_gen_len": 1} | options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e30, "logit_bias": dict.fromkeys(range(500), -math.inf)},
        {"temperature": 5e-324},
        {"top_p": 1e-30, "top_k": 3},
        {"repetition_penalty": 1e6, "logit_bias": {1: 1e30, 2: -1e300}},
        {"repetition_penalty": 1e-6, "logit_bias": {1: 1e30}, "temperature": 1e-320},
        {"min_p": 5e-324, "length_penalty": -50},
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
        {"top_k": 2**63 - 1, "max_gen_len": 2**63 - 1},
    ],
)
def test_numbers_at_the_limits_are_accepted(small, options):
    [tokens], [logprobs] = small.generate([[1, 2, 3]], **{"max_gen_len": 4, "logprobs": True, "stop": []} | options)
    assert all(0 <= token < 512 for token in tokens)
    assert all(map(math.isfinite, logprobs))


def test_options_in_a_file_are_refused_in_the_same_way(small):
    """Options after a round trip through JSON: floats such as 1e308, keys that are strings."""
    values = [*STRANGE, {"1": 1e300}, {str(10**40): 1}, 1e308, 5.0]
    for options in ({name: value} for name in NAMES for value in values):
        is_refused(lambda options=options: per_prompt(1, **from_json(options)), options, (ValueError, TypeError), 5)
    assert DecodingOptions(**from_json({"seed": 5.0})).seed == 5
