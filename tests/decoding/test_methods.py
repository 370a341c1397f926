"""Decoding methods against Transformers' `generate`, float32, on the same random and on real weights."""

import json
import math

import pytest
import torch
from conftest import SMALL, random_model
from test_model import transformers_model

from llama import GenerationError, Llama, Tokenizer
from llama.options import DecodingOptions, per_prompt

transformers = pytest.importorskip("transformers", reason="pip install transformers to compare with it")

METHODS = {
    "greedy": {},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "both": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.6},
    "beams with penalties": {
        "num_beams": 3,
        "num_return_sequences": 3,
        "repetition_penalty": 1.3,
        "early_stopping": True,
    },
    "beams without repeats": {
        "num_beams": 5,
        "no_repeat_ngram_size": 2,
        "length_penalty": 2.0,
        "early_stopping": "never",
    },
}


@pytest.fixture(scope="module")
def real(request) -> Llama:
    folder = request.getfixturevalue("stories")
    return Llama.build(folder, max_seq_len=256, max_batch_size=8, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def random(tmp_path_factory) -> Llama:
    from conftest import write_byte_tokenizer

    path = tmp_path_factory.mktemp("random") / "tokenizer.model"
    write_byte_tokenizer(path)
    model = random_model(0, 0.15, **SMALL, max_seq_len=256, max_batch_size=8)
    model.allocate_cache()
    llama = Llama(model, Tokenizer(path))
    llama.tokenizer.stop_tokens = {7, 300}  # some that come up
    return llama


@pytest.mark.parametrize("weights", ["random", "real"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_tokens_and_logprobs_equal_transformers(request, weights, method):
    llama = request.getfixturevalue(weights)
    theirs = transformers_model(llama.model)
    generator = torch.Generator().manual_seed(0)
    prompts = [[1, *torch.randint(3, 250, (n,), generator=generator).tolist()] for n in (1, 9, 40)]
    n_new, n = 30, METHODS[method].get("num_return_sequences", 1)
    tokens, logprobs = llama.generate(prompts, n_new, temperature=0, logprobs=True, **METHODS[method])
    for i, prompt in enumerate(prompts):
        output = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=n_new,
            do_sample=False,
            eos_token_id=sorted(llama.tokenizer.stop_tokens),
            pad_token_id=0,
            **METHODS[method],
        )
        for row in range(n):
            expected = output[row, len(prompt) :].tolist()
            stops = [at for at, token in enumerate(expected) if token in llama.tokenizer.stop_tokens]
            expected = expected[: min(stops, default=len(expected))]
            assert tokens[i * n + row] == expected
            logits = theirs(torch.tensor([prompt + expected])).logits[0, len(prompt) - 1 : -1]
            values = torch.log_softmax(logits, -1).gather(-1, torch.tensor(expected, dtype=torch.long)[:, None])[:, 0]
            assert logprobs[i * n + row] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_a_filter_that_leaves_one_token_is_greedy_at_any_temperature(random, filters):
    prompts = [[1, 2], [3, 4, 5]]
    greedy = random.generate(prompts, 12, temperature=0)
    assert random.generate(prompts, 12, seed=0, **{"temperature": 50.0, "top_p": 1.0} | filters) == greedy
    assert random.generate(prompts, 12, seed=0, temperature=50.0, top_p=1.0) != greedy


def test_options_reach_the_distribution_that_is_sampled(random):
    """Draws a first token 4,000 times and compares with the filters written out."""
    from test_sampling import chi_square_is_plausible, written_out

    cache, random.model.cache = random.model.cache, None
    logits = random.model(torch.tensor([[1, 2, 3]]))[0, -1]
    random.model.cache = cache
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1}
    expected = written_out(logits, *options.values())
    random_stops, random.tokenizer.stop_tokens = random.tokenizer.stop_tokens, set()
    answers, _ = random.generate([[1, 2, 3]], 1, num_return_sequences=4000, seed=0, **options)
    random.tokenizer.stop_tokens = random_stops
    counts = torch.tensor([answer[0] for answer in answers]).bincount(minlength=512)
    assert 2 < (expected > 0).sum() <= 20
    assert chi_square_is_plausible(counts, expected * 4000)


UNUSABLE = [
    ({"logit_bias": dict.fromkeys(range(512), -math.inf)}, "logit_bias left no token to choose"),
    ({"logits_processor": lambda ids, scores: scores * math.nan}, "logits_processor left a logit of nan"),
    ({"logits_processor": lambda ids, scores: scores + math.inf}, "logits_processor left a logit of inf"),
    ({"no_repeat_ngram_size": 1}, "no_repeat_ngram_size left no token to choose"),
]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(("options", "message"), UNUSABLE)
def test_logits_from_which_nothing_can_be_chosen_are_an_error(request, options, message, temperature):
    llama = request.getfixturevalue("random")
    long = Llama(random_model(0, **SMALL, max_seq_len=600, max_batch_size=2), llama.tokenizer)
    long_prompt = list(range(512))
    with pytest.raises(GenerationError, match=f"prompt 0: {message}"):
        long.generate([long_prompt], 5, temperature=temperature, **options)


def test_a_tiny_temperature_is_greedy_and_a_huge_top_k_filters_nothing(random):
    greedy = random.generate([[1, 2, 3]], 6, temperature=0)
    assert random.generate([[1, 2, 3]], 6, temperature=1e-40) == greedy
    whole = random.generate([[1, 2, 3]], 6, temperature=1.0, seed=0)
    assert random.generate([[1, 2, 3]], 6, temperature=1.0, seed=0, top_k=2**62) == whole


def test_numbers_may_be_numpys_or_torchs(random):
    import numpy as np

    expected = random.generate([[1], [2]], 3, temperature=0.5, seed=4)
    options = {"max_gen_len": np.int64(3), "temperature": torch.tensor([0.5, 0.5]), "seed": np.array([4, 4])}
    assert random.generate(np.array([[1], [2]]), **options) == expected


def test_prompts_may_come_from_an_iterator(random):
    expected = random.text_completion(["a", "b"], 0, max_gen_len=3)
    assert random.text_completion(map(str, "ab"), 0, max_gen_len=3) == expected


def test_predictions_have_the_requested_keys_even_for_empty_answers(random):
    for options in ({"max_gen_len": 0}, {"max_gen_len": 0, "echo": True}, {"max_gen_len": 3}):
        prediction = random.text_completion(["ab"], 0, top_logprobs=2, **options)[0]
        n = len(prediction["tokens"])
        assert set(prediction) == {"generation", "finish_reason", "tokens", "logprobs", "top_logprobs"}
        assert len(prediction["logprobs"]) == len(prediction["top_logprobs"]) == n


def test_answers_are_prompt_major(random):
    prompts = [[1, 2], [3, 4, 5]]
    both = random.generate(prompts, 6, temperature=1.0, seed=0, num_return_sequences=[2, 3])[0]
    assert len(both) == 5
    assert both[:2] == random.generate(prompts[:1], 6, temperature=1.0, seed=0, num_return_sequences=2)[0]
    assert both[2:] == random.generate(prompts[1:], 6, temperature=1.0, seed=0, num_return_sequences=3)[0]


def test_every_option_may_be_a_list_of_one_for_each_prompt(random):
    values = {
        "max_gen_len": [5, 12],
        "temperature": [1.0, 0.7],
        "top_p": [0.5, 1.0],
        "top_k": [None, 40],
        "min_p": [0.01, None],
        "repetition_penalty": [1.0, 1.2],
        "no_repeat_ngram_size": [3, 0],
        "stop": [[65, "zz"], None],
        "logit_bias": [None, {4: 3.0}],
        "seed": [11, 12],
        "logits_processor": [None, lambda ids, scores: scores * 0.9],
    }
    prompts = [[1, 2, 3], [4, 5]]
    together, _ = random.generate(prompts, **values)
    for i, prompt in enumerate(prompts):
        assert random.generate([prompt], **{name: pair[i] for name, pair in values.items()})[0] == [together[i]]


def test_top_logprobs_are_the_most_likely_alternatives(random):
    prompt = [[5, 6, 7]]
    tokens, logprobs, top = random.generate(prompt, 4, temperature=0, logprobs=True, echo=True, top_logprobs=3)
    cache, random.model.cache = random.model.cache, None
    expected = torch.log_softmax(random.model(torch.tensor(tokens))[0], -1)
    random.model.cache = cache
    assert top[0][0] == [] and logprobs[0][0] == 0.0
    for position, alternatives in enumerate(top[0][1:]):
        values, ids = expected[position].topk(3)
        assert [token for token, _ in alternatives] == ids.tolist()
        assert [value for _, value in alternatives] == pytest.approx(values.tolist(), abs=1e-4)
    prediction = random.text_completion(["ab"], 0, max_gen_len=3, top_logprobs=2)[0]
    assert [len(alternatives) for alternatives in prediction["top_logprobs"]] == [2] * len(prediction["tokens"])


# Strings that end an answer


def spelled(llama: Llama, text: str) -> dict:
    """Options that make the model write the text, one byte per token, whatever the prompt."""
    ids = llama.tokenizer.encode(text)
    start = []

    def say(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        start.append(seen.shape[1]) if not start else None
        forced = torch.full_like(scores, -torch.inf)
        forced[0, ids[min(seen.shape[1] - start[0], len(ids) - 1)]] = 0
        return forced

    return {"logits_processor": say, "temperature": 0, "max_gen_len": len(ids)}


SPOKEN = [
    ("Hello world. Goodbye.", ["Good"], "Hello world. "),
    ("one\n\ntwo", ["\n\n"], "one"),
    ("aab", ["ab"], "a"),  # a false start within the stop string itself
    ("abababac", ["abac"], "abab"),
    ("xyz", ["z", "yz"], "x"),  # the stop string that begins first
    ("no stop here", ["stop!", "q"], "no stop here"),
    ("stop", ["stop"], ""),
    ("naïve 😀 fin", ["😀"], "naïve "),
    ("cut 😀", ["\x80"], "cut 😀"),  # bytes of a character are not text
]


@pytest.mark.parametrize(("spoken", "stop", "expected"), SPOKEN)
def test_a_stop_string_ends_the_answer_where_it_begins(random, spoken, stop, expected):
    answer = random.text_completion(["q"], stop=stop, logprobs=True, **spelled(random, spoken))[0]
    assert answer["generation"] == expected
    assert len(answer["logprobs"]) == len(answer["tokens"]) == len(expected.encode())
    pieces = list(random.stream_text("q", stop=stop, **spelled(random, spoken)))
    assert "".join(pieces) == expected
    assert all(pieces)
    for piece in pieces:
        piece.encode()  # no half characters


def test_a_stream_holds_back_what_may_become_a_stop_string(random):
    pieces = list(random.stream_text("q", stop=["END"], **spelled(random, "an EN is not the END")))
    assert "".join(pieces) == "an EN is not the "
    assert "EN" not in pieces and " E" not in pieces


def test_an_unfinished_character_is_replaced_at_the_end(random):
    options = spelled(random, "ab😀")
    options["max_gen_len"] -= 1
    assert "".join(random.stream_text("q", **options)) == "ab\ufffd"
    options = spelled(random, "ab😀")
    options["max_gen_len"] -= 1
    assert random.text_completion(["q"], **options)[0]["generation"] == "ab\ufffd"


def test_echo_and_stop_strings_go_together(random):
    answer = random.text_completion(["a stop in the prompt: "], stop=["stop"], echo=True, **spelled(random, "go stop"))[
        0
    ]
    assert answer["generation"] == "<|begin_of_text|>a stop in the prompt: go "


def test_an_empty_answer_yields_nothing(random):
    eot = random.tokenizer.eot_id
    random_stops, random.tokenizer.stop_tokens = random.tokenizer.stop_tokens, {eot}
    assert list(random.stream_text("q", logit_bias={eot: 1e9}, temperature=0)) == []
    random.tokenizer.stop_tokens = random_stops


# Scores


def test_scores_equal_a_full_forward_and_texts_past_the_context_are_read_in_windows(random):
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randint(0, 500, (n,), generator=generator).tolist() for n in (50, 1000))
    scores = random.score([short, long, [3]], stride=100)
    cache, random.model.cache = random.model.cache, None

    def logprobs(ids: list[int]) -> list[float]:
        table = torch.log_softmax(random.model(torch.tensor([ids]))[0, :-1], -1)
        return table.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    assert scores[0]["logprobs"] == pytest.approx([0.0, *logprobs(short)], abs=1e-4)
    expected = [0.0, *logprobs(long[:256])]
    for stop in (356, 456, 556, 656, 756, 856, 956, 1000):
        new = stop - len(expected)
        expected += logprobs(long[stop - 256 : stop])[-new:]
    random.model.cache = cache
    assert scores[1]["logprobs"] == pytest.approx(expected, abs=1e-4)
    assert scores[2]["logprobs"] == [0.0]
    mean = sum(expected[1:]) / 999
    assert random.perplexity([long], stride=100)[0] == pytest.approx(math.exp(-mean), rel=1e-4)


@pytest.mark.parametrize("stride", [0, 256, 1.5, -1])
def test_a_stride_that_leaves_tokens_without_context_is_refused(random, stride):
    with pytest.raises(ValueError, match=r"stride = .*: expected an integer from 1 to max_seq_len - 1 = 255"):
        random.score([[1, 2]], stride=stride)


def test_a_text_that_a_damaged_model_cannot_score_is_named(random):
    logits = random.model.logits
    random.model.logits = lambda hidden: logits(hidden) * (math.nan if len(hidden) == 99 else 1)
    with pytest.raises(GenerationError, match="text 1: the model's logits are NaN or infinite"):
        random.score([[1] * 700, [2] * 100])
    del random.model.logits


def test_the_text_of_llama_2_tokens_has_its_spaces(real):
    (score,) = real.score(["Once upon a time"])
    assert "".join(score["tokens"][1:]) == " Once upon a time"


def test_scoring_never_makes_the_logits_of_a_whole_text(random):
    rows = []
    logits = random.model.logits
    random.model.logits = lambda hidden: (rows.append(len(hidden)), logits(hidden))[1]
    random.score([[1] * 5000])
    del random.model.logits
    assert max(rows) <= 256 and sum(rows) >= 4999


def test_the_least_certain_tokens_are_reported(random):
    from llama.decoding.scoring import least_certain

    (score,) = random.score(["abcdefgh"])
    lines = least_certain(score, 3).splitlines()
    worst = sorted(range(1, len(score["logprobs"])), key=lambda i: score["logprobs"][i])[:3]
    assert [int(line.split()[2]) for line in lines] == worst
    assert lines[0].split()[0] == f"{score['logprobs'][worst[0]]:.2f}"


# Mistakes

BAD = [
    ({"top_k": -2}, r"top_k = -2: expected an integer of at least -1, or None"),
    ({"top_k": 2.5}, r"top_k = 2.5"),
    ({"min_p": 1.5}, r"min_p = 1.5: expected a number of at most 1, or None"),
    ({"min_p": -0.1}, r"min_p = -0.1"),
    ({"repetition_penalty": 0}, r"repetition_penalty = 0: expected a number of at least 1e-06"),
    ({"no_repeat_ngram_size": -1}, r"no_repeat_ngram_size = -1: expected an integer of at least 0"),
    ({"num_return_sequences": 0}, r"num_return_sequences = 0: expected an integer of at least 1"),
    ({"num_return_sequences": 20_000_000}, r"num_return_sequences = 20000000: expected an integer of at most 10,000"),
    ({"num_beams": 0}, r"num_beams = 0: expected an integer of at least 1"),
    ({"num_beams": 2.0}, r"num_beams = 2.0"),
    ({"num_beams": 4, "temperature": 0.6}, r"num_beams = 4 with temperature = 0.6: a beam search does not sample"),
    ({"num_beams": 2, "temperature": 0, "num_return_sequences": 3}, r"num_return_sequences = 3 with num_beams = 2"),
    ({"num_beams": 9, "temperature": 0}, r"prompt 0: num_beams = 9: expected at most max_batch_size = 8"),
    ({"num_beams": 2, "temperature": 0, "stop": "x"}, r"num_beams = 2 with top_logprobs or a stop string"),
    ({"length_penalty": math.inf}, r"length_penalty = inf: expected a number of at most 50"),
    (
        {"logit_bias": {1: math.inf}},
        r"logit_bias = .*: expected a dictionary of token ids to numbers of at most 1e\+30",
    ),
    ({"early_stopping": "soon"}, r"early_stopping = 'soon': expected True, False or 'never'"),
    ({"stop": ""}, r"stop = '': expected strings that are not empty and token ids"),
    ({"stop": [1.5]}, r"stop = \[1.5\]"),
    ({"stop": [9999]}, r"prompt 0: stop names token 9999: expected ids from 0 to 511"),
    ({"logit_bias": {9999: 1.0}}, r"logit_bias names token 9999: expected ids from 0 to 511"),
    ({"logit_bias": {1: "much"}}, r"logit_bias = .*: expected a dictionary of token ids to numbers"),
    ({"seed": "x"}, r"seed = 'x': expected an integer"),
    ({"logits_processor": 5}, r"logits_processor = 5: expected a callable"),
    ({"top_logprobs": -1}, r"top_logprobs = -1: expected an integer of at least 0"),
    ({"top_logprobs": 600}, r"top_logprobs = 600: expected at most 512, the size of the vocabulary"),
    ({"temperature": [0.5]}, r"temperature is a list of 1: expected as many values as prompts, 2"),
    ({"top_p": [0.5, 7]}, r"prompt 1: top_p = 7: expected a number of at most 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_out_of_range_or_contradictory_are_refused_before_anything_runs(random, monkeypatch, options, message):
    monkeypatch.setattr(random._engine, "step", lambda: pytest.fail("something was run"))
    with pytest.raises(ValueError, match=message):
        random.generate([[1], [2]], **options)


def test_an_unknown_option_is_named(random):
    with pytest.raises(TypeError, match="'colour' is not a decoding option: expected one of choice, early_stopping, "):
        random.generate([[1]], colour=5)


def test_one_bad_prompt_among_a_thousand_is_named(random, monkeypatch):
    monkeypatch.setattr(random._engine, "step", lambda: pytest.fail("something was run"))
    prompts = [[i % 500] for i in range(1000)]
    prompts[637] = [1, 512]
    with pytest.raises(ValueError, match="prompt 637 has 512 among its ids: expected integers from 0 to 511"):
        random.generate(prompts)


def test_a_logits_processor_that_fails_ends_its_prompt_and_not_the_others(random):
    def odd(ids, scores):
        return scores[:, :-1] if ids[0, 0] == 2 and ids.shape[1] == 3 else scores

    expected, _ = random.generate([[1], [3]], 5, temperature=0)
    with pytest.raises(GenerationError, match=r"prompt 1: logits_processor odd returned \[1, 511\]") as caught:
        random.generate([[1], [2], [3]], 5, temperature=0, logits_processor=odd)
    assert [group[0].tokens for group in caught.value.answers][::2] == expected


def test_a_list_of_stops_is_for_all_prompts_and_a_list_of_lists_for_each():
    assert [o.stops for o in per_prompt(2, stop=["a", "b"])] == [["a", "b"]] * 2
    assert [o.stops for o in per_prompt(2, stop=[["a"], None])] == [["a"], []]
    assert DecodingOptions(stop="a").stops == ["a"]
    assert json.dumps(DecodingOptions(stop=7).stops) == "[7]"
