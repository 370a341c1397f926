"""Rejection sampling in memory: the answers of a plain call, one prefill, the best kept, draws until a threshold."""

import json
import math
import re
import sys

import pytest
from conftest import DEMO, ROOT, ranks

sys.path.insert(0, str(ROOT))
from benchmarks.best_of_n import compare
from llama import Llama
from llama.rejection_sampling import Logprob, Plan, rejection_sample

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {a} + {b}?"}], "sum": a + b} for a, b in [(21, 34), (47, 38)]
]
HOT = {"temperature": 1.8, "top_p": 1.0, "max_gen_len": 60, "seed": 3}


def check(row, answers):
    found = [re.findall(r"\d+", answer["text"]) for answer in answers]
    return [float(bool(numbers) and int(numbers[-1]) == row["sum"]) for numbers in found]


def texts(results):
    return [[answer["text"] for answer in said["answers"]] for said in results]


def test_the_answers_are_those_of_num_return_sequences_with_their_logprobs(demo):
    results = rejection_sample(demo, ROWS, check, n=6, **HOT)
    prompts = [demo.formatter.encode_dialog_prompt(row["messages"]) for row in ROWS]
    expected = demo.answer(prompts, True, num_return_sequences=6, **HOT)
    assert texts(results) == [[answer.text for answer in group] for group in expected]
    assert len(set(texts(results)[0])) > 2
    for said, group in zip(results, expected):
        totals = [math.fsum(answer.token_logprobs) for answer in group]
        assert [answer["logprob"] for answer in said["answers"]] == pytest.approx(totals, abs=1e-3)
        assert [answer["n_tokens"] for answer in said["answers"]] == [len(answer.tokens) for answer in group]


@pytest.mark.parametrize("n", [1, 3, 5])
def test_answers_drawn_in_rounds_are_the_same_as_at_once(demo, n):
    at_once = rejection_sample(demo, ROWS, check, n=12, **HOT)
    in_rounds = rejection_sample(demo, ROWS, lambda r, a: [0.0] * len(a), n, threshold=1, max_samples=12, **HOT)
    assert texts(in_rounds) == texts(at_once)


def test_a_prompt_is_prefilled_once_and_one_token_of_it_for_each_further_answer():
    llama = Llama.build(DEMO, max_seq_len=256, max_batch_size=4, device="cpu", dtype="float32")
    prompts = [llama.formatter.encode_dialog_prompt(row["messages"]) for row in ROWS]
    rejection_sample(llama, ROWS, check, n=10, **HOT)
    assert llama._engine.counters.prefilled <= sum(map(len, prompts)) + 2 * 9


def test_the_best_are_kept_in_the_order_they_were_drawn():
    answers = [{"text": t, "score": s} for t, s in zip("abcdef", [0.1, 0.7, None, 0.9, 0.7, 0.2])]
    said = Plan(6, keep=2).result(answers)
    assert [answer["text"] for answer in said["answers"]] == ["b", "d"] and said["best"] == "d"
    assert said["scores"] == [0.1, 0.7, None, 0.9, 0.7, 0.2]
    assert len(Plan(6).result(answers)["answers"]) == 6
    assert Plan(1).result([{"text": "a", "score": None}])["best"] is None
    assert Plan(2).result([{"text": t, "score": 1.0} for t in "ab"])["best"] == "a"


@pytest.mark.parametrize("keep", [None, 3])
def test_it_draws_until_enough_answers_are_good_enough_or_the_budget_is_spent(demo, keep):
    everything = rejection_sample(demo, ROWS, check, n=40, **HOT)
    results = rejection_sample(demo, ROWS, check, 4, keep, threshold=1, max_samples=40, **HOT)
    for said, whole in zip(results, everything):
        rounds = [whole["scores"][:stop] for stop in range(4, 41, 4)]
        expected = next((scores for scores in rounds if sum(scores) >= (keep or 1)), whole["scores"])
        assert said["scores"] == expected and len(expected) < 40
        assert said["accepted"] == sum(expected) and said["acceptance_rate"] == sum(expected) / len(expected)
        assert len(said["answers"]) == (keep or len(expected))
    spent = rejection_sample(demo, ROWS[:1], check, 4, threshold=2, max_samples=10, **HOT)
    assert len(spent[0]["scores"]) == 10 and spent[0]["accepted"] == 0


def test_an_answer_whose_scorer_raises_is_marked_and_the_others_are_scored(demo):
    def scorer(row, answers):
        if any("8" in answer["text"] for answer in answers):
            raise KeyError("eight")
        return [1.0] * len(answers)

    for said in rejection_sample(demo, ROWS, scorer, n=6, **HOT):
        for answer, score in zip(said["answers"], said["scores"]):
            assert answer["score"] == score == (None if "8" in answer["text"] else 1.0)
            assert answer.get("error") == ("KeyError: 'eight'" if "8" in answer["text"] else None)


