"""Data sets of prompts: the record of a line, broken lines, and that kills and more processes change nothing."""

import json
import subprocess

import pytest
from conftest import ranks, run_python

from benchmarks import kill_batch
from llama import Llama
from llama.cli import commands as cli
from llama.datasets.batch import run_batch, run_batch_files
from llama.datasets.runs import line_seed

P = "<PLACEHOLDER>"


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


@pytest.fixture
def small(write_checkpoint) -> Llama:
    return Llama.build(write_checkpoint(), max_seq_len=256, max_batch_size=4, device="cpu")


def records(llama: Llama, lines, **options) -> dict:
    return {record["id"]: record for record in run_batch(llama, lines, **options)}


def write_lines(path, lines: list) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


# The record of a line


def test_each_line_gives_what_a_call_with_its_options_and_seed_gives(small):
    dialog = [user("Hello")]
    bias = {"97": 3.0, "98": 2}
    lines = [
        {"id": "text", "prompt": "ab", "temperature": 0.9, "top_k": 40},
        {"id": "dialog", "messages": dialog, "stop": ["a", "q"]},
        {"id": "ids", "tokens": [1, 2, 3], "seed": 7, "temperature": 1.2, "logit_bias": bias},
        {"id": "several", "prompt": "ab", "num_return_sequences": 3, "temperature": 1.0},
        {"id": "beams", "prompt": "ab", "num_beams": 3, "num_return_sequences": 2, "temperature": 0},
        {"id": "scored", "prompt": "cd", "logprobs": True, "top_logprobs": 2, "metadata": {"answer": [1, None]}},
    ]
    found = records(small, lines, max_gen_len=8, seed=3)
    options = {"max_gen_len": 8}
    expected = small.text_completion(["ab"], 0.9, top_k=40, seed=found["text"]["seed"], **options)
    assert found["text"]["text"] == expected[0]["generation"]
    expected = small.chat_completion([dialog], stop=["a", "q"], seed=found["dialog"]["seed"], **options)
    assert found["dialog"]["text"] == expected[0]["generation"]["content"]
    bias = {97: 3.0, 98: 2}
    ids = small.generate([[1, 2, 3]], temperature=1.2, seed=7, logit_bias=bias, **options)[0][0]
    assert (found["ids"]["seed"], found["ids"]["token_ids"]) == (7, ids)
    several = small.text_completion(["ab"], 1.0, num_return_sequences=3, seed=found["several"]["seed"], **options)
    assert [a["text"] for a in found["several"]["answers"]] == [a["generation"] for a in several]
    beams = small.text_completion(["ab"], 0, num_return_sequences=2, num_beams=3, **options)
    assert [a["text"] for a in found["beams"]["answers"]] == [a["generation"] for a in beams]
    scored = small.text_completion(["cd"], logprobs=True, top_logprobs=2, seed=found["scored"]["seed"], **options)[0]
    assert found["scored"]["text"] == scored["generation"] and found["scored"]["tokens"] == scored["tokens"]
    assert found["scored"]["logprobs"] == pytest.approx(scored["logprobs"], abs=1e-5)
    assert found["scored"]["metadata"] == {"answer": [1, None]}
    assert [r["finish_reason"] in ("stop", "length") for r in found.values()] == [True] * 6
    assert found["text"]["seed"] == line_seed(3, "text")
    assert found["ids"]["prompt_tokens"] == 3 and found["ids"]["answer_tokens"] == len(ids)


def test_a_line_gives_the_same_record_whatever_the_other_lines_and_their_order(small):
    lines = [{"id": f"{i}", "prompt": "ab" * (i % 5 + 1), "max_gen_len": i % 7} for i in range(30)]
    together = records(small, lines)
    backwards = records(small, iter(lines[::-1]))
    assert {i: r["text"] for i, r in together.items()} == {i: r["text"] for i, r in backwards.items()}
    assert len({record["seed"] for record in together.values()}) == 30
    assert records(small, lines[7:8])["7"]["text"] == together["7"]["text"]
    other = records(small, lines, seed=2)
    assert [other[i]["text"] != together[i]["text"] for i in ("6", "13", "20")] == [True] * 3


def test_lines_are_taken_as_slots_become_free_and_answers_come_as_they_finish(small):
    small.tokenizer.stop_tokens = set()
    taken = []

    def lines():
        for number in range(1000):
            taken.append(number)
            yield {"prompt": "a", "max_gen_len": 100 if number == 0 else 2}

    found = run_batch(small, lines())
    first = [next(found)["line"] for _ in range(20)]
    assert 1 not in first  # its answer is long
    assert len(taken) <= 20 + 4 + 1
    text = small.text_completion(["x"], temperature=0, max_gen_len=9)[0]["generation"]  # a call in between
    stream = small.stream_text("x", temperature=0, max_gen_len=9)
    pieces = [next(stream)]
    assert next(found)["finish_reason"] == "length"
    assert "".join([*pieces, *stream]) == text
    found.close()
    assert small._engine.running == [] and not small._engine.waiting


