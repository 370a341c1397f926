"""Score files and rollouts as other scripts write them: answers at the end of dialogs, as texts, in arrays."""

import json
import math

import pytest
import torch

from llama.datasets.prompts import prompt_ids
from llama.rejection_sampling import Logprob, Plan, rejection_sample, rescore_files, sample_files

QUESTION = [{"role": "user", "content": "What is 21 + 34?"}]
GOOD, BAD = "Ones: 1 + 4 = 5. Tens: 2 + 3 = 5. So 21 + 34 = 55.", "It is 12."
P = {"role": "assistant", "content": "<PLACEHOLDER>"}
ROLLOUTS = [*QUESTION, P, {"role": "user", "content": "What is 12 + 7?"}, P]
HOT = {"temperature": 2.5, "top_p": 1.0, "max_gen_len": 10, "seed": 4}


def answered(content) -> list:
    return [*QUESTION, {"role": "assistant", "content": content}]


def rescore(tmp_path, rows, scorer, name="out.json", **options):
    (tmp_path / "in.json").write_text(json.dumps(rows))
    rescore_files(tmp_path / "in.json", tmp_path / name, scorer, Plan(99), "scorer", **options)
    return json.loads((tmp_path / name).read_text())


def test_the_answers_may_end_the_dialog_or_be_texts(demo, tmp_path):
    rows = [
        {"messages": answered([GOOD, BAD])},
        {"messages": answered(GOOD)},
        {"messages": QUESTION, "answers": [GOOD, {"text": BAD, "by": "me"}]},
        {"messages": QUESTION, "answers": [BAD], "metadata": 5},
    ]
    found = rescore(tmp_path, rows, Logprob(demo), indent=2)
    prompt = prompt_ids(demo, {"messages": QUESTION})
    expected = {}
    for text in (GOOD, BAD):  # the slow obvious way: the log-softmax of the model's logits
        ids = demo.tokenizer.encode(text)
        logits = demo.model(torch.tensor([prompt + ids]), 0)[0, len(prompt) - 1 : -1].float()
        expected[text] = logits.log_softmax(-1)[range(len(ids)), ids].sum().item()
    assert [record["scores"] for record in found] == [
        [pytest.approx(expected[text], abs=1e-3) for text in texts]
        for texts in ([GOOD, BAD], [GOOD], [GOOD, BAD], [BAD])
    ]
    assert all(record["messages"] == QUESTION for record in found)
    assert [record["best"] for record in found] == [GOOD, GOOD, GOOD, BAD]
    assert found[2]["answers"][1]["by"] == "me" and found[3]["metadata"] == 5


def test_a_row_without_answers_says_what_it_has_and_where_they_are_looked_for(tmp_path):
    rows = {
        "no answers in messages, responses": {"messages": QUESTION, "responses": ["a"]},
        "answers = []": {"messages": answered([])},
        "answers = [5]": {"messages": answered([5])},
        "answers = 'one'": {"messages": QUESTION, "answers": "one"},
        "answers = [None]": {"messages": QUESTION, "answers": [None]},
    }
    records = rescore(tmp_path, list(rows.values()), lambda row, answers: [1.0] * len(answers))
    expected = "`answers`, a list of texts or of objects with a `text` each; a `text`; or messages that end with them"
    assert [record["error"] for record in records] == [f"found {found}: expected {expected}" for found in rows]
    both = {"messages": answered(["a"]), "answers": ["b"]}
    (record,) = rescore(tmp_path, [both], lambda row, answers: [1.0] * len(answers), "both.json")
    found = "found answers and a dialog that ends with a list of answers"
    assert record["error"] == f"{found}: expected one of them"


@pytest.mark.parametrize("returned", [[1.0], [1.0] * 5, []])
def test_a_wrong_number_of_scores_is_an_error_of_the_row(demo, tmp_path, returned):
    calls = []

    def scorer(row, answers):
        calls.append(len(answers))
        return returned

    (record,) = rescore(tmp_path, [{"messages": answered(list("abcd"))}], scorer)
    found = f"{len(returned)} score{'' if len(returned) == 1 else 's'} for 4 answers: expected one for each"
    assert record["scores"] == [None] * 4 and {a["error"] for a in record["answers"]} == {found}
    assert calls == [4]


