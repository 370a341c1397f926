"""Records survive in real files: with locks, kills in the middle of a line, full disks, other inputs."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run_python

from llama.datasets.journal import Journal, check_target, differences
from llama.datasets.rows import Rows

PARAMETERS = {"temperature": 0.6, "model": {"dim": 64}}


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path, 5)


def write_rows(tmp_path, n: int) -> Rows:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": f"r{i}", "prompt": "x"}) + "\n" for i in range(n)))
    return Rows(tmp_path / "in.jsonl")


def answer(journal: Journal, *numbers: int, **more) -> None:
    for number in numbers:
        journal.append({"id": f"r{number - 1}", "line": number, "text": f"text {number}", **more})


def lines(path) -> list[int]:
    return [json.loads(line)["line"] for line in path.read_text().splitlines()]


def test_a_second_run_goes_on_where_the_first_was_cut_off(tmp_path, rows):
    out = tmp_path / "out.jsonl"
    with Journal(out, rows, PARAMETERS) as journal:
        assert journal.n_rows == 5 and journal.done == set()
        answer(journal, 2, 5)
        answer(journal, 1, error="no")
    whole = out.read_bytes()
    for torn in (b'{"id": "r3", "li', b'{"id": "r3", "line": 4}', b"\0\0\0\n\0\0"):
        out.write_bytes(whole + torn)
        with Journal(out, rows, PARAMETERS) as journal:
            assert journal.done == {1, 2, 5} and journal.n_failed == 1
        assert out.read_bytes() == whole
    with Journal(out, rows, PARAMETERS) as journal:
        answer(journal, 3, 4)
    assert lines(out) == [2, 5, 1, 3, 4]


def test_errors_are_tried_again_only_with_retry(tmp_path, rows):
    out = tmp_path / "out.jsonl"
    with Journal(out, rows, PARAMETERS) as journal:
        answer(journal, 1, 3)
        answer(journal, 2, error="no")
    with Journal(out, rows, PARAMETERS, retry=True) as journal:
        assert journal.done == {1, 3} and journal.n_failed == 0
        with pytest.raises(BlockingIOError):  # the new file is locked
            Journal(out, rows, PARAMETERS)
        answer(journal, 2)
    assert lines(out) == [1, 3, 2]


def test_answers_without_a_score_are_tried_again_too(tmp_path, rows):
    out = tmp_path / "out.jsonl"
    with Journal(out, rows, PARAMETERS) as journal:
        answer(journal, 1, scores=[0.5, 1])
        answer(journal, 2, scores=[0.5, None])
    with Journal(out, rows, PARAMETERS) as journal:
        assert journal.done == {1, 2}
    with Journal(out, rows, PARAMETERS, retry=True) as journal:
        assert journal.done == {1}


def test_an_output_of_another_input_or_other_parameters_is_refused_with_what_differs(tmp_path, rows):
    out = tmp_path / "out.jsonl"
    with Journal(out, rows, PARAMETERS) as journal:
        answer(journal, 1)
    before = out.read_bytes()
    other = {"temperature": 0.7, "model": {"dim": 64, "n_layers": 2}}
    with pytest.raises(ValueError, match=r"temperature was 0.6, and is 0.7; model.n_layers was null, and is 2. Choose"):
        Journal(out, rows, other)
    (tmp_path / "in.jsonl").write_text((tmp_path / "in.jsonl").read_text().replace("r4", "r44"))
    with pytest.raises(ValueError, match="the first 5 lines of the input have changed"):
        Journal(out, rows, PARAMETERS)
    with pytest.raises(ValueError, match="the input had 5 lines, and has 4"):
        Journal(out, write_rows(tmp_path, 4), PARAMETERS)
    assert out.read_bytes() == before
    with Journal(out, write_rows(tmp_path, 7), PARAMETERS) as journal:  # new lines at the end are allowed
        assert journal.done == {1} and journal.n_rows == 7
    with Journal(out, rows, other, force=True) as journal:
        assert journal.done == set()
    assert out.read_bytes() == b""


def test_parameters_that_json_and_utf_8_do_not_have_are_the_same_when_read_again(tmp_path, rows):
    parameters = {"logit_bias": {"5": float("-inf")}, "stop": ["\ud800", "é"]}
    for done in (set(), {1}):
        with Journal(tmp_path / "out.jsonl", rows, parameters) as journal:
            assert journal.done == done
            answer(journal, 1) if not done else None


def test_a_file_that_no_run_has_written_is_not_touched(tmp_path, rows):
    out = tmp_path / "out.jsonl"
    out.write_text("my notes\n")
    with pytest.raises(
        ValueError, match=r"out.jsonl is there already, and no out.jsonl.run.json says which run it belongs"
    ):
        Journal(out, rows, PARAMETERS)
    assert out.read_text() == "my notes\n"
    with pytest.raises(ValueError, match="is the input"):
        Journal(tmp_path / "in.jsonl", rows, PARAMETERS, force=True)
    with Journal(out, rows, PARAMETERS, force=True) as journal:
        answer(journal, 1, 2)
    text = out.read_text()
    out.write_text("damaged" + text)
    with pytest.raises(ValueError, match=r"line 1 of .*out.jsonl is not an answer .*: delete that line"):
        Journal(out, rows, PARAMETERS)
    assert out.read_text() == "damaged" + text
    (tmp_path / "out.jsonl.run.json").write_text('{"rows": 5')
    with pytest.raises(ValueError, match=r"out.jsonl.run.json is damaged"):
        Journal(out, rows, PARAMETERS)


@pytest.mark.parametrize("line", ['{"line": [1]}', '{"line": 0}', '{"line": 999}', '{"line": true}', "[1]", "{}"])
def test_a_line_that_answers_no_row_is_refused_and_not_counted_as_done(tmp_path, rows, line):
    out = tmp_path / "out.jsonl"
    with Journal(out, rows, PARAMETERS) as journal:
        answer(journal, 1)
    before = out.read_bytes() + line.encode() + b"\n"
    out.write_bytes(before)
    with pytest.raises(
        ValueError, match=r"line 2 of .*: expected the number of a line of the input, from 1 to 5\): del"
    ):
        Journal(out, rows, PARAMETERS)
    assert out.read_bytes() == before


def test_empty_lines_count_in_the_number_of_the_last_line(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": "r0"}\n\n\n{"id": "r3"}\n')
    for done in (set(), {1, 4}):
        with Journal(tmp_path / "out.jsonl", Rows(tmp_path / "in.jsonl"), PARAMETERS) as journal:
            assert journal.done == done and journal.n_rows == 2
            answer(journal, *({1, 4} - done))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rows": "x"}, "it has no rows"), ({"digest": 5}, "it has no digest"), ({"parameters": []}, "it has no param")],
)
def test_a_damaged_record_of_the_run_is_refused(tmp_path, rows, change, message):
    with Journal(tmp_path / "out.jsonl", rows, PARAMETERS) as journal:
        answer(journal, 1)
    sidecar = tmp_path / "out.jsonl.run.json"
    for content in (json.loads(sidecar.read_text()) | change, [1], "[" * 100_000):
        sidecar.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=r"out.jsonl.run.json is damaged \(.*\): expected the sidecar") as caught:
            Journal(tmp_path / "out.jsonl", rows, PARAMETERS)
        assert message in str(caught.value) or not isinstance(content, dict)


@pytest.mark.parametrize("gone", ["out.csv.jsonl", "out.csv.run.json"])
def test_a_csv_file_without_its_sidecar_or_journal_is_not_overwritten(tmp_path, rows, gone):
    out = tmp_path / "out.csv"
    out.write_text("my,notes\n")
    with pytest.raises(
        ValueError, match=r"out.csv is there already, and no out.csv.jsonl with out.csv.run.json .*--for"
    ):
        Journal(out, rows, PARAMETERS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.csv"]
    for force in (True, False):  # started over, then gone on with
        with Journal(out, rows, PARAMETERS, force=force) as journal:
            answer(journal, 1) if force else None
            journal.finish()
    made = out.read_bytes()
    assert made.startswith(b'"id","line","text"')
    (tmp_path / gone).unlink()
    with pytest.raises(ValueError, match=r"out.csv is there already"):
        Journal(out, rows, PARAMETERS)
    assert out.read_bytes() == made


@pytest.mark.parametrize("source", ["out.csv", "out.csv.jsonl", "out.jsonl", "link.jsonl"])
def test_no_output_is_written_over_its_input(tmp_path, rows, source):
    content = rows.path.read_bytes() if source != "out.csv" else b"id,prompt\n1,x\n"
    target = tmp_path / ("out.csv" if source.startswith("out.csv") else "out.jsonl")
    (tmp_path / source).write_bytes(content)
    if source == "link.jsonl":
        target.hardlink_to(tmp_path / source)
    for force in (False, True):
        with pytest.raises(ValueError, match=r"is the input.*: expected another file for the answers"):
            Journal(target, Rows(tmp_path / source), PARAMETERS, force=force)
        with pytest.raises(ValueError, match=r"is the input"):
            check_target(target, rows.path, tmp_path / source)
    assert (tmp_path / source).read_bytes() == content
    check_target(target, rows.path)


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_journal_that_is_replaced_before_it_is_locked_is_opened_anew(tmp_path, rows, monkeypatch, is_replaced):
    """A run with --retry replaces the file while this one waits for the lock."""
    out, real = tmp_path / "out.jsonl", fcntl.flock
    Journal(out, rows, PARAMETERS).close()

    def flock(file, how):
        monkeypatch.setattr(fcntl, "flock", real)
        if is_replaced:
            (tmp_path / "new").write_bytes(b"")
            os.replace(tmp_path / "new", out)
        else:
            out.unlink()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Journal(out, rows, PARAMETERS) as journal:
        answer(journal, 1)
        assert lines(out) == [1]
        with pytest.raises(BlockingIOError):
            Journal(out, rows, PARAMETERS)


def test_a_refused_run_leaves_no_file(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1}\n{"id": 1}\n')
    with pytest.raises(ValueError, match="line 2 has the id 1, and so has line 1"):
        Journal(tmp_path / "out.jsonl", Rows(tmp_path / "in.jsonl"), PARAMETERS)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_unwritable_place_is_refused_before_there_is_anything_to_write(tmp_path, rows):
    (tmp_path / "out.csv").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (
        ("out.csv", r"out.csv is a directory: expected the name of a file for the answers"),
        ("file/out.csv", r"file is a file: expected a directory for out.csv"),
        ("file/deeper/out.csv", r"file is a file: expected a directory for out.csv"),
    ):
        with pytest.raises(OSError, match=message):
            Journal(tmp_path / name, rows, PARAMETERS)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.csv", "file"}


def test_folders_that_are_missing_are_made_when_the_run_begins_and_not_before(tmp_path, rows):
    out = tmp_path / "new" / "and deeper" / "out.jsonl"
    check_target(out)
    assert not (tmp_path / "new").exists()
    with Journal(out, rows, PARAMETERS) as journal:
        answer(journal, 1)
    assert lines(out) == [1]


HOLD = """
import sys
from llama.datasets.journal import Journal
from llama.datasets.rows import Rows
journal = Journal(sys.argv[2], Rows(sys.argv[1]), {})
journal.append({"id": "r0", "line": 1})
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_writer_is_refused_and_told_who_the_first_is_until_that_one_is_killed(tmp_path, rows):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", HOLD, str(rows.path), str(out)]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "open\n"
        for force in (False, True):
            with pytest.raises(BlockingIOError, match=f"is being written by process {holder.pid} on .*, since 20"):
                Journal(out, rows, {}, force=force)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    with Journal(out, rows, {}) as journal:
        assert journal.done == {1}