def test_beam_searches_sampled_lines_and_a_stream_between_two_records_run_beside_each_other(small):
    small.tokenizer.stop_tokens = set()
    lines = [{"prompt": "ab", "num_beams": 2, "temperature": 0, "max_gen_len": n} for n in (3, 9, 9)]
    lines += [{"prompt": "cd", "max_gen_len": n} for n in (4, 8, 12)]
    expected = records(small, lines)
    text = small.text_completion(["x"], temperature=0, max_gen_len=9)[0]["generation"]
    found = run_batch(small, lines)
    first = next(found)
    stream = small.stream_text("x", temperature=0, max_gen_len=9)
    pieces = [next(stream)]
    together = {r["id"]: r for r in [first, *found]}
    for r in [*expected.values(), *together.values()]:
        r["score"] = pytest.approx(r.get("score", 0), abs=1e-4)  # the last digits depend on what shares a batch
    assert together == expected
    assert "".join([*pieces, *stream]) == text


# Broken lines


BROKEN = {
    '{"id": 1, "prompt"': "not JSON: Expecting ':' delimiter",
    '{"prompt": "x", "temprature": 1}': "'temprature' is not a field of a row: did you mean temperature? expected one",
    '{"prompt": "x", "temperature": -1}': "temperature = -1: expected a number of at least 0",
    '{"prompt": "x", "temperature": [1, 2]}': "temperature = [1, 2]: expected a number",
    '{"prompt": "x", "logits_processor": "os.system"}': "'logits_processor' is not a field of a row",
    '{"prompt": "x", "num_return_sequences": 20000000}': "= 20000000: expected an integer of at most 10,000",
    f'{{"prompt": "x", "metadata": {"[" * 400}NaN{"]" * 400}}}': "nested deeper than 100 levels",
    '{"prompt": "x", "num_beams": 9, "temperature": 0}': "num_beams = 9: expected at most max_batch_size = 4",
    '{"prompt": "x", "logit_bias": {"512": 1}}': "logit_bias names token 512",
    '{"prompt": "x", "logprobs": 1}': "logprobs = 1: expected true or false",
    '{"prompt": "x", "tokens": [1]}': "found prompt and tokens of prompt, messages, tokens: expected one of them",
    '{"id": "nothing"}': "found none of prompt, messages, tokens",
    '{"prompt": ""}': "prompt = '': expected a text that is not empty",
    '{"prompt": 5}': "prompt = 5: expected a text that is not empty",
    '{"messages": 5}': "a dialog is a list of one or more messages, the last of them the user's; found int",
    '{"prompt": ["x"]}': "prompt = ['x']: expected a text",
    '{"prompt": "\\ud800"}': "surrogate",
    '{"tokens": []}': "the prompt is empty",
    '{"tokens": "12"}': "the prompt is a str",
    '{"tokens": [99999]}': "the prompt has 99999 among its ids",
    '{"messages": []}': "a dialog is a list of one or more messages",
    '{"messages": [{"role": "assistant", "content": "<PLACEHOLDER>"}]}': "message 0 is open: a dialog is a list of",
    '{"messages": [{"role": "robot", "content": "x"}]}': "unknown role 'robot'",
    json.dumps({"prompt": "x" * 300}): "the prompt has 301 tokens: expected at most max_seq_len = 256",
}


def test_a_broken_line_is_a_record_with_its_number_and_the_others_go_on(small, tmp_path, capsys):
    lines = [line for broken in BROKEN for line in (broken, '{"prompt": "fine"}')]
    write_lines(tmp_path / "in.jsonl", lines)
    summary = run_batch_files(small, tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_gen_len=2, progress=True)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found.sort(key=lambda record: record["line"])
    assert [record["line"] for record in found] == list(range(1, len(lines) + 1))
    for record, (line, message) in zip(found[::2], BROKEN.items()):
        assert record["finish_reason"] == "error" and message in record["error"], line
    assert all(record["finish_reason"] in ("length", "stop") for record in found[1::2])
    assert (summary.n_done, summary.n_failed) == (len(lines), len(BROKEN))
    shown = capsys.readouterr().err
    assert "line 1: not JSON" in shown and "line 19: " in shown and "line 21: " not in shown