def test_an_answer_that_failed_has_no_score(demo):
    def broken(ids, logits):
        return logits * math.nan

    seen = []
    (said,) = rejection_sample(demo, ROWS[:1], lambda r, a: seen.extend(a), n=2, logits_processor=broken, **HOT)
    assert said["scores"] == [None, None] and said["best"] is None and seen == []
    assert "logits_processor left a logit of nan" in said["answers"][0]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n = 0: expected an integer of at least 1"),
        ({"n": None}, "n = None: expected an integer"),
        ({"n": 4, "keep": 5}, "keep = 5: expected at most 4, the number"),
        ({"n": 4, "max_samples": 8}, "max_samples = 8 without a threshold"),
        ({"threshold": 1}, "threshold = 1 without max_samples"),
        ({"n": 4, "threshold": 1, "max_samples": 2}, "max_samples = 2: expected at least n = 4"),
        ({"threshold": math.nan, "max_samples": 16}, "threshold = nan: expected a finite number"),
        ({"threshold": "high", "max_samples": 16}, "threshold = 'high': expected a finite number"),
        ({"temperature": 0}, "temperature = 0 with n = 16: expected more than 0, because all"),
        ({"temperature": -1}, "temperature = -1"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(demo, arguments, message):
    before = demo._engine.counters.prefilled
    with pytest.raises(ValueError, match=re.escape(message)):
        rejection_sample(demo, ROWS, check, **arguments)
    with pytest.raises(ValueError, match="n = 10001: expected at most 10,000"):
        rejection_sample(demo, ROWS, check, n=10_001)
    with pytest.raises(TypeError, match="num_return_sequences has no part in rejection sampling"):
        rejection_sample(demo, ROWS, check, num_return_sequences=4)
    with pytest.raises(ValueError, match="prompt 1: found none of prompt, messages, tokens: expected one of them"):
        rejection_sample(demo, [ROWS[0], {"text": "no prompt"}], check)
    open_dialog = [{"role": "assistant", "content": "<PLACEHOLDER>"}, *ROWS[0]["messages"]]
    with pytest.raises(ValueError, match="prompt 0: message 0 is open: a dialog is a list of one or more messages"):
        rejection_sample(demo, [open_dialog], check)
    for wrong, error, message in (
        ("reward", ValueError, "scorer 'reward': expected one of logprob, mean_logprob, reward:DIR, judge, judge:DIR"),
        ("reward:/nowhere", FileNotFoundError, "there is no directory /nowhere: expected a model's"),
        ("no_such_module:f", ValueError, "there is no module 'no_such_module'"),
        (5, TypeError, r"scorer = 5: expected a function \(row, answers\), or one of logprob, "),
    ):
        with pytest.raises(error, match=message):
            rejection_sample(demo, ROWS, wrong)
    assert demo._engine.counters.prefilled == before


def test_the_accuracy_of_the_best_rises_with_n_and_the_estimate_agrees_with_brute_force(demo):
    table = compare(demo, n_prompts=12, n_samples=16, temperature=1.9)
    estimates = [row["estimated"] for row in table]
    assert [row["n"] for row in table] == [1, 4, 16] and estimates[0] + 0.2 < estimates[1] < estimates[2] - 0.1
    for row in table:
        assert abs(row["difference"]) <= 2 * row["error"], row


SCRIPT = """
import json, sys
from llama import Llama
from llama.rejection_sampling.draw import rejection_sample
from llama.rejection_sampling.scorers import Logprob
llama = Llama.build(sys.argv[1], max_seq_len=256, model_parallel_size=int(sys.argv[2]), device="cpu", dtype="float32")
rows = [f"One day, the {animal}" for animal in ("fox", "cat", "dog")]
print(json.dumps(rejection_sample(llama, rows, Logprob(llama), n=3, keep=2, max_gen_len=12, seed=5)))
"""


@pytest.mark.parametrize(("n_processes", "model_parallel_size"), [(2, 1), (2, 2)])
def test_replicas_and_model_parallel_ranks_give_the_same(tmp_path, demo, n_processes, model_parallel_size):
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = ranks(n_processes, tmp_path / "script.py", DEMO, model_parallel_size)
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout.splitlines()[-1])
    rows = [f"One day, the {animal}" for animal in ("fox", "cat", "dog")]
    expected = rejection_sample(demo, rows, Logprob(demo), n=3, keep=2, max_gen_len=12, seed=5)
    assert texts(results) == texts(expected) and [r["best"] for r in results] == [r["best"] for r in expected]
