"""Beam search against Transformers' on the same weights, and against itself in other batches. All float32."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import random_model

from llama import Llama, Transformer
from llama.decoding.beam_search import BeamSearch, Hypothesis
from llama.decoding.penalties import Processing
from llama.engine import Engine
from llama.options import DecodingOptions
from llama.sampling import RandomStream
from llama.sequence import Sequence

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "vocab_size": 40}
GRID = list(itertools.product([2, 3, 4, 5], [0.6, 1.0, 2.0], [True, False, "never"]))


def searched(
    prompt: list[int], budget: int, num_beams: int, process: Callable | None = None, stop_tokens=(), **options
) -> Sequence:
    """A sequence with a beam search; `process` is called with a list of ids and the scores of one row."""
    processor = None if process is None else lambda ids, scores: process(ids[0].tolist(), scores[0])[None]
    option = DecodingOptions(temperature=0, num_beams=num_beams, logits_processor=processor, **options)
    how = Processing(prompt, option, None) or None
    sequence = Sequence(prompt, budget, option, stop_tokens=frozenset(stop_tokens), process=how)
    sequence.search = BeamSearch(sequence)
    return sequence


def run(model: Transformer, *sequences: Sequence) -> list[Sequence]:
    """Completes sequences in one batch; returns them in the order in which they ended."""
    engine, ended = Engine(model), []
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        ended += engine.step()
    assert not engine.running and engine.partial is None
    return ended


def beam_search(model: Transformer, *shape, **options) -> list[Hypothesis]:
    """The best answers to one prompt, best first."""
    (sequence,) = run(model, searched(*shape, **options))
    if sequence.error is not None:
        raise ValueError(sequence.error)
    return sequence.search.hypotheses


def repetition_penalty(penalty: float) -> Callable:
    def process(ids: list[int], scores: torch.Tensor) -> torch.Tensor:
        for token in set(ids):
            scores[token] *= penalty if scores[token] < 0 else 1 / penalty
        return scores

    return process


def no_repeat_ngram(n: int) -> Callable:
    def process(ids: list[int], scores: torch.Tensor) -> torch.Tensor:
        for i in range(len(ids) - n + 1):
            if ids[i : i + n - 1] == ids[len(ids) - n + 1 :]:
                scores[ids[i + n - 1]] = -torch.inf
        return scores

    return process


def only(*allowed: int) -> Callable:
    banned = torch.tensor([token for token in range(SHAPE["vocab_size"]) if token not in allowed])
    return lambda ids, scores: scores.index_fill(0, banned, -torch.inf)


# Our `process`, and the same as an argument of Transformers' generate.
PROCESSES = {
    "no process": (None, {}),
    "repetition_penalty 1.3": (repetition_penalty(1.3), {"repetition_penalty": 1.3}),
    "no_repeat_ngram_size 2": (no_repeat_ngram(2), {"no_repeat_ngram_size": 2}),
    "no_repeat_ngram_size 3": (no_repeat_ngram(3), {"no_repeat_ngram_size": 3}),
}


def transformers_of(model: Transformer) -> "transformers.LlamaForCausalLM":  # noqa: F821
    pytest.importorskip("transformers", reason="pip install transformers to compare with it")
    from test_model import transformers_model

    return transformers_model(model)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Uses one thread: with such small models, several threads would mostly wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = random_model(**SHAPE, std=0.3, max_seq_len=64, max_batch_size=8)
    model.allocate_cache()
    return model


@pytest.fixture(scope="module")
def theirs(model):
    return transformers_of(model)


@pytest.fixture(scope="module")
def real_model(stories: Path) -> Transformer:
    return Llama.build(stories, max_seq_len=128, max_batch_size=8, device="cpu", dtype="float32").model


@pytest.fixture(scope="module")
def their_real_model(real_model):
    return transformers_of(real_model)


def random_ids(vocab_size: int, seed: int = 0) -> Callable[[int], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return lambda n: torch.randint(0, vocab_size, (n,), generator=generator).tolist()


@torch.no_grad()
def assert_equal_to_transformers(model, theirs, prompt, budget, num_beams, stop, process="no process", **options):
    """Tokens equal, scores and log-probabilities within 1e-4; returns our answers."""
    ours, same_in_theirs = PROCESSES[process]
    n = options.setdefault("num_return_sequences", num_beams)
    answers = beam_search(model, prompt, budget, num_beams, stop_tokens=stop, process=ours, **options)
    ids = torch.tensor([prompt])
    expected = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=budget,
        do_sample=False,
        num_beams=num_beams,
        eos_token_id=stop or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
        **same_in_theirs,
    )
    assert len(answers) == len(expected.sequences) == n
    for answer, row, score in zip(answers, expected.sequences[:, len(prompt) :].tolist(), expected.sequences_scores):
        n_tokens = next((i for i, token in enumerate(row) if token in stop), budget)
        assert answer.tokens == row[:n_tokens]
        assert answer.finish_reason == ("length" if n_tokens == budget else "stop")
        assert answer.score == pytest.approx(score.item(), abs=1e-4)
        logprobs = theirs(torch.tensor([prompt + answer.tokens])).logits[0].log_softmax(-1)
        logprobs = logprobs[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer.tokens, dtype=torch.long)[:, None])
        assert answer.token_logprobs == pytest.approx(logprobs.flatten().tolist(), abs=1e-4)
    return answers


def assert_ended_in_both_ways(answers: list[Hypothesis]) -> None:
    reasons = [answer.finish_reason for answer in answers]
    assert min(reasons.count("stop"), reasons.count("length")) > len(reasons) / 10


@pytest.mark.parametrize("process", PROCESSES)
def test_random_weights_give_the_answers_of_transformers(model, theirs, process):
    draw, answers = random_ids(40), []
    for i, (num_beams, length_penalty, early_stopping) in enumerate(GRID if process == "no process" else GRID[::2]):
        options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
        prompt, stop = draw(1 + i % 17), sorted(set(draw(1 + i % 4)))
        answers += assert_equal_to_transformers(model, theirs, prompt, 20, num_beams, stop, process, **options)
    assert_ended_in_both_ways(answers)


@pytest.mark.parametrize("process", PROCESSES)
def test_real_weights_give_the_answers_of_transformers(real_model, their_real_model, process):
    draw, answers = random_ids(512), []
    for i, (num_beams, length_penalty, early_stopping) in enumerate(GRID if process == "no process" else GRID[::5]):
        options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
        stop = [[2], [2, 426], [2, 432, 426]][i % 3]  # end of text, full stop, comma
        prompt = [1, 403, 407, 261, 378][: 1 + i % 5] + draw(i % 3)
        answers += assert_equal_to_transformers(
            real_model, their_real_model, prompt, 24, num_beams, stop, process, **options
        )
    assert_ended_in_both_ways(answers)


def test_fewer_answers_are_the_best_of_more(model, theirs):
    draw = random_ids(40, seed=1)
    for i in range(9):
        prompt, stop, n = draw(5), sorted(set(draw(8))), 1 + i % 3
        of_all = beam_search(model, prompt, 12, 4, num_return_sequences=4, stop_tokens=stop)
        answers = assert_equal_to_transformers(model, theirs, prompt, 12, 4, stop, num_return_sequences=n)
        assert answers == of_all[:n]


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("n_prompt", [1, 5, 63])
def test_budgets_of_one_token_and_of_all_the_room_give_the_answers_of_transformers(
    model, theirs, n_prompt, early_stopping
):
    prompt = random_ids(40, seed=2)(n_prompt)
    for budget in (1, 64 - n_prompt):
        # Too few of these stop tokens come for the search to end before the budget does.
        assert_equal_to_transformers(model, theirs, prompt, budget, 3, [9], early_stopping=early_stopping)
    longest = beam_search(model, prompt, 64 - n_prompt, 3, early_stopping=early_stopping)
    assert len(longest[0].tokens) == 64 - n_prompt


@pytest.mark.parametrize("length_penalty", [0.0, -0.3])
def test_length_penalties_of_zero_and_below_give_the_answers_of_transformers(model, theirs, length_penalty):
    draw, differ = random_ids(40, seed=3), 0
    for i in range(12):
        prompt, stop = draw(1 + i), sorted(set(draw(12)))
        options = {"length_penalty": length_penalty, "early_stopping": "never"}
        never = assert_equal_to_transformers(model, theirs, prompt, 30, 4, stop, **options)
        options["early_stopping"] = i % 2 == 0
        differ += never != assert_equal_to_transformers(model, theirs, prompt, 30, 4, stop, **options)
    assert differ  # "never" continued where others stop


def test_many_stop_tokens_give_the_answers_of_transformers(model, theirs):
    draw = random_ids(40, seed=8)
    for i in range(8):  # among the likeliest continuations of a beam are several that end it
        assert_equal_to_transformers(model, theirs, draw(1 + i), 16, 4, sorted(set(draw(20))), length_penalty=2.0)


def test_each_option_changes_some_answers(model):
    """Otherwise the tests above would compare the same answers again and again."""
    draw = random_ids(40, seed=4)
    cases = [(draw(1 + i), draw(3)) for i in range(10)]

    def answers(num_beams: int, **options) -> list[list[Hypothesis]]:
        return [beam_search(model, prompt, 16, num_beams, stop_tokens=stop, **options) for prompt, stop in cases]

    variants = [answers(n) for n in (2, 3, 5)]
    variants += [answers(3, length_penalty=p) for p in (0.6, 2.0)]
    variants += [answers(3, length_penalty=2.0, early_stopping=e) for e in (True, "never")]
    variants += [answers(3, process=process) for process, _ in PROCESSES.values() if process]
    tokens = [[[a.tokens for a in of_prompt] for of_prompt in variant] for variant in variants]
    assert all(a != b for a, b in itertools.combinations(tokens, 2))


def test_one_beam_is_greedy_decoding(model):
    prompt, stop = random_ids(40, seed=5)(6), [11]
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < 36 and not (len(ids) > 6 and ids[-1] in stop):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    for early_stopping in (True, False):
        (answer,) = beam_search(model, prompt, 30, 1, stop_tokens=stop, early_stopping=early_stopping)
        assert answer.tokens == [token for token in ids[6:] if token not in stop]


def test_as_many_beams_as_there_are_answers_find_the_best_of_all():
    model = random_model(**SHAPE | {"vocab_size": 5}, std=0.3, max_seq_len=16, max_batch_size=25)
    every = torch.cartesian_prod(*[torch.arange(5)] * 3)
    prompt = [1, 4, 2]
    with torch.no_grad():
        logprobs = model(torch.cat([torch.tensor([prompt]).expand(125, -1), every], 1)).log_softmax(-1)[:, 2:-1]
    totals = logprobs.gather(-1, every[:, :, None]).sum((1, 2))
    model.allocate_cache()
    answers = beam_search(model, prompt, 3, 25, num_return_sequences=25, length_penalty=0.0)
    best = totals.topk(25)
    assert [answer.tokens for answer in answers] == every[best.indices].tolist()
    assert [answer.score for answer in answers] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_searches_in_one_batch_with_others_and_samples_find_what_each_finds_alone(model):
    def sequences() -> list[Sequence]:
        draw = random_ids(40, seed=6)
        made = []
        for i in range(30):
            num_beams = 1 + i % 4
            options = {
                "length_penalty": [0.6, 1.0, 2.0][i % 3],
                "early_stopping": [True, False, "never"][i // 3 % 3],
                "num_return_sequences": num_beams,
                "stop_tokens": draw(i % 4),
                "process": [None, repetition_penalty(1.3)][i % 2],
            }
            made.append(searched(draw(1 + 7 * i % 23), [15, 1, 30, 0, 8][i % 5], num_beams, **options))
            if i % 3 == 0:
                prompt = draw(5 + i)
                sampling = DecodingOptions(temperature=1.0, top_p=1.0)
                made.append(Sequence(prompt, 20, sampling, RandomStream(i, prompt), logprobs=True))
        return made

    together, alone = sequences(), sequences()
    ended = run(model, *together)
    assert sorted(map(id, ended)) == sorted(map(id, together))
    assert [id(sequence) for sequence in ended] != [id(sequence) for sequence in together]  # several ran at once
    for sequence, same in zip(together, alone):
        run(model, same)
        assert sequence.error is None
        if sequence.search is None:
            assert sequence.tokens == same.tokens
            continue
        assert len(sequence.search.hypotheses) == same.options.num_return_sequences
        for a, b in zip(sequence.search.hypotheses, same.search.hypotheses):
            assert (a.tokens, a.finish_reason) == (b.tokens, b.finish_reason)
            assert a.token_logprobs == pytest.approx(b.token_logprobs, abs=1e-4)
            assert a.score == pytest.approx(b.score, abs=1e-4)


def test_a_slot_that_held_another_prompt_meanwhile_is_filled_anew(model):
    prompts = [random_ids(40, seed=9 + i)(6) for i in range(4)]
    first = beam_search(model, prompts[1], 1, 1)[0].tokens[0]

    def narrow(ids: list[int], scores: torch.Tensor) -> torch.Tensor:
        if len(ids) == 7:  # one beam after the second token, two after the third
            return only(5)(ids, scores) if ids[-1] == first else torch.full_like(scores, -torch.inf)
        return scores

    def sequences() -> list[Sequence]:
        shapes = [(20, 4, None), (20, 2, narrow), (2, 2, None), (1, 2, None)]
        return [searched(prompt, *shape) for prompt, shape in zip(prompts, shapes)]

    together, alone = sequences(), sequences()
    run(model, *together)
    for sequence, same in zip(together, alone):
        run(model, same)
        assert sequence.search.hypotheses[0].tokens == same.search.hypotheses[0].tokens


def test_a_search_grows_beside_a_prompt_that_is_prefilled_in_pieces(model, monkeypatch):
    """The prompt is in the slot after the running ones, which a new beam needs."""
    prompts = [random_ids(40, seed=20 + i)(n) for i, n in enumerate((6, 50))]

    def narrow(ids: list[int], scores: torch.Tensor) -> torch.Tensor:
        return only(5)(ids, scores) if len(ids) < 8 else scores  # two tokens with one beam, then three

    def sequences() -> list[Sequence]:
        return [searched(prompts[0], 12, 3, narrow), searched(prompts[1], 10, 2)]

    alone = sequences()
    for sequence in alone:
        run(model, sequence)
    monkeypatch.setattr("llama.engine.PREFILL_TOKENS_WHILE_DECODING", 8)
    together = sequences()
    run(model, *together)
    for sequence, same in zip(together, alone):
        assert [h.tokens for h in sequence.search.hypotheses] == [h.tokens for h in same.search.hypotheses]


def test_a_long_prompt_runs_in_pieces(model, monkeypatch):
    prompt = random_ids(40, seed=7)(50)
    whole = beam_search(model, prompt, 10, 3)
    lengths, hidden_states = [], model.hidden_states
    monkeypatch.setattr("llama.engine.PREFILL_TOKENS", 16)
    monkeypatch.setattr(model, "hidden_states", lambda t, *a: lengths.append(t.shape) or hidden_states(t, *a))
    assert beam_search(model, prompt, 10, 3)[0].tokens == whole[0].tokens
    assert lengths[:4] == [(1, 16), (1, 16), (1, 16), (1, 2)]
    assert set(lengths[4:]) <= {(3, 1)}  # then all beams at once, each token once


def test_a_process_that_leaves_few_continuations_leaves_few_beams(model):
    answers = beam_search(model, [1, 2], 2, 3, num_return_sequences=3, process=only(5, 6))
    assert len({tuple(answer.tokens) for answer in answers}) == 3
    assert all(set(answer.tokens) <= {5, 6} for answer in answers)
    (answer,) = beam_search(model, [1, 2], 4, 3, process=only(5))
    assert answer.tokens == [5, 5, 5, 5]
    with pytest.raises(ValueError, match=r"1 answers, .* -inf.*: expected num_return_sequences = 2"):
        beam_search(model, [1, 2], 4, 3, num_return_sequences=2, process=only(5))


def test_nan_or_an_error_of_process_ends_its_search_and_no_other(model):
    def poison(ids: list[int], scores: torch.Tensor) -> torch.Tensor:
        return scores * torch.nan if len(ids) == 5 else scores

    def refuse(ids: list[int], scores: torch.Tensor) -> torch.Tensor:
        raise ValueError("not this one")

    sequences = [searched([1, 2, 3], 6, 2, process) for process in (None, poison, refuse, None)]
    assert len(run(model, *sequences)) == 4
    assert [len(sequence.search.hypotheses) for sequence in sequences] == [1, 0, 0, 1]
    assert sequences[1].error == "the log-probabilities of the answer's token 3 are NaN"
    assert sequences[2].error.endswith("raised ValueError: not this one")
    assert sequences[0].search.hypotheses[0].tokens == beam_search(model, [1, 2, 3], 6, 2)[0].tokens


def test_a_budget_of_nothing_is_an_empty_answer(model):
    assert beam_search(model, [1] * 64, 0, 3, num_return_sequences=2) == [Hypothesis([], [], 0.0, "length")] * 2


def test_more_beams_than_slots_are_refused_before_anything_runs(model, monkeypatch):
    monkeypatch.setattr(model, "hidden_states", None)
    with pytest.raises(ValueError, match="9 beams: expected at most the 8 slots of the cache"):
        beam_search(model, [1], 5, 9)
