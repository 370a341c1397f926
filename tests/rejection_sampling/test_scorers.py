"""Scorers: each against the slow obvious way, and answers that cannot be scored."""

import json
import math
import sys

import pytest
import torch
from conftest import DEMO, random_model, ranks, write_byte_tokenizer
from test_huggingface import SHAPE

from llama import Tokenizer
from llama.rejection_sampling.reward_model import RewardModel, RewardTransformer
from llama.rejection_sampling.scorers import JUDGE_TEMPLATE, Judge, Logprob, Reward, python_function, score_answers

ROW = {"messages": [{"role": "user", "content": "What is 21 + 34?"}]}
TEXTS = ["55", "Ones: 1 + 4 = 5. Tens: 2 + 3 = 5. So 21 + 34 = 55.", "I do not know."]


def answers(*texts):
    return [{"text": text, "finish_reason": "stop"} for text in texts]


def logprob_after(llama, prompt, ids):
    """The slow obvious way: the prompt and the ids as one text."""
    return math.fsum(llama.score([prompt + ids])[0]["logprobs"][len(prompt) :])


@pytest.mark.parametrize("row", [ROW, {"prompt": "Once upon a time"}, {"tokens": [5, 6, 7]}])
def test_a_logprob_is_that_of_the_answers_tokens_after_the_prompt(demo, row):
    if "messages" in row:
        prompt = demo.formatter.encode_dialog_prompt(row["messages"])
    else:
        prompt = row.get("tokens") or demo.tokenizer.encode(row["prompt"], bos=True)
    texts = [demo.tokenizer.encode(text) for text in TEXTS]
    expected = [logprob_after(demo, prompt, ids) for ids in texts]
    assert Logprob(demo)(row, answers(*TEXTS)) == pytest.approx(expected, abs=1e-3)
    means = [total / len(ids) for total, ids in zip(expected, texts)]
    assert Logprob(demo, mean=True)(row, answers(*TEXTS)) == pytest.approx(means, abs=1e-4)


def test_the_logprob_of_a_drawn_answer_is_not_computed_again(demo):
    drawn = [{"text": "x", "logprob": -12.0, "n_tokens": 4}, {"text": "", "logprob": 0.0, "n_tokens": 0}]
    assert Logprob(demo)(ROW, drawn) == [-12.0, 0.0]
    assert Logprob(demo, mean=True)(ROW, drawn[:1]) == [-3.0]


@pytest.mark.parametrize("known", [{}, {"logprob": 0.0, "n_tokens": 0}])
def test_an_answer_without_tokens_has_no_mean_logprob(demo, known):
    empty = answers("")[0] | known
    (mean, none), (missing, error) = score_answers(Logprob(demo, mean=True), ROW, [*answers("55"), empty])
    assert mean < 0 and none is None
    assert missing is None and error == "ValueError: the answer has no tokens, and so no mean: expected one or more"
    assert Logprob(demo)(ROW, [empty]) == [0.0]


@pytest.mark.parametrize("verdict", ["Yes", "Yes, it is certainly"])
def test_a_judges_score_is_the_logprob_of_its_verdict(demo, verdict):
    judge, tokens = Judge(demo, verdict=verdict), demo.tokenizer.encode(verdict)
    expected = []
    for text in TEXTS:
        content = JUDGE_TEMPLATE.replace("{prompt}", "What is 21 + 34?").replace("{answer}", text)
        prompt = demo.formatter.encode_dialog_prompt([{"role": "user", "content": content}])
        expected.append(logprob_after(demo, prompt, tokens))
    assert judge(ROW, answers(*TEXTS)) == pytest.approx(expected, abs=1e-3)
    assert len(set(expected)) == 3


def test_a_judge_reads_the_common_beginning_of_its_prompts_once(demo):
    judge, texts = Judge(demo), [f"answer {i}" for i in range(6)]
    before = demo._engine.counters.prefilled
    judge({"prompt": "A long question. " * 10}, answers(*texts))
    n_prompt = len(demo.tokenizer.encode(JUDGE_TEMPLATE + "A long question. " * 10))
    assert demo._engine.counters.prefilled - before < n_prompt + 5 * 40