def test_a_failure_in_the_model_is_an_error_that_retry_tries_again(small, tmp_path):
    write_lines(tmp_path / "in.jsonl", [{"id": i, "prompt": "ab" + i} for i in "xyz"])
    logits = small.model.logits

    def damaged(hidden):
        result = logits(hidden)
        for row, sequence in enumerate(small._engine.running if len(hidden) == len(small._engine.running) else ()):
            if sequence.prompt[-1] == ord("y"):
                result[row] = float("nan")
        return result

    small.model.logits = damaged
    files = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    small.tokenizer.stop_tokens = set()
    assert run_batch_files(small, *files, max_gen_len=4).n_failed == 1
    failed = [r for r in map(json.loads, files[1].read_text().splitlines()) if "error" in r]
    assert [(r["id"], r["finish_reason"], r["answer_tokens"]) for r in failed] == [("y", "error", 1)]
    small.model.logits = logits
    assert run_batch_files(small, *files, max_gen_len=4).n_failed == 1  # they count as done
    summary = run_batch_files(small, *files, max_gen_len=4, retry=True)
    assert (summary.n_before, summary.n_done, summary.n_failed) == (2, 3, 0)
    found = {r["id"]: r["text"] for r in map(json.loads, files[1].read_text().splitlines())}
    assert found == {
        i: r["text"] for i, r in records(small, [{"id": i, "prompt": "ab" + i} for i in "xyz"], max_gen_len=4).items()
    }


def test_mistakes_in_the_arguments_are_raised_before_anything_runs(small, tmp_path, monkeypatch):
    monkeypatch.setattr(small._engine, "step", lambda: pytest.fail("something was run"))
    with pytest.raises(TypeError, match="'temprature' is not a decoding option"):
        run_batch(small, [], temprature=1)
    with pytest.raises(ValueError, match="temperature = -1"):
        run_batch(small, [], temperature=-1)
    twice = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}, {"id": "a", "prompt": "y"}]
    with pytest.raises(ValueError, match="line 3 has the id 'a', and so has line 1"):
        run_batch(small, twice)
    write_lines(tmp_path / "in.jsonl", twice)
    with pytest.raises(ValueError, match="line 3 has the id 'a', and so has line 1"):
        run_batch_files(small, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_of_other_options_or_another_model_is_refused(small, tmp_path, write_checkpoint):
    write_lines(tmp_path / "in.jsonl", [{"prompt": "x"}])
    files = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    run_batch_files(small, *files, max_gen_len=2)
    for options, message in (
        ({"max_gen_len": 3}, r"options.max_gen_len was 2, and is 3"),
        ({"max_gen_len": 2, "seed": 5}, r"seed was 1, and is 5"),
        ({"max_gen_len": 2, "logprobs": True}, r"logprobs was false, and is true"),
    ):
        with pytest.raises(ValueError, match=message):
            run_batch_files(small, *files, **options)
    other = Llama.build(write_checkpoint("other", seed=1), max_seq_len=256, max_batch_size=4, device="cpu")
    with pytest.raises(ValueError, match=r'model.weights was "[0-9a-f]{16}", and is'):
        run_batch_files(other, *files, max_gen_len=2)
    tokenizer = tmp_path / "ckpt" / "tokenizer.model"
    saved, lines = tokenizer.read_text(), tokenizer.read_text().splitlines()
    a, b = (line.split()[0] for line in lines[97:99])
    tokenizer.write_text("\n".join([*lines[:97], f"{b} 97", f"{a} 98", *lines[99:]]) + "\n")
    swapped = Llama.build(tmp_path / "ckpt", max_seq_len=256, max_batch_size=4, device="cpu")
    with pytest.raises(ValueError, match=r'model.tokenizer was "llama3 [0-9a-f]{16}", and is "llama3 '):
        run_batch_files(swapped, *files, max_gen_len=2)
    tokenizer.write_text(saved)
    same = Llama.build(tmp_path / "ckpt", max_seq_len=256, max_batch_size=9, device="cpu")
    same.text_completion(["x"])  # now its matrices have another layout
    assert run_batch_files(same, *files, max_gen_len=2).n_before == 1


def test_a_template_may_name_the_id_of_a_line(small):
    template = {"tasks": {"t": {"prompt": "{id}"}}}
    found = records(small, [{"id": "abc"}, {}], template=template, max_gen_len=0)
    assert [(record["line"], record["prompt_tokens"]) for record in found.values()] == [(1, 4), (2, 2)]


# Open turns


def test_open_turns_give_the_tokens_of_calls_turn_by_turn_and_prefill_only_what_is_new(write_checkpoint):
    small = Llama.build(write_checkpoint(), max_seq_len=512, max_batch_size=4, device="cpu")
    dialogs = [
        [user("Hello" * 4), assistant(P), user("And then?" * 3), assistant(P), user("Why?")],
        [{"role": "system", "content": "Be brief"}, user("a"), assistant("b"), user("c"), assistant(P)],
        [user("One" * 5), assistant(P), user("Two" * 7), assistant(P)],
        [user("no turn is open")],
    ]
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 5}):
        options |= {"max_gen_len": 6, "logprobs": True}
        expected = []
        for dialog in dialogs:
            filled = []
            for message in [*dialog, *([] if dialog[-1] == assistant(P) else [assistant(P)])]:
                if message == assistant(P):
                    answer = small.chat_completion([filled], **options)[0]
                    message = answer["generation"]
                filled.append(message)
            expected.append((answer["generation"], answer["tokens"], filled))
        small._engine.slots.forget()
        counters = small._engine.counters
        before = counters.prefilled
        found = small.chat_completion(dialogs, **options)
        assert [(a["generation"], a["tokens"]) for a in found] == [e[:2] for e in expected]
        assert [a.get("dialog") for a in found] == [*(filled for *_, filled in expected[:3]), None]
        # Only the last prompts are prefilled, each token once, if an answer's text is encoded as its tokens.
        lengths = [len(small.formatter.encode_dialog_prompt(filled[:-1])) for *_, filled in expected]
        n_answers = sum(m not in d for d, (*_, filled) in zip(dialogs, expected) for m in filled[:-1])
        assert sum(lengths) - 7 * n_answers <= counters.prefilled - before <= sum(lengths) + 3 * n_answers
        lines = [{"id": i, "messages": dialog, **options} for i, dialog in enumerate(dialogs)]
        batch = records(small, lines)
        if options["temperature"]:
            assert [batch[i]["seed"] for i in range(4)] == [5] * 4
        assert [batch[i]["text"] for i in range(4)] == [e[0]["content"] for e in expected]
        assert [batch[i]["tokens"] for i in range(4)] == [e[1] for e in expected]
        assert [batch[i].get("messages") for i in range(4)] == [*(filled for *_, filled in expected[:3]), None]
        assert [len(batch[i].get("turns", ())) for i in range(4)] == [3, 1, 2, 0]


