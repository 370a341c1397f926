"""Several tasks in one file: the task of a line, the metric of each task, and rejection sampling of tasks."""

import json
import math

import pytest

from llama.cli import commands as cli
from llama.datasets import Rows
from llama.datasets.batch import run_batch
from llama.datasets.task_template import Template, report_of
from llama.rejection_sampling import Plan, sample_files

SUM = {"match": r"^\d+ \+", "user": "What is {text}?", "parse": {"regex": r"So .* = (\d+)"}}
SUM |= {"gold": "right", "metric": "accuracy"}
STORY = {"match": "^(One|The) ", "prompt": "{text}", "options": {"max_gen_len": 3}}


def task(metric, **more):
    return Template({"tasks": {"a": {"user": "x", "gold": "right", "metric": metric, **more}}}).tasks["a"]


def test_a_lines_task_is_named_in_it_or_in_a_column_or_found_by_match():
    template = Template({"tasks": {"sum": SUM, "story": STORY, "any": {"user": "{text}", "match": "."}}})
    named = [{"text": "1 + 2"}, {"text": "The fox"}, {"text": "Who?"}, {"n": 5, "task": "story"}]
    assert [template.task_of(fields).name for fields in named] == ["sum", "story", "any", "story"]
    with pytest.raises(ValueError, match="task = None: expected one of 'sum', 'story', 'any', or a text"):
        template.task_of({"n": 5})
    column = Template({"tasks": {"sum": SUM, "story": STORY}, "column": "kind"})
    assert column.task_of({"text": "The fox", "kind": "sum"}).name == "sum"
    with pytest.raises(ValueError, match="kind = 'x': expected one of 'sum', 'story'"):
        column.task_of({"text": "The fox", "kind": "x"})


@pytest.mark.parametrize(
    ("metric", "found", "gold", "expected"),
    [
        ("accuracy", "1,055", 1055, 1),
        ("accuracy", " Yes ", "yes", 1),
        ("accuracy", "55", 56, 0),
        ("exact_match", "Yes", "yes", 0),
        ("exact_match", " yes", "yes", 1),
        ("hit@2", [3, 1, 2], [2, 9], 0),
        ("hit@3", [3, 1, 2], [2, 9], 1),
        ("hit@1", [7], 7, 1),
        ("ndcg@2", [5, 1], [5, 6], 1 / (1 + 1 / math.log2(3))),
        ("ndcg", [1, 2, 3], {"3": 3, "1": 1}, (1 + 3 / 2) / (3 + 1 / math.log2(3))),
        ("ndcg", [3, 1], {"3": 3, "1": 1}, 1),
        ("ndcg", [3], [], 0),
        ("accuracy", None, 5, 0),
    ],
)
def test_the_metrics_have_their_usual_values(metric, found, gold, expected):
    measured = task(metric).measure("", {"parsed": found}, {"right": gold})
    assert measured == {"gold": gold, metric: pytest.approx(expected)}
    if isinstance(gold, (list, dict)):  # as a CSV file has it
        assert task(metric).measure("", {"parsed": found}, {"right": json.dumps(gold)}) == measured


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "accuracy", "gold": None}, "found metric alone: expected both `gold` and `metric`"),
        ({"metric": "hit@0", "gold": "x"}, "metric = 'hit@0': expected accuracy, exact_match, hit@K, ndcg or ndcg@K"),
        ({"metric": "f1", "gold": "x"}, "metric = 'f1'"),
        ({"match": "("}, r"match: '\(' is not a regular expression"),
        ({"match": 5}, "match = 5: expected a regular expression"),
        ({"parse": {"integers": 2, "least": "1"}}, 'expected "integer"'),
    ],
)
def test_a_template_with_a_wrong_metric_gold_or_match_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Template({"tasks": {"a": {"user": "x", **changes}}})
    with pytest.raises(ValueError, match="column = 5: expected the name of a field"):
        Template({"tasks": {"a": {"user": "x"}}, "column": 5})
    with pytest.raises(ValueError, match="the line has no field 'right', the gold of task 'a'"):
        task("accuracy").measure("", {}, {})
    with pytest.raises(ValueError, match=r"right = \{'a': 'b'\}: expected a number for each item"):
        task("ndcg").measure("", {}, {"right": {"a": "b"}})