def test_the_prompt_of_sixteen_answers_is_run_once(demo):
    row, texts = {"prompt": "A long story. " * 20}, [f"answer {i}, and so on" for i in range(16)]
    n_prompt = len(demo.tokenizer.encode(row["prompt"], bos=True))
    n_texts = sum(len(demo.tokenizer.encode(text)) for text in texts)
    before = demo._engine.counters.prefilled
    scores = Logprob(demo)(row, answers(*texts))
    # Each answer runs all but its last token, after the prompt's last token, whose logits give its first token.
    assert demo._engine.counters.prefilled - before <= n_prompt + n_texts < 16 * n_prompt / 2
    assert len(set(scores)) == 16


def test_a_template_is_filled_once_and_text_in_it_is_text(demo, monkeypatch):
    asked = []
    judge = Judge(demo, 'A dialog: {prompt}\nWhat came of it: {answer}\n{"json": {}}')
    encode = demo.formatter.encode_dialog_prompt
    monkeypatch.setattr(demo.formatter, "encode_dialog_prompt", lambda dialog: asked.append(dialog) or encode(dialog))
    dialog = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is {answer}?"}]
    judge({"messages": dialog}, answers("{prompt}"))
    expected = "A dialog: System: Be brief.\n\nUser: What is {answer}?\nWhat came of it: {prompt}\n" + '{"json": {}}'
    assert asked == [[{"role": "user", "content": expected}]]


def test_a_judge_that_cannot_judge_is_refused(demo):
    with pytest.raises(ValueError, match=r"template has no \{answer\}: expected \{answer\}, and \{prompt\}"):
        Judge(demo, "Is {prompt} right?")
    with pytest.raises(ValueError, match="verdict is empty"):
        Judge(demo, verdict="")


def test_an_answer_with_no_room_for_the_judges_verdict_is_marked(demo):
    long = "word " * 600
    (score, none), (missing, error) = score_answers(Judge(demo), ROW, answers("55", long))
    assert math.isfinite(score) and none is None
    assert missing is None and "expected at most max_seq_len = 512" in error
    ((missing, error),) = score_answers(Judge(demo, verdict="yes " * 400), ROW, answers("55"))
    assert missing is None and "a continuation of" in error and "513 together at most" in error


@pytest.fixture
def reward_model(tmp_path):
    model = RewardTransformer(random_model(**SHAPE).args)
    model.init_weights(0.1, torch.Generator().manual_seed(0))
    write_byte_tokenizer(tmp_path / "tokenizer.model")
    return RewardModel(model, Tokenizer(tmp_path / "tokenizer.model"))


def test_a_reward_is_the_models_score_of_the_prompt_and_the_answer(reward_model):
    for row in (ROW, {"prompt": "21 + 34 = "}):
        prompt = row.get("messages") or row["prompt"]
        expected = [reward_model.score([reward_model.encode(prompt, text)])[0] for text in TEXTS]
        assert Reward(reward_model)(row, answers(*TEXTS)) == pytest.approx(expected, abs=1e-5)


def test_a_row_of_token_ids_has_no_reward_and_says_so(reward_model):
    ((score, error),) = score_answers(Reward(reward_model), {"tokens": [1, 2]}, answers("55"))
    assert score is None and "the line has only token ids, and this scorer reads text: give the line" in error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "found none of prompt, messages, tokens: expected one of them"),
        ({"prompt": 5}, "prompt = 5: expected a text"),
        ({"messages": 5}, "a dialog is a list of one or more messages, the last of them the user's; found int"),
        ({"messages": [{"content": "x"}]}, "message 0 of the dialog has no 'role'"),
    ],
)
def test_every_scorer_refuses_a_wrong_prompt(demo, reward_model, row, message):
    for scorer in (Judge(demo), Reward(reward_model), Logprob(demo)):
        ((score, error),) = score_answers(scorer, row, answers("55"))
        assert score is None and f"ValueError: {message}" in error


def test_a_function_is_found_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_scorers.py").write_text("def length(row, answers): return [len(a['text']) for a in answers]\nx = 3")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert python_function("my_scorers:length")({}, answers("abc", "")) == [3, 0]
    assert sys.path == path
    with pytest.raises(ValueError, match=r"my_scorers.py has a int: expected a function \(row, answers\)"):
        python_function("my_scorers:x")
    with pytest.raises(ValueError, match=r"my_scorers.py has no such name"):
        python_function("my_scorers:y")
    with pytest.raises(ValueError, match=r"there is no module 'nowhere.at_all' in the current directory or installed"):
        python_function("nowhere.at_all:f")
    for spec in ("sys:foo", "builtins:zz"):  # which lie in no file
        with pytest.raises(ValueError, match=f"the module {spec.split(':')[0]} has no such name: expected a function"):
            python_function(spec)
    for spec in (".my_scorers:length", "my_scorers.:length", ":f"):
        with pytest.raises(ValueError, match=r"expected module:function, with the module's full name"):
            python_function(spec)
    (tmp_path / "broken_scorers.py").write_text("import nothing_of_that_name")
    with pytest.raises(ValueError, match=r"broken_scorers fails \(ModuleNotFoundError: .*nothing_of_that_name"):
        python_function("broken_scorers:f")