def test_impossible_open_turns_are_refused_before_anything_runs(small, monkeypatch):
    monkeypatch.setattr(small._engine, "step", lambda: pytest.fail("something was run"))
    for dialog, message in (
        ([user("a"), assistant(P), assistant("b")], "dialog 1: a dialog ends with a message of the user"),
        ([user("a"), assistant(P), assistant(P)], "dialog 1: message 2 is open: a dialog ends with"),
        ([user("a"), assistant(P), {"role": "user"}], "dialog 1: message 2 of the dialog has no 'content'"),
    ):
        with pytest.raises(ValueError, match=message):
            small.chat_completion([[user("x")], dialog])
    with pytest.raises(ValueError, match="dialog 0: num_return_sequences = 2 with num_beams = 2 where turns are open"):
        small.chat_completion([[user("a"), assistant(P)]], num_return_sequences=2, num_beams=2)
    with pytest.raises(ValueError, match="a stream is one answer"):
        small.stream_chat([user("a"), assistant(P)])


def test_a_dialog_that_becomes_too_long_keeps_the_turns_that_it_has(small):
    small.tokenizer.stop_tokens = set()
    messages = [user("a" * 100), assistant(P), user("b" * 100), assistant(P)]
    found = records(small, [{"id": 1, "messages": messages, "max_gen_len": 60}, {"id": 2, "prompt": "x"}])
    assert "expected at most max_seq_len = 256" in found[1]["error"] and found[1]["finish_reason"] == "error"
    assert len(found[1]["turns"]) == 1
    assert found[1]["messages"][1]["content"] == found[1]["turns"][0]["text"]
    assert found[2]["finish_reason"] == "length"


# Processes and kills


def test_a_batch_killed_again_and_again_equals_an_undisturbed_one():
    found = kill_batch.main(n_lines=400, n_kills=2)  # the second time, a rank of four
    assert found == {"lines": 400, "ids": 400, "equal": True, "broken": 4, "too_long": found["too_long"], "others": 0}
    assert 0 < found["too_long"] < 60


