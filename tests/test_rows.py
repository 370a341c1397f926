"""Data files: what is read of them, and what is said of a broken row."""

import json

import pytest

from llama.rows import Row, Rows, scan


def write(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_json_lines_are_read_with_their_numbers_and_ids_and_broken_ones_break_no_other(tmp_path):
    lines = ['\ufeff{"id": "a", "prompt": "x\u2028y"}', "", '{"prompt": "no id"}', '{"id": 1', "[1]", "{" * 200_000]
    content = "\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n{"id": 1.5, "prompt": "x"}\n{"id": 0}'
    rows = list(Rows(write(tmp_path / "in.jsonl", content)))
    assert rows[:2] == [Row(1, "a", {"prompt": "x\u2028y"}), Row(3, 3, {"prompt": "no id"})]
    assert [(row.number, row.id) for row in rows[2:]] == [(4, None), (5, None), (6, None), (7, None), (8, None), (9, 0)]
    assert "not JSON: Expecting ',' delimiter" in rows[2].error
    assert rows[3].error == "a list: expected an object, {…}"
    assert "not JSON" in rows[4].error and "not UTF-8" in rows[5].error
    assert rows[6].error == "id = 1.5: expected a string or an integer"


def test_csv_cells_are_text_but_for_the_columns_of_json_and_an_empty_one_is_no_field(tmp_path):
    content = '\ufeffid,prompt,temperature,stop\n007,"two\nlines, ""one"" text",0.5,END\n,12,,"[""a""]"\nx,y\n'.encode()
    rows = list(Rows(write(tmp_path / "in.csv", content + b"z,\xff,,\n"), {"temperature", "stop"}))
    assert rows[0] == Row(1, "007", {"prompt": 'two\nlines, "one" text', "temperature": 0.5, "stop": "END"})
    assert rows[1] == Row(2, 2, {"prompt": "12", "stop": ["a"]})
    assert rows[2].error == "2 cells: expected 4, as in the first line"
    assert rows[3].error == "not UTF-8"


def test_parquet_rows_are_read_without_their_nulls(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": ["a", None], "messages": [[{"role": "user", "content": "hi"}], None], "n": [None, 2]})
    parquet.write_table(table, tmp_path / "in.parquet")
    rows = list(Rows(tmp_path / "in.parquet"))
    assert rows == [Row(1, "a", {"messages": [{"role": "user", "content": "hi"}]}), Row(2, 2, {"n": 2})]


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*in.jsonl"):
        Rows(tmp_path / "in.jsonl")
    with pytest.raises(ValueError, match=r"in.txt: expected a name that ends in .jsonl, .ndjson, .csv, .parquet"):
        Rows(write(tmp_path / "in.txt", "{}"))
    with pytest.raises(ValueError, match=r"column names, each once; found \['a', 'a'\]"):
        list(Rows(write(tmp_path / "in.csv", "a,a\n1,2\n")))
    with pytest.raises(ValueError, match=r"in.csv, line 2: field larger than field limit"):
        list(Rows(write(tmp_path / "in.csv", "a\n" + "x" * 200_000 + "\n")))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "a"], "line 3 has the id 'a', and so has line 1"),
        ([3, "x", None], "line 3 has the id 3, and so has"),
    ],
)
def test_an_id_twice_is_refused_with_both_lines(tmp_path, ids, message):
    lines = [json.dumps({"id": id, "prompt": "x"}) + "\n" for id in ids]
    with pytest.raises(ValueError, match=message):
        scan(Rows(write(tmp_path / "in.jsonl", "".join(lines))))


def test_a_broken_row_takes_no_id_from_another(tmp_path):
    rows = Rows(write(tmp_path / "in.jsonl", '{"id": 0}\n{broken\n{"id": 2}\n'))
    assert scan(rows).n_rows == 3
    assert scan(rows, 2).digest_of_first == scan(list(rows)[:2]).digest != scan(rows).digest
