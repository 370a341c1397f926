"""Data files: their rows, and the error of a broken row."""

import csv
import datetime
import io
import json
import random
import sys
from decimal import Decimal

import pytest

from llama.datasets import tables
from llama.datasets.journal import check_target
from llama.datasets.prompts import from_json
from llama.datasets.rows import Row, Rows, scan
from llama.options import DecodingOptions


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
    rows = list(Rows(write(tmp_path / "in.csv", content + b"z,\xff,,\n\xff\n"), {"temperature", "stop"}))
    assert rows[0] == Row(1, "007", {"prompt": 'two\nlines, "one" text', "temperature": 0.5, "stop": "END"})
    assert rows[1] == Row(2, 2, {"prompt": "12", "stop": ["a"]})
    assert rows[2].error == "2 cells: expected 4, as in the first line"
    assert rows[3].error == "not UTF-8"
    assert rows[4].error == "1 cells: expected 4, as in the first line"


def test_csv_cells_are_never_converted_to_another_type(tmp_path):
    texts = [
        "007",
        "1e5",
        "true",
        "NaN",
        "null",
        "N/A",
        "2024-02-29",
        " x ",
        '5" disk',
        "it's",
        "a\tb",
        "é\u2028",
        "\0",
    ]
    content = "text,other\n" + "".join(f"{text},x\n" for text in texts)
    assert [row.fields["text"] for row in Rows(write(tmp_path / "in.csv", content))] == texts
    for end in ("\r\n", "\r"):
        content = end.join(["text,other", *(f'"{text.replace(chr(34), chr(34) * 2)}","x"' for text in texts)])
        assert [row.fields["text"] for row in Rows(write(tmp_path / "in.csv", content))] == texts


def test_csv_rows_are_numbered_in_their_order_the_broken_ones_too_over_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CSV_BLOCK", 64)
    broken, lines = {2, 3, 9, 40, 41, 100}, ["id,text"]
    for number in range(1, 101):
        lines += [f"{number}"] if number in broken else [f'{number},"a\nb ""{number}"""', ""]
    rows = list(Rows(write(tmp_path / "in.csv", "\n".join(lines))))
    assert [row.number for row in rows] == list(range(1, 101))
    assert {row.number for row in rows if row.error == "1 cells: expected 2, as in the first line"} == broken
    assert all(row.id == str(row.number) for row in rows if row.number not in broken)
    assert rows[3].fields == {"text": 'a\nb "4"'}


def test_rows_of_a_csv_file_are_read_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CSV_BLOCK", 4096)
    too_long = "y" * 3 * 4096
    rows = iter(Rows(write(tmp_path / "in.csv", "text\n" + ("x" * 99 + "\n") * 1000 + too_long)))
    assert [next(rows).number for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="cannot be read as CSV with rows of at most"):
        list(rows)


def test_any_csv_is_read_as_pythons_strict_reader_reads_it_or_refused_as_there(tmp_path):
    rng, n_read, n_refused = random.Random(0), 0, 0
    for _ in range(1500):
        content = "a,b\n" + "".join(rng.choices('x",\n', [3, 3, 2, 2], k=rng.randint(1, 14))) + "\n"
        path = write(tmp_path / "in.csv", content)
        try:
            expected = [cells for cells in csv.reader(io.StringIO(content, newline=""), strict=True) if cells][1:]
        except csv.Error:
            n_refused += 1
            with pytest.raises(ValueError, match=r"in.csv, line \d: a "):
                list(Rows(path))
            continue
        n_read += 1
        rows = list(Rows(path))
        assert [row.error is None for row in rows] == [len(cells) == 2 for cells in expected], content
        cells = [[row.fields.get("a", ""), row.fields.get("b", "")] for row in rows if row.error is None]
        assert cells == [pair for pair in expected if len(pair) == 2], content
    assert min(n_read, n_refused) > 300


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('"a" b,1', "line 3: a cell has text after its closing quote, so nobody can tell where rows end"),
        ('"said ""x"" "and" left",2', "line 3: a cell has text after its closing quote"),
        ('"5" disk",3', "line 3: a cell has text after its closing quote"),
        ('"said "x\nand left",3', "line 3: a cell has text after its closing quote"),
        ('"said "x\nand, so on\n",3\n"d",4', "line 3: a cell has text after its closing quote"),
        ('"fine, ""two""\nlines",1\n"a"b,"two\nlines"', "line 5: a cell has text after its closing quote"),
        ('5" disk,"x', "line 3: a quote opens a cell, none closes it"),
        ('a,"5 inch\n"b",1', "line 3: a cell has text after its closing quote"),
        ('a,"', "line 3: a quote opens a cell, none closes it"),
    ],
)
def test_a_csv_file_with_a_stray_quote_is_refused_with_its_line_before_the_first_row(tmp_path, row, message):
    """pyarrow alone would silently drop the quotes, or read the whole rest into one cell."""
    path = write(tmp_path / "in.csv", f"text,n\na,0\n{row}\nc,2\n")
    with pytest.raises(ValueError, match=r"in.csv, line \d") as caught:
        next(iter(Rows(path)))
    assert message in str(caught.value) and 'expected "" for each quote inside a quoted cell' in str(caught.value)