SLOW = """
import json, sys, time
from pathlib import Path
import torch.distributed as dist
from llama import Llama
from llama.datasets.batch import run_batch
llama, folder, rank = Llama.build(sys.argv[1], None, 512, 1, 1, device="cpu"), Path(sys.argv[2]), dist.get_rank()
step = llama._engine.step
def wait(name):
    while not (folder / name).exists():
        time.sleep(0.01)
def waits():
    llama._engine.step = step
    if rank == 0:
        wait("slow")  # the other has a line
    else:
        (folder / "slow").touch()
        wait("39 done")  # it is not done before all others are
    return step()
llama._engine.step = waits
n_done = 0
for record in run_batch(llama, ({"prompt": "a", "max_gen_len": 3} for _ in range(40))):
    n_done += 1
    if n_done == 39:
        (folder / "39 done").touch()
(folder / str(rank)).write_text(str(n_done))
"""


def test_while_a_replica_is_busy_with_one_line_the_other_answers_all_others(write_checkpoint, tmp_path):
    (tmp_path / "script.py").write_text(SLOW)
    result = ranks(2, tmp_path / "script.py", write_checkpoint(), tmp_path)
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["40", "0"]


# The command


def run_command(*arguments: object) -> subprocess.CompletedProcess:
    command = "import sys; from llama.cli.commands import main; main(sys.argv[1:])"
    # One thread: on a busy machine several wait for each other.
    return run_python(command, "batch", *arguments, OMP_NUM_THREADS="1")


def test_the_command_answers_a_csv_file_and_says_how_it_went(write_checkpoint, tmp_path):
    folder = write_checkpoint()
    (tmp_path / "in.csv").write_text('id,prompt,temperature,max_gen_len\na,"x, y",0,3\nb,z,,\nc,,1,\n')
    arguments = [tmp_path / "in.csv", tmp_path / "out.csv", f"--ckpt_dir={folder}", "--max_gen_len=5", "--device=cpu"]
    result = run_command(*arguments)
    assert result.returncode == 0, result.stderr
    assert "line 3: found none of prompt, messages, tokens" in result.stderr
    assert "3 of 3 lines done, 1 of them failed" in result.stderr
    header, *rows = (tmp_path / "out.csv").read_text().splitlines()
    assert header.startswith('"id","line","text","finish_reason"') and [row[:5] for row in rows[-1:]] == ['"c",3']
    result = run_command(*arguments)
    assert "3 of 3 lines done (3 of them before), 1 of them failed; 0 tokens" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl", "out.jsonl"], "there is no file none.jsonl"),
        (["in.jsonl", "out.txt"], "out.txt: expected a name that ends in .jsonl"),
        (["in.jsonl", "out.jsonl", "--template", "no.json"], "no.json"),
        (["in.jsonl", "out.jsonl", "--template", "bad.json"], "bad.json: task 'a': parse = \"intger\": expected"),
        (["in.jsonl", "out.jsonl", "--temperature", "-1"], "--temperature = -1.0: expected"),
    ],
)
def test_mistakes_are_a_line_before_the_weights_are_read(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", [{"prompt": "x"}])
    (tmp_path / "bad.json").write_text('{"tasks": {"a": {"user": "x", "parse": "intger"}}}')
    with pytest.raises(SystemExit) as caught:
        cli.main(["batch", *arguments, "--ckpt_dir", "none"])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_ctrl_c_ends_with_a_line_and_the_same_command_goes_on(write_checkpoint, tmp_path):
    write_lines(tmp_path / "in.jsonl", [{"prompt": "x", "max_gen_len": 40} for _ in range(200)])
    files = [
        str(tmp_path / "in.jsonl"),
        str(tmp_path / "out.jsonl"),
        f"--ckpt_dir={write_checkpoint()}",
        "--device=cpu",
    ]
    code = (
        "import signal, sys\nfrom llama.cli.commands import main\nfrom llama.datasets.journal import Journal\n"
        "append = Journal.append\n"
        "def interrupt(self, record):\n    append(self, record)\n"
        "    if record['line'] == 20: signal.raise_signal(signal.SIGINT)\n"
        "Journal.append = interrupt\nmain(sys.argv[1:])\n"
    )
    result = run_python(code, "batch", *files, OMP_NUM_THREADS="1")
    assert result.returncode == 130, result.stderr
    assert "has the answers so far, and the same command goes on from there" in result.stderr
    before = (tmp_path / "out.jsonl").read_bytes()
    assert before.endswith(b"\n") and 0 < before.count(b"\n") < 200
    assert run_command(*files).returncode == 0
    after = (tmp_path / "out.jsonl").read_bytes()
    assert after.startswith(before) and sorted(json.loads(line)["line"] for line in after.splitlines()) == [
        *range(1, 201)
    ]