def test_only_the_answers_that_cannot_be_scored_are_marked():
    def scorer(row, answers):
        return [1 / len(a["text"]) for a in answers]

    marks = score_answers(scorer, {}, answers("ab", "", "abcd"))
    assert marks == [(0.5, None), (None, "ZeroDivisionError: division by zero"), (0.25, None)]
    assert score_answers(scorer, {}, []) == []


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([math.nan, 1], "ValueError: the scorer returned nan: expected a finite number"),
        ([math.inf, 1], "the scorer returned inf"),
        (["0.5", 1], "TypeError: the scorer returned '0.5': expected a number"),
        ([None, 1], "the scorer returned None: expected a number"),
        (0.5, "TypeError: the scorer returned 0.5: expected a list with a number for each answer"),
    ],
)
def test_only_finite_numbers_are_scores(returned, message):
    calls = []

    def scorer(row, answers):
        calls.append(len(answers))
        if len(answers) == 2:
            return returned
        return returned[:1] if isinstance(returned, list) else 0.5

    (score, error), _ = score_answers(scorer, {}, answers("a", "b"))
    assert score is None and calls == [2, 1, 1]
    assert message in error


def test_scores_may_be_tensors_and_bools():
    assert score_answers(lambda row, a: torch.tensor([0.5, 2]), {}, answers("a", "b")) == [(0.5, None), (2.0, None)]
    assert score_answers(lambda row, a: [True, False], {}, answers("a", "b")) == [(1.0, None), (0.0, None)]


def test_a_scorer_that_changes_its_arguments_changes_only_its_scores():
    def scorer(row, answers):
        row["metadata"].clear()
        for answer in answers:
            answer["text"] = answer.pop("text").strip()
        answers.append("more")
        return [len(a["text"]) for a in answers[:-1]]

    row, given = {"metadata": {"sum": 3}}, answers(" a ", "bc")
    assert score_answers(scorer, row, given) == [(1.0, None), (2.0, None)]
    assert row == {"metadata": {"sum": 3}} and given == answers(" a ", "bc")


def test_a_scorer_that_exits_marks_its_answer_and_ctrl_c_ends_the_run():
    assert score_answers(lambda row, answers: sys.exit("no"), {}, answers("a")) == [(None, "SystemExit: no")]

    def interrupted(row, answers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_answers(interrupted, {}, answers("a"))


def test_running_out_of_memory_ends_the_run():
    def scorer(row, answers):
        raise MemoryError

    with pytest.raises(MemoryError):
        score_answers(scorer, {}, answers("a", "b"))


SCRIPT = """
import json, os, sys
import torch.distributed as dist
from llama import Llama
from llama.rejection_sampling.scorers import Judge, score_answers
llama = Llama.build(sys.argv[1], max_seq_len=512, device="cpu", dtype="float32")
group = llama.model.tok_embeddings.group
answers = [{"text": str(i)} for i in range(3)]
own = lambda row, answers: [float(dist.get_rank()) for _ in answers]
marks = [score_answers(own, {}, answers, group), score_answers(Judge(llama), {"prompt": "one?"}, answers, group)]
every = [None] * dist.get_world_size()
dist.all_gather_object(every, marks)
print(json.dumps(every))
"""


def test_the_ranks_of_a_model_agree_on_the_scores_whatever_the_scorer_does(tmp_path, demo):
    (tmp_path / "script.py").write_text(SCRIPT)
    result = ranks(2, tmp_path / "script.py", DEMO)
    assert result.returncode == 0, result.stderr
    first, second = json.loads(result.stdout.splitlines()[-1])
    assert first == second and first[0] == [[0.0, None]] * 3
    alone = score_answers(Judge(demo), {"prompt": "one?"}, [{"text": str(i)} for i in range(3)])
    assert [score for score, _ in first[1]] == pytest.approx([score for score, _ in alone], abs=1e-3)