def test_rollouts_are_drawn_whole_and_each_is_scored_after_its_own_turns(demo, tmp_path):
    seen = []

    def scorer(row, answers):
        seen.append((row["messages"], [answer["text"] for answer in answers]))
        return [float(len(answers[0]["text"]))]

    (result,) = rejection_sample(demo, [ROLLOUTS], scorer, n=3, **HOT)
    expected = demo.chat_completion([ROLLOUTS], num_return_sequences=3, logprobs=True, **HOT)
    assert [answer["messages"] for answer in result["answers"]] == [rollout["dialog"] for rollout in expected]
    assert len({json.dumps(messages[1]) for messages, _ in seen}) > 1
    assert seen == [(r["dialog"][:-1], [r["generation"]["content"]]) for r in expected]
    for answer, rollout in zip(result["answers"], expected):
        assert answer["logprob"] == pytest.approx(math.fsum(rollout["logprobs"]), abs=1e-4)
    # In portions, from files, and scored again from what was written: the same.
    portions = rejection_sample(demo, [ROLLOUTS], scorer, n=2, threshold=1e9, max_samples=3, **HOT)
    assert [a["text"] for a in portions[0]["answers"]] == [a["text"] for a in result["answers"]]
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "messages": ROLLOUTS, "seed": 4}))
    sample_files(demo, tmp_path / "in.jsonl", tmp_path / "out.json", scorer, Plan(3), "length", **HOT)
    (record,) = json.loads((tmp_path / "out.json").read_text())
    assert [a["messages"] for a in record["answers"]] == [r["dialog"] for r in expected]
    again = rescore(tmp_path, [record], Logprob(demo), "again.json")
    for answer, rollout in zip(again[0]["answers"], expected):
        ids = prompt_ids(demo, {"messages": rollout["dialog"][:-1]}), demo.tokenizer.encode(answer["text"])
        (scores,) = demo.score_tokens([(ids[0] + ids[1], len(ids[0]))])
        assert answer["score"] == pytest.approx(math.fsum(scores.logprobs), abs=1e-4)


def test_the_scorers_of_the_command_line_have_the_same_names_in_python(demo, monkeypatch, tmp_path):
    options = {"n": 2, **HOT}
    (by_name,) = rejection_sample(demo, ["One day"], "mean_logprob", **options)
    (by_hand,) = rejection_sample(demo, ["One day"], Logprob(demo, mean=True), **options)
    assert by_name["scores"] == pytest.approx(by_hand["scores"], abs=1e-4)
    (tmp_path / "lengths.py").write_text("def f(row, answers):\n    return [len(a['text']) for a in answers]\n")
    monkeypatch.chdir(tmp_path)
    (found,) = rejection_sample(demo, ["One day"], "lengths:f", **options)
    assert found["scores"] == [len(answer["text"]) for answer in found["answers"]]
    (tmp_path / "in.json").write_text('[{"prompt": "One day"}]')
    for name in ("lengths:f", "mean_logprob"):
        sample_files(demo, tmp_path / "in.json", tmp_path / f"{name[0]}.json", name, Plan(2), name, **HOT)
        assert None not in json.loads((tmp_path / f"{name[0]}.json").read_text())[0]["scores"]
    assert rescore(tmp_path, [{"prompt": "x", "answers": ["ab"]}], "lengths:f", "named.json")[0]["scores"] == [2.0]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("logprobs", "scorer 'logprobs': expected one of logprob, mean_logprob, reward:DIR, judge, judge:DIR or "),
        ("reward:/nowhere", "scorer 'reward:/nowhere': there is no directory /nowhere"),
        ("wrong:f", r"scorer 'wrong:f': wrong fails \(SyntaxError: .*wrong.py, line 1"),
        ("needs:f", r"scorer 'needs:f': needs fails \(ModuleNotFoundError: No module named 'not_there'\)"),
        ("wrong.py:f", "scorer 'wrong.py:f': a module is named without .py: expected wrong:f"),
        (5, r"scorer = 5: expected a function \(row, answers\), or one of logprob, mean_logprob"),
        (None, "scorer = None: expected a function"),
    ],
)
def test_a_wrong_scorer_is_refused_before_anything_is_drawn(demo, monkeypatch, tmp_path, scorer, message):
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "needs.py").write_text("import not_there\n")
    (tmp_path / "in.json").write_text('[{"prompt": "One day"}]')
    monkeypatch.chdir(tmp_path)
    before = demo.answerer.shared.engine.counters.prefilled
    calls = [
        lambda: rejection_sample(demo, ["One day"], scorer, n=2),
        lambda: sample_files(demo, "in.json", "out.json", scorer, Plan(2), "x"),
        lambda: rescore_files("in.json", "out.json", scorer, Plan(2), "x"),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
            call()
    with pytest.raises(ValueError, match="scorer 'logprob' needs a model: expected a function"):
        rescore_files("in.json", "out.json", "logprob", Plan(2), "x")
    with pytest.raises(TypeError, match="num_samples has no part in rejection sampling: n says how many answers"):
        rejection_sample(demo, ["One day"], "logprob", num_samples=4)
    assert demo.answerer.shared.engine.counters.prefilled == before and not (tmp_path / "out.json").exists()
