"""Penalties against Transformers' and against hand-written ones, and logits_processors that return nonsense."""

import pytest
import torch
from conftest import DEMO

from llama import Llama
from llama.decoding.penalties import process_logits

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 1]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor(1.3)"),
        ({"repetition_penalty": 0.7}, "RepetitionPenaltyLogitsProcessor(0.7)"),
        ({"no_repeat_ngram_size": 1}, "NoRepeatNGramLogitsProcessor(1)"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor(2)"),
        ({"no_repeat_ngram_size": 3}, "NoRepeatNGramLogitsProcessor(3)"),
        ({"logit_bias": {2: 1.5, 9: -2.0}}, "SequenceBiasLogitsProcessor([[[2], 1.5], [[9], -2.0]])"),
    ],
)
def test_penalties_equal_transformers(ours, theirs):
    transformers = pytest.importorskip("transformers", reason="pip install transformers to compare with it")
    logits = torch.randn(10, generator=torch.Generator().manual_seed(0))
    processor = eval(f"p.{theirs}", {"p": transformers.generation.logits_process})
    expected = processor(torch.tensor([IDS]), logits[None].clone())[0]
    before = logits.clone()
    torch.testing.assert_close(process_logits(logits, IDS, **ours), expected)
    assert not torch.equal(expected, logits) and torch.equal(logits, before)


def test_penalties_come_in_the_order_of_transformers():
    logits = torch.tensor([1.0, -1.0, 2.0, 0.5])
    seen = []

    def look(ids, scores):
        seen.append((ids.tolist(), scores.tolist()))
        return scores + 1

    result = process_logits(logits, [2, 0, 2, 0], {0: 3.0}, 2.0, 2, logits_processor=look)
    assert seen == [([[2, 0, 2, 0]], [[2.0, -1.0, -torch.inf, 0.5]])]  # (1 + 3) / 2; 0 2 has occurred
    assert result.tolist() == [3.0, 0.0, -torch.inf, 1.5]


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda ids, scores: scores[0], r"logits_processor <lambda> returned \[4\]: expected logits of shape \[1, 4\]"),
        (lambda ids, scores: None, r"returned NoneType: expected logits of shape \[1, 4\]"),
        (lambda ids, scores: {}["absent"], "logits_processor <lambda> raised KeyError: 'absent'"),
    ],
)
def test_a_logits_processor_that_returns_nonsense_is_named(processor, message):
    with pytest.raises(ValueError, match=message):
        process_logits(torch.zeros(4), [1], logits_processor=processor)


def test_presence_and_frequency_penalties_count_the_answer_alone(demo):
    prompt = demo.tokenizer.encode("Once upon a time", bos=True)
    seen: list[tuple[list[int], torch.Tensor]] = []
    keep = lambda ids, x: seen.append((ids[0].tolist(), x[0])) or x  # noqa: E731
    options = {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    tokens, _ = demo.generate([prompt], 8, temperature=0, **options)
    answer: list[int] = []
    for _ in range(8):  # by hand
        seen.clear()
        demo.generate([prompt + answer], 1, temperature=0, logits_processor=keep)
        ((_, logits),) = seen
        logits = logits.clone()
        for token in set(answer):
            logits[token] -= 0.5 + 0.25 * answer.count(token)
        answer.append(int(logits.argmax()))
    assert tokens[0] == answer


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_outside_openais_range_are_refused(demo, name):
    for value, expected in ((2.5, " of at most 2"), (-2.5, " of at least -2"), (float("nan"), ""), ("1", "")):
        with pytest.raises(ValueError, match=f"{name} = .*: expected a number{expected}$"):
            demo.generate([[1]], 1, **{name: value})


def test_a_draft_changes_no_answer_with_penalties_on_the_answer(demo):
    prompts = [demo.tokenizer.encode("Once upon a time", bos=True)]
    options = {"max_gen_len": 40, "temperature": 1.0, "seed": 3, "presence_penalty": 1.0, "frequency_penalty": 0.5}
    drafted = Llama.build(DEMO, max_seq_len=512, max_batch_size=2, device="cpu", dtype="float32", draft=DEMO)
    assert drafted.generate(prompts, **options) == demo.generate(prompts, **options)
    counts = drafted._engine.counters.speculation
    assert counts.accepted == counts.proposed > 0  # a draft that is the model itself follows the penalties too