def test_a_file_of_tasks_gives_a_table_and_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": {"sum": SUM, "story": STORY}}))
    rows = [{"text": "21 + 34", "right": 55}, {"text": "12 + 7", "right": 20}, {"text": "The fox"}, {"text": "1 + 1"}]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    options = "--template tasks.json --temperature 0 --report r.json --device cpu"
    cli.main(["batch", "in.json", "out.jsonl", *options.split()])
    report = {
        "story": {"lines": 1, "failed": 0, "unread": 0},
        "sum": {"lines": 2, "failed": 0, "unread": 0, "accuracy": 0.5},
    }
    unknown = {"(none)": {"lines": 1, "failed": 1, "unread": 0}}  # it has no gold, so the model was not asked
    assert json.loads((tmp_path / "r.json").read_text()) == unknown | report
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].split() == ["sum", "2", "0", "0", "accuracy", "0.5000"]
    records = list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()))
    assert report_of(records) == unknown | report
    assert {r["line"]: r["accuracy"] for r in records if "accuracy" in r} == {1: 1.0, 2: 0.0}
    cli.main(["batch", "in.json", "out.jsonl", *options.replace("r.json", "new/folder/r.json").split()])
    assert (tmp_path / "new" / "folder" / "r.json").read_text() == (tmp_path / "r.json").read_text()
    capsys.readouterr()
    for wrong in ("--report r.json", "--template tasks.json --report .", "--template tasks.json --report in.json"):
        with pytest.raises(SystemExit):
            cli.main(f"batch in.json other.jsonl {wrong}".split())
        assert "llama: --report" in capsys.readouterr().err


def test_sample_takes_a_template_and_the_scorer_finds_the_fields(demo, tmp_path):
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": {"sum": SUM, "story": STORY}}))
    rows = [{"id": "s", "text": "21 + 34", "right": 55, "seed": 5}, {"id": "t", "text": "The fox"}, {"id": "u"}]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    seen = []

    def scorer(row, answers):
        seen.append((row["metadata"], row.get("messages") or row["prompt"]))
        return [float(len(answer["text"])) for answer in answers]

    files = tmp_path / "in.json", tmp_path / "out.json"
    sample_files(demo, *files, scorer, Plan(2), "length", template=tmp_path / "tasks.json", max_gen_len=5)
    first, second, third = json.loads((tmp_path / "out.json").read_text())
    question = [{"role": "user", "content": "What is 21 + 34?"}]
    assert first["messages"] == question and first["seed"] == 5 and len(first["answers"]) == 2
    assert (second["prompt"], {a["n_tokens"] for a in second["answers"]}) == ("The fox", {3})
    assert "task = None: expected one of 'sum', 'story'" in third["error"]
    assert sorted(seen, key=str) == sorted(
        [({"text": "21 + 34", "right": 55}, question), ({"text": "The fox"}, "The fox")], key=str
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "task 'story' of the template: num_beams has no part in rejection sampling"),
        ({"temperature": 0}, "task 'story' of the template: temperature = 0 with n = 2: expected more than 0"),
        ({"top_p": 2}, "task 'story' of the template: top_p = 2: expected a number of at most 1"),
    ],
)
def test_options_of_a_task_that_cannot_be_sampled_are_refused_at_once(demo, tmp_path, options, message):
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": {"sum": SUM, "story": STORY | {"options": options}}}))
    (tmp_path / "in.json").write_text('[{"text": "21 + 34", "right": 55}]')
    files = tmp_path / "in.json", tmp_path / "out.json"
    with pytest.raises(ValueError, match=message):
        sample_files(demo, *files, "logprob", Plan(2), "logprob", template=tmp_path / "tasks.json")
    assert not files[1].exists()


def test_the_metric_of_several_answers_is_their_mean(demo):
    template = {"tasks": {"sum": SUM}}
    row = {"text": "21 + 34", "right": 55, "num_return_sequences": 4, "temperature": 1.8, "top_p": 1.0, "seed": 3}
    (record,) = run_batch(demo, [row], template=template, max_gen_len=60)
    right = [answer["parsed"] == "55" for answer in record["answers"]]
    assert [answer["accuracy"] for answer in record["answers"]] == right and 0 < sum(right) < 4
    assert record["accuracy"] == sum(right) / 4


def test_each_line_of_a_text_file_is_a_prompt(tmp_path):
    (tmp_path / "in.txt").write_bytes("\ufeffOne day\r\n\n  The {fox} \n".encode() + b"\xff\n")
    rows = list(Rows(tmp_path / "in.txt"))
    assert [(row.number, row.fields.get("prompt")) for row in rows] == [(1, "One day"), (3, "  The {fox} "), (4, None)]
    assert "not UTF-8" in rows[2].error


def test_a_gold_field_with_the_name_of_an_option_is_no_option(demo):
    template = {"tasks": {"letters": {"user": "{question}", "gold": "choice", "metric": "accuracy"}}}
    row = {"question": "Which letter?", "choice": ["B"]}
    (record,) = run_batch(demo, [row], template=template, max_gen_len=5, temperature=0)
    assert record["text"] != "B" and record["accuracy"] == 0.0
