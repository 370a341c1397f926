"""Data files: what is read of them, and what is said of a broken row."""

import datetime
import json
from decimal import Decimal

import pytest

from llama.datasets.rows import Row, Rows, scan
from llama.options import DecodingOptions, from_json


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


def test_a_stray_quote_in_a_csv_file_breaks_its_own_row_and_changes_no_text(tmp_path):
    bad = ['"a" b,1', '"said ""x"" "and" left",2', '"5" disk",3', "x" * 200_000 + ",4"]
    lines = ["text,n", '5" disk,0', *(line for row in bad for line in (row, f'"fine, {row[-1]} ""x""",1'))]
    rows = list(Rows(write(tmp_path / "in.csv", "\n".join(lines)), {"n"}))
    assert rows[0] == Row(1, 1, {"text": '5" disk', "n": 0})
    assert [row.fields for row in rows[2::2]] == [{"text": f'fine, {n} "x"', "n": 1} for n in (1, 2, 3, 4)]
    stray = "',' expected after '\"': expected \"\" for each quote in a quoted cell"
    assert [row.error for row in rows[1:6:2]] == [f"no CSV at line {n}, {stray}" for n in (3, 5, 7)]
    assert "no CSV at line 9, field larger than field limit" in rows[7].error
    assert [row.number for row in rows] == list(range(1, 10))
    lines[2] = lines[2].replace("a", "c")
    assert scan(Rows(write(tmp_path / "in.csv", "\n".join(lines)), {"n"})).digest != scan(rows).digest


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('"said "x\nand left",3', "line 4: a quote in a cell that is not quoted, so that it cannot be told where rows"),
        ('"said "x\nand, so on\n",3\n"d",4', "line 5: ',' expected after"),
        ('"a"b,"two\nlines"', "line 4: a quote in a cell"),
        ('5" disk,"x', "line 3: a quote opens a cell and none closes it, so that"),
        ('a,"5 inch\n"b",1', "line 3: ',' expected after '\"', so that"),
    ],
)
def test_a_csv_file_in_which_a_row_has_no_certain_end_is_refused_with_its_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=r"in.csv, ") as caught:
        list(Rows(write(tmp_path / "in.csv", f"text,n\na,0\n{row}\nc,2\n")))
    assert message in str(caught.value)


def test_a_line_nested_too_deep_breaks_no_other(tmp_path):
    # By Python's own limits the first would be read, and then end the run wherever it is walked.
    lines = [f'{{"metadata": {"[" * n}NaN{"]" * n}}}' for n in (400, 90, 50_000)]
    rows = list(Rows(write(tmp_path / "in.jsonl", "\n".join(lines))))
    assert [row.error for row in rows] == ["nested deeper than 100 levels", None, "nested deeper than 100 levels"]
    assert scan(rows).n_rows == 3
    (row,) = Rows(write(tmp_path / "in.csv", f"metadata\n{'[' * 400 + ']' * 400}\n"), {"metadata"})
    assert row.fields == {"metadata": "[" * 400 + "]" * 400}  # no JSON of ours: text


def test_parquet_rows_are_read_without_their_nulls(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": ["a", None], "messages": [[{"role": "user", "content": "hi"}], None], "n": [None, 2]})
    parquet.write_table(table, tmp_path / "in.parquet")
    rows = list(Rows(tmp_path / "in.parquet"))
    assert rows == [Row(1, "a", {"messages": [{"role": "user", "content": "hi"}]}), Row(2, 2, {"n": 2})]


def test_values_of_parquet_files_are_those_of_json_and_bytes_break_their_row_only(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    day = datetime.datetime(2024, 2, 29, 12, 30)
    columns = {
        "id": [Decimal(7), Decimal(8)],
        "temperature": [Decimal("0.5"), None],
        "metadata": [{"day": day.date(), "at": [day, None], "time": day.time()}, None],
        "image": [None, b"\x89PNG"],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    first, second = Rows(tmp_path / "in.parquet")
    metadata = {"day": "2024-02-29", "at": ["2024-02-29T12:30:00", None], "time": "12:30:00"}
    assert first == Row(1, 7, {"temperature": 0.5, "metadata": metadata})
    assert json.loads(json.dumps(first.fields)) == first.fields and isinstance(first.id, int)
    assert second.id is None and second.error.startswith("column 'image': found bytes, which JSON does not have")
    assert scan([first, second]).n_rows == 2


def test_a_damaged_parquet_file_is_refused_by_its_name(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"a": [1, 2]}), tmp_path / "in.parquet")
    sound = (tmp_path / "in.parquet").read_bytes()
    for content in (b"", b"no Parquet", sound[:4] + b"\xff" * 60 + sound[64:]):
        with pytest.raises(ValueError, match=r"in.parquet cannot be read as Parquet: "):
            list(Rows(write(tmp_path / "in.parquet", content)))


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*in.jsonl"):
        Rows(tmp_path / "in.jsonl")
    with pytest.raises(ValueError, match=r"in.txt: expected a name that ends in .jsonl, .ndjson, .csv, .parquet"):
        Rows(write(tmp_path / "in.txt", "{}"))
    with pytest.raises(ValueError, match=r"column names, each once; found \['a', 'a'\]"):
        list(Rows(write(tmp_path / "in.csv", "a,a\n1,2\n")))
    with pytest.raises(ValueError, match=r"each once; found no CSV at line 1, ',' expected after '\"'"):
        list(Rows(write(tmp_path / "in.csv", '"a"b\n1\n')))


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


def test_what_pandas_makes_of_integers_and_of_its_index_is_understood(tmp_path):
    (row, _) = Rows(write(tmp_path / "in.csv", "max_gen_len,x\n5.0,a\n,b\n"), {"max_gen_len"})
    options = from_json({"max_gen_len": row.fields["max_gen_len"]})
    assert DecodingOptions(**options).max_gen_len == 5  # which refuses 5.0
    row, broken = Rows(write(tmp_path / "in.jsonl", '{"id": 3.0}\n{"id": 2.5}\n'))
    assert row.id == 3 and broken.error == "id = 2.5: expected a string or an integer"
    with pytest.raises(ValueError, match=r"each once; found \['', 'prompt'\] \(pandas writes .* index=False\)\)"):
        list(Rows(write(tmp_path / "in.csv", ",prompt\n0,x\n")))


def test_a_directory_is_no_file_of_rows(tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(FileNotFoundError, match=r"d.jsonl is a directory: expected a file of rows"):
        Rows(tmp_path / "d.jsonl")


def test_a_broken_row_takes_no_id_from_another(tmp_path):
    rows = Rows(write(tmp_path / "in.jsonl", '{"id": 0}\n{broken\n{"id": 2}\n'))
    assert scan(rows).n_rows == 3
    assert scan(rows, 2).digest_of_first == scan(list(rows)[:2]).digest != scan(rows).digest