def test_a_quote_in_a_cell_without_quotes_is_text_and_so_are_pairs_of_quotes_in_one_with_them(tmp_path):
    lines = ["text,n", '5" disk,0', '"a, ""b"" c",1', '"""",2', '"",3', 'a ""b"",4', '"x\n,""y""\n",5']
    rows = list(Rows(write(tmp_path / "in.csv", "\n".join(lines)), {"n"}))
    texts = ['5" disk', 'a, "b" c', '"', None, 'a ""b""', 'x\n,"y"\n']
    assert [(row.fields.get("text"), row.fields["n"]) for row in rows] == list(zip(texts, range(6)))


def test_without_pyarrow_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("in.csv", "in.parquet"):
        with pytest.raises(ImportError, match=r"CSV and Parquet files need pyarrow: pip install '\.\[data\]'"):
            next(iter(Rows(write(tmp_path / name, "a\n1\n"))))
        with pytest.raises(ImportError, match=r"need pyarrow"):
            check_target(tmp_path / f"out.{name}")
    check_target(tmp_path / "out.jsonl")


def test_a_line_nested_too_deep_breaks_no_other(tmp_path):
    # Python's own limit would let the first be read, and a later recursion over it would end the run.
    lines = [f'{{"metadata": {"[" * n}NaN{"]" * n}}}' for n in (400, 90, 50_000)]
    rows = list(Rows(write(tmp_path / "in.jsonl", "\n".join(lines))))
    assert [row.error for row in rows] == ["nested deeper than 100 levels", None, "nested deeper than 100 levels"]
    assert scan(rows).n_rows == 3
    (row,) = Rows(write(tmp_path / "in.csv", f"metadata\n{'[' * 400 + ']' * 400}\n"), {"metadata"})
    assert row.fields == {"metadata": "[" * 400 + "]" * 400}  # nested too deep for JSON: text


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


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*in.jsonl"):
        Rows(tmp_path / "in.jsonl")
    with pytest.raises(
        ValueError, match=r"in.doc: expected a name that ends in .jsonl, .ndjson, .json, .csv, .parquet"
    ):
        Rows(write(tmp_path / "in.doc", "{}"))
    with pytest.raises(ValueError, match=r"column names, each once and in UTF-8; found \['a', 'a'\]"):
        list(Rows(write(tmp_path / "in.csv", "a,a\n1,2\n")))
    with pytest.raises(ValueError, match=r"column names, each once and in UTF-8; found \['a', 'ÿ'\]"):
        list(Rows(write(tmp_path / "in.csv", b"a,\xff\n1,2\n")))
    with pytest.raises(ValueError, match=r"in.csv, line 1: a cell has text after its closing quote"):
        list(Rows(write(tmp_path / "in.csv", '"a"b\n1\n')))
    with pytest.raises(ValueError, match=r"in.csv cannot be read as CSV .*: Empty CSV file"):
        list(Rows(write(tmp_path / "in.csv", "")))
    assert list(Rows(write(tmp_path / "in.csv", "a,b\n"))) == []


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


def test_integers_and_an_index_as_pandas_writes_them_are_read(tmp_path):
    (row, _) = Rows(write(tmp_path / "in.csv", "max_gen_len,x\n5.0,a\n,b\n"), {"max_gen_len"})
    options = from_json({"max_gen_len": row.fields["max_gen_len"]})
    assert DecodingOptions(**options).max_gen_len == 5  # 5.0 would be refused
    row, broken = Rows(write(tmp_path / "in.jsonl", '{"id": 3.0}\n{"id": 2.5}\n'))
    assert row.id == 3 and broken.error == "id = 2.5: expected a string or an integer"
    with pytest.raises(
        ValueError, match=r"each once and in UTF-8; found \['', 'prompt'\] \(pandas writes .* index=False\)\)"
    ):
        list(Rows(write(tmp_path / "in.csv", ",prompt\n0,x\n")))


def test_a_directory_is_no_file_of_rows(tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(FileNotFoundError, match=r"d.jsonl is a directory: expected a file of rows"):
        Rows(tmp_path / "d.jsonl")


def test_a_broken_row_takes_no_id_from_another(tmp_path):
    rows = Rows(write(tmp_path / "in.jsonl", '{"id": 0}\n{broken\n{"id": 2}\n'))
    assert scan(rows).n_rows == 3
    assert scan(rows, 2).digest_of_first == scan(list(rows)[:2]).digest != scan(rows).digest