FILL = """
import resource, sys
from llama.datasets.journal import Journal
from llama.datasets.rows import Rows
if sys.argv[3] != "disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
with Journal(sys.argv[2], Rows(sys.argv[1]), {}) as journal:
    for number in range(1, 6):
        if number not in journal.done:
            journal.append({"id": number, "line": number, "text": "x" * 15_000})
"""


def check_that_a_full_disk_stops_a_run_that_then_goes_on(rows, folder, limit, make_room) -> None:
    out = folder / "out.jsonl"
    result = run_python(FILL, rows.path, out, limit)
    assert result.returncode == 1
    assert "the answers so far are whole; the same command goes on from there" in result.stderr
    assert lines(out) == [1, 2, 3]
    make_room()
    assert run_python(FILL, rows.path, out, 10**9).returncode == 0
    assert lines(out) == [1, 2, 3, 4, 5]


def test_a_full_disk_stops_the_run_with_whole_lines_and_it_can_go_on(rows, mount_disk):
    small_disk = mount_disk("52k")

    def make_room() -> None:
        subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)

    check_that_a_full_disk_stops_a_run_that_then_goes_on(rows, small_disk, "disk", make_room)


def test_a_limit_on_the_size_of_files_stops_the_run_with_whole_lines_too(rows, tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    check_that_a_full_disk_stops_a_run_that_then_goes_on(rows, tmp_path, 50_000, lambda: None)


def test_any_text_is_a_line_of_strict_json(tmp_path, rows):
    record = {"id": "r0", "line": 1, "text": "a\nb\u2028\ud800\0é", "logprobs": [float("-inf"), 1.5, float("nan")]}
    with Journal(tmp_path / "out.jsonl", rows, PARAMETERS) as journal:
        journal.append(record)
        answer(journal, 2)

    def refuse(name: str):
        raise AssertionError(name)

    first, second, rest = (tmp_path / "out.jsonl").read_bytes().split(b"\n")
    assert json.loads(first, parse_constant=refuse) == record | {"logprobs": [None, 1.5, None]}
    assert b"text 2" in second and rest == b""


def test_csv_and_parquet_outputs_have_the_records_in_the_order_of_the_rows(tmp_path, rows):
    pytest.importorskip("pyarrow")
    for name in ("out.csv", "out.parquet"):
        for numbers in ((5, 1), (3,)):
            with Journal(tmp_path / name, rows, PARAMETERS) as journal:
                answer(journal, *numbers, parsed=numbers[0] if numbers[0] > 3 else [1, "x"], logprobs=[0.5])
                assert not (tmp_path / name).exists()
        with Journal(tmp_path / name, rows, PARAMETERS) as journal:
            assert journal.done == {1, 3, 5}
            answer(journal, 2, 4)
            journal.finish()
    back = list(Rows(tmp_path / "out.csv", ("line", "parsed", "logprobs")))
    assert [row.id for row in back] == [f"r{i}" for i in range(5)]
    assert back[0].fields == {"line": 1, "text": "text 1", "parsed": 5, "logprobs": [0.5]}
    assert back[1].fields == {"line": 2, "text": "text 2"}
    back = list(Rows(tmp_path / "out.parquet"))
    assert [row.id for row in back] == [f"r{i}" for i in range(5)]
    assert back[2].fields == {"line": 3, "text": "text 3", "parsed": '[1, "x"]', "logprobs": [0.5]}


def test_any_record_can_be_written_to_csv_and_parquet(tmp_path, rows):
    """Empty objects, half a surrogate pair, an integer of 80 bits: pyarrow has no type for these."""
    pytest.importorskip("pyarrow")
    odd = [{"text": "\ud800", "n": 2**80, "metadata": {}}, {"text": "", "n": 1, "metadata": {"a": {}}}, {"n": True}]
    for name in ("out.csv", "out.parquet"):
        with Journal(tmp_path / name, rows, PARAMETERS) as journal:
            for number, record in enumerate(odd, 1):
                journal.append({"id": f"r{number}", "line": number, **record})
            journal.finish()
        found = [row.fields for row in Rows(tmp_path / name, ("line", "n", "metadata"))]
        assert found[0]["text"] == "?" and not found[1].get("text")
        if name == "out.csv":
            assert [f["n"] for f in found] == [2**80, 1, True]
            assert [f.get("metadata") for f in found] == [{}, {"a": {}}, None]
        else:
            assert [f["n"] for f in found] == [str(2**80), "1", "true"]
            assert [f.get("metadata") for f in found] == ["{}", '{"a": {}}', None]


def test_differences_name_the_innermost_values():
    assert differences({"a": {"b": 1, "c": [1]}}, {"a": {"b": 2, "c": [1]}}) == ["a.b was 1, and is 2"]
