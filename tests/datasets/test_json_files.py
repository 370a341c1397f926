"""Rows in JSON arrays and pretty-printed JSON, answers in them, and rows through standard streams."""

import io
import json
import sys

import pytest

from llama.cli import commands as cli
from llama.datasets import Journal, Row, Rows, run_batch_files

ROWS = [{"id": "a", "prompt": "One day"}, {"id": "b", "prompt": "The fox", "metadata": {"n": [1, 2]}}]


def records(path):
    return {record["id"]: record for record in json.loads(path.read_text())}


@pytest.mark.parametrize("name", ["in.json", "in.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=4),
        "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
        "\ufeff\n" + json.dumps(ROWS, indent=2),
        "\n\n".join(json.dumps(row, indent=2) for row in ROWS),
        "\n".join(json.dumps(row).replace(", ", ",\n ") for row in ROWS),
    ],
)
def test_an_array_and_pretty_printed_objects_are_read_as_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert [(row.number, row.id, row.fields, row.error) for row in Rows(tmp_path / name)] == [
        (number, row["id"], {k: v for k, v in row.items() if k != "id"}, None) for number, row in enumerate(ROWS, 1)
    ]


def test_an_element_that_is_no_row_breaks_no_other(tmp_path):
    deep = "[" * 200 + "]" * 200
    (tmp_path / "in.json").write_text(f'[{{"prompt": "x"}}, 5, {{"prompt": {deep}}}]')
    errors = [row.error for row in Rows(tmp_path / "in.json")]
    assert errors == [None, "a int: expected an object, {…}", "nested deeper than 100 levels"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', r"in.json: not JSON: Expecting value at line 3 column 7: expected an array of "),
        ('[{"a": 1}', r"in.json: not JSON: Expecting ',' delimiter at line 1 column 10"),
        ('{"a": 1} nonsense', r"in.json: not JSON: Expecting value at line 1 column 10"),
        ("[" * 100_000, r"in.json: the value at character 0 is nested too deeply"),
        (b'["\xff"]', r"in.json: not UTF-8"),
    ],
)
def test_a_broken_array_is_refused_before_anything_runs_with_its_line(demo, tmp_path, text, message):
    (tmp_path / "in.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        run_batch_files(demo, tmp_path / "in.json", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_a_first_line_that_is_cut_off_breaks_no_other(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x",\n{"prompt": "y"}\n')
    assert [row.error is None for row in Rows(tmp_path / "in.jsonl")] == [False, True]


def test_a_broken_line_has_one_number(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n{"prompt" "y"}\n')
    assert [row.error for row in Rows(tmp_path / "in.jsonl")][1] == "not JSON: Expecting ':' delimiter at character 11"


@pytest.mark.parametrize(("indent", "line"), [(None, '{"id": "a", "line": 1, '), (2, '    "id": "a",')])
def test_an_array_of_answers_is_in_the_order_of_the_rows_in_folders_that_are_made(demo, tmp_path, indent, line):
    (tmp_path / "in.json").write_text(json.dumps(ROWS))
    target = tmp_path / "new" / "folders" / "out.json"
    run_batch_files(demo, tmp_path / "in.json", target, max_gen_len=4, indent=indent)
    assert any(shown.startswith(line) for shown in target.read_text().splitlines())
    assert list(records(target)) == ["a", "b"] and records(target)["b"]["metadata"] == {"n": [1, 2]}
    lines = (target.parent / "out.json.jsonl").read_text().splitlines()
    assert {r["id"]: r for r in map(json.loads, lines)} == records(target)
    before = target.read_bytes()
    run_batch_files(demo, tmp_path / "in.json", target, max_gen_len=4, indent=indent)  # nothing is left to do
    assert target.read_bytes() == before


def test_an_indent_without_an_array_and_out_of_range_are_refused(demo, tmp_path):
    (tmp_path / "in.json").write_text(json.dumps(ROWS))
    for target, indent, message in (
        ("o.jsonl", 2, "indent = 2 for .*o.jsonl: expected a target"),
        ("o.json", -1, "16"),
        ("-", 2, "indent = 2 for -: expected a target whose name ends in .json"),
    ):
        with pytest.raises(ValueError, match=message):
            run_batch_files(demo, tmp_path / "in.json", target if target == "-" else tmp_path / target, indent=indent)
    with pytest.raises(SystemExit):
        cli.main(["batch", str(tmp_path / "in.json"), str(tmp_path / "o.csv"), "--indent", "2"])


def test_a_corrected_input_needs_no_force_as_long_as_no_row_had_an_answer(demo, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"promt": "One day"}\n')
    assert run_batch_files(demo, source, target, max_gen_len=3).n_failed == 1
    source.write_text('{"prompt": "One day"}\n')
    summary = run_batch_files(demo, source, target, max_gen_len=3)
    assert (summary.n_lines, summary.n_done, summary.n_failed) == (1, 1, 0)
    assert len(target.read_text().splitlines()) == 1
    source.write_text('{"prompt": "Another day"}\n')
    with pytest.raises(ValueError, match="the first line of the input has changed"):
        run_batch_files(demo, source, target, max_gen_len=3)


@pytest.mark.parametrize(
    ("record", "is_kept"),
    [
        ({"text": "", "error": "no prompt"}, False),
        ({"text": "", "error": "the second turn failed", "turns": [{"text": "It is 55."}, {"text": ""}]}, True),
        ({"text": "", "error": "one of two failed", "answers": [{"text": "It is 55."}, {"text": ""}]}, True),
        ({"text": "It is"}, True),
    ],
)
def test_an_output_with_a_part_of_an_answer_is_not_started_over(tmp_path, record, is_kept):
    rows = [Row(1, 1, {"prompt": "a"})]
    with Journal(tmp_path / "out.jsonl", rows, {"seed": 1}) as journal:
        journal.append({"id": 1, "line": 1, **record})
    before = (tmp_path / "out.jsonl").read_text()
    if is_kept:
        with pytest.raises(ValueError, match="seed was 1, and is 2"):
            Journal(tmp_path / "out.jsonl", rows, {"seed": 2})
        assert (tmp_path / "out.jsonl").read_text() == before
    else:
        with Journal(tmp_path / "out.jsonl", rows, {"seed": 2}) as journal:
            assert not journal.done


def test_a_batch_reads_and_writes_standard_streams(monkeypatch, capsys):
    lines = [*map(json.dumps, ROWS), "broken"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    cli.main(["batch", "-", "-", "--max_gen_len", "3", "--device", "cpu"])
    shown = capsys.readouterr()
    found = {record["line"]: record for record in map(json.loads, shown.out.splitlines())}
    assert sorted(found) == [1, 2, 3] and found[1]["id"] == "a" and found[2]["answer_tokens"] == 3
    assert "not JSON" in found[3]["error"] and "3 of 3 lines done, 1 of them failed" in shown.err
