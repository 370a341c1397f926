"""The command line: how it is read, what a mistake looks like, and what the commands about one text print."""

import inspect
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields

import forks
import pytest
import tyro
from conftest import DEMO, ROOT, ranks

from llama import DecodingOptions, Llama, __version__, cli
from llama.cli import arguments, commands

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LLAMA = [sys.executable, "-m", "llama"]

# The options of a single answer, which can be streamed; `batch` has more, none of them code.
STREAMED = {
    *("max_gen_len", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("stop", "logit_bias", "seed", "presence_penalty", "frequency_penalty", "truncate"),
    *("json_schema", "regex", "choice", "grammar"),
}


@pytest.fixture
def small(write_checkpoint) -> Llama:
    return Llama.build(write_checkpoint(), max_seq_len=256, max_batch_size=1, device="cpu")


@pytest.fixture
def nothing_is_loaded(monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise AssertionError("the model was loaded before the arguments were understood")

    monkeypatch.setattr(Llama, "build", fail)


def run(command: list, stdin: str = "") -> subprocess.CompletedProcess:
    """In a process of its own, a fork."""
    return forks.run(command[1:], ENV, stdin)


def help_of(capsys, *command: str) -> str:
    """The help of a command, without line breaks and frames."""
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--help"])
    assert exit.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return re.sub(r"[\s│]+", " ", out)


def decoding(*words: str) -> dict:
    """The decoding options that a command line asks for."""
    return tyro.cli(arguments.Decoding, args=words, config=commands.CONFIG).given()


# What the commands about one text print


def test_complete_streams_what_text_completion_gives(small, tmp_path, capfd):
    capfd.readouterr()
    expected = small.text_completion(["Once, (upon)"], temperature=0.9, max_gen_len=50, seed=4)[0]["generation"] + "\n"
    options = ["--ckpt_dir", tmp_path / "ckpt", "--max_seq_len", 256, "--device", "cpu", "--max_gen_len", 50]
    options += ["--temperature", 0.9, "--seed", 4]
    cli.main(["complete", "Once, (upon)", *map(str, options)])
    assert capfd.readouterr().out == expected
    result = run([*LLAMA, "complete", "-", *options, "--stop", '["e", 98]'], "Once, (upon)\n")
    stopped = small.text_completion(["Once, (upon)"], temperature=0.9, max_gen_len=50, seed=4, stop=["e", 98])
    assert (result.returncode, result.stdout) == (0, stopped[0]["generation"] + "\n"), result.stderr


def test_score_shows_each_token_once_on_two_processes(small, tmp_path):
    (score,), (perplexity,) = small.score(["Hello"]), small.perplexity(["Hello"])
    result = ranks(2, "-m", "llama", "score", "Hello", "--ckpt_dir", tmp_path / "ckpt", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    *tokens, summary = result.stdout.partition("least certain:\n")[0].splitlines()
    assert [line.split()[1] for line in tokens] == [repr(letter) for letter in "Hello"]
    assert [float(line.split()[0]) for line in tokens] == pytest.approx(score["logprobs"][1:], abs=1e-3)
    assert summary.startswith("5 tokens, perplexity ")
    assert float(summary.split()[-1]) == pytest.approx(perplexity, rel=1e-3)
    worst = min(range(1, 6), key=lambda i: score["logprobs"][i])
    assert re.search(rf"least certain:\n +-[\d.]+ +token +{worst} ", result.stdout)


def test_without_a_seed_complete_gives_the_same_text_again_and_with_another_seed_another(capfd):
    command, shown = ["complete", "One day", "--temperature", "1", "--max_gen_len", "20", "--device", "cpu"], []
    for seed in ([], [], ["--seed", "5"]):
        cli.main([*command, *seed])
        shown.append(capfd.readouterr().out)
    assert shown[0] == shown[1] != shown[2]
    assert run([*LLAMA, *command]).stdout == shown[0]  # in a process of its own too


def test_a_count_of_one_is_singular(small, tmp_path, capfd):
    cli.main(["score", "x", "--ckpt_dir", str(tmp_path / "ckpt"), "--device", "cpu"])
    assert "\n1 token, perplexity " in capfd.readouterr().out
    (tmp_path / "ckpt" / "checklist.chk").write_text(f"{'0' * 32}  params.json\n")
    with pytest.raises(SystemExit) as exit:
        cli.main(["verify", str(tmp_path / "ckpt")])
    assert exit.value.code == 1
    assert capfd.readouterr().out.endswith("GB read: 1 problem\n")


# How the line is read


def test_flags_may_be_written_with_underscores_or_dashes(capfd):
    shown = []
    for flags in (["--max_gen_len", "5", "--max_seq_len=100"], ["--max-gen-len=5", "--max-seq-len", "100"]):
        cli.main(["complete", "One day", "--temperature", "0", "--device", "cpu", *flags])
        shown.append(capfd.readouterr().out)
    assert shown[0] == shown[1] and 0 < len(shown[0].split()) < 8


@pytest.mark.parametrize(
    ("word", "stop"),
    [
        *[("[1]", [1]), ('["e", 98]', ["e", 98]), ("12", 12), ("²", "²"), ("007", "007")],
        *[("(a, b)", "(a, b)"), ("[1", "[1"), ("None", "None"), ("-1", "-1"), ("a=b", "a=b")],
    ],
)
def test_a_stop_is_a_json_list_the_id_of_a_token_or_else_a_string(word, stop):
    assert decoding("--stop", word) == decoding(f"--stop={word}") == {"stop": stop}


def test_other_values_have_the_types_of_the_options():
    words = "--temperature 1 --top_k 5 --seed -3 --logit_bias {97:-1e999,98:2} --early_stopping never --min_p .5"
    assert decoding(*words.split()) == {
        **{"temperature": 1.0, "top_k": 5, "seed": -3, "early_stopping": "never", "min_p": 0.5},
        "logit_bias": {97: -float("inf"), 98: 2},
    }
    assert decoding("--early-stopping", "True") == {"early_stopping": True}
    assert decoding("--top_p", "0.9") == {}  # the default
    assert decoding("--temperature", "0.6") == {"temperature": 0.6}  # a beam search would have another default


@pytest.mark.parametrize("text", ["12", "(a, b)", "[1]", "None", "{x", "--x", "-1"])
def test_a_text_that_looks_like_python_or_a_flag_is_text(text, small, tmp_path, capfd):
    cli.main(["score", "--ckpt_dir", str(tmp_path / "ckpt"), "--device", "cpu", "--", text])
    shown = capfd.readouterr().out.partition("tokens, ")[0]
    assert "".join(line.split(maxsplit=1)[1].strip("'") for line in shown.splitlines()[:-1]) == text


def test_a_command_line_with_an_error_runs_nothing(nothing_is_loaded, capsys):
    for words in ("complete hi --tempratur 1", "complete hi --max_seq_len none", "complete hi more", "complete hi -n"):
        with pytest.raises(SystemExit) as exit:
            cli.main(words.split())
        assert exit.value.code == 2
        capsys.readouterr()
    with pytest.raises(AssertionError):
        cli.main(["complete", "hi"])


@pytest.mark.parametrize(
    ("words", "suggested"),
    [("--tempratur 1", "--temperature"), ("--max-gen-le 3", "--max_gen_len"), ("--ckptdir x", "--ckpt_dir")],
)
def test_an_unknown_flag_gets_the_nearest_as_a_suggestion(words, suggested, nothing_is_loaded, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["chat", *words.split()])
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert words.split()[0] in err and re.search(rf"Perhaps you meant:\W+{suggested}\b", err)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("chatt", "chatt.*Available subcommands: chat, complete, "),
        ("complete", "Missing from llama complete: TEXT"),
        ("complete two words", "Unrecognized options: words"),
        ("complete hi --max_seq_len none", "--max_seq_len: .* INT .*'none'"),
        ("complete hi --logit_bias {5", "--logit_bias: .*'{5'"),
        ("complete hi --temperature", "'--temperature'. Expected 1 value"),
        ("complete hi --num_beams 2", "--num_beams"),
        ("convert a b --to gguf", "'gguf' for argument '--to'. Expected one of .'meta', 'hf'"),
        ("sample a b", "Missing from llama sample: --scorer"),
    ],
)
def test_a_wrong_command_line_is_explained_in_a_few_lines(words, expected, nothing_is_loaded, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(words.split())
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert re.search(expected, re.sub(r"[\s│]+", " ", err))
    assert err.count("\n") <= 20


# Mistakes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("chat --temperature -1", "--temperature = -1.0: expected a number of at least 0"),
        ("complete hi --min-p 2", "--min_p = 2.0: expected a number of at most 1"),
        ("complete hi --stop=", "--stop = '': expected strings that are not empty"),
        ("chat --ckpt_dir /nowhere", "/nowhere"),
        ("chat --ckpt_dir CKPT --max_seq_len 0", "--max_seq_len = 0: expected an integer of at least 1"),
        ("chat --ckpt_dir CKPT --logit_bias {9999:1}", "--logit_bias names token 9999: expected ids from 0 to 511"),
        (
            "complete too-long --ckpt_dir CKPT --max_seq_len 8",
            "9 tokens: expected at most --max_seq_len = 8; --truncate",
        ),
        ("complete hi --truncate middle", "--truncate = 'middle': expected 'left' or 'right', or None"),
        ("complete hi --device abacus --ckpt_dir CKPT", "--device 'abacus' is not known to PyTorch: expected 'cpu', "),
        ("complete hi --dtype half", "--dtype = 'half': expected bfloat16, float16, float32 or float64"),
        ("complete hi --quantize int3", "--quantize = 'int3': expected 'int8' or 'int4', or None"),
        ("complete hi --model_parallel_size 2", "--model_parallel_size=2 in a run of one process: "),
        (
            "complete hi --draft /nowhere --ckpt_dir CKPT",
            "--draft = '/nowhere': expected the directory of a smaller model",
        ),
        ("complete hi --adapter /nowhere", "--adapter /nowhere does not exist: expected a directory with adapter_"),
        ("complete hi --regex (", "--regex cannot be compiled: "),
        ("complete hi --json_schema {", "--json_schema = '{' is not JSON: "),
        ("complete hi --regex a --choice b", "--regex and choice together: expected at most one shape"),
        ("info nowhere", "nowhere does not exist: expected a directory with params.json and consolidated"),
        ("info CKPT --gpu_memory much", "--gpu_memory = 'much': expected "),
        ("batch nowhere.jsonl out.jsonl", "there is no file nowhere.jsonl: expected a file of rows"),
        ("batch IN out.txt", "out.txt: expected a name that ends in .jsonl, .ndjson, .json, .csv, .parquet"),
        ("batch IN out.jsonl --indent 2", "--indent = 2 for out.jsonl: expected a target whose name ends in .json"),
        ("batch IN - --indent 2", "--indent = 2 for -: expected a target whose name ends in .json"),
        ("batch IN out.jsonl --report r.json", "--report r.json: expected a --template, and a file as the target"),
        ("batch IN out.jsonl --template nowhere.json", "there is no template file nowhere.json"),
        ("batch IN out.jsonl --template IN", "IN.jsonl is not JSON (Extra data: "),
        ("batch IN out.jsonl --num_beams 40", "--num_beams = 40: expected at most --max_batch_size = 16"),
        (
            "batch IN out.jsonl --num_beams 4 --temperature 1",
            "--num_beams = 4 with --temperature = 1.0: a beam search ",
        ),
        ("batch IN out.jsonl --replicas 0", "--replicas = 0: expected an integer of at least 1"),
        ("sample a b --scorer logprob --keep 17", "--keep = 17: expected at most 16, the number"),
        ("sample a b --scorer logprob -n 0", "--n = 0: expected an integer of at least 1"),
        ("sample IN - --scorer logprob", "-: only `llama batch` reads and writes standard streams: expected a file"),
        ("sample IN out.jsonl --scorer best", "--scorer 'best': expected one of logprob, mean_logprob, reward:DIR"),
        ("sample IN out.jsonl --scorer logprob --temperature 0", "--temperature = 0 with n = 16: expected more than 0"),
        ("rescore IN out.jsonl --scorer logprob --prompts nowhere.jsonl", "there is no file nowhere.jsonl"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, expected, write_checkpoint, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IN.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    words = re.sub(r"\bIN\b", "IN.jsonl", words)
    if "CKPT" in words:
        words = words.replace("CKPT", str(write_checkpoint()))
    with pytest.raises(SystemExit) as exit:
        cli.main(words.split())
    assert exit.value.code == 2
    out, err = capfd.readouterr()
    (line,) = (line for line in err.splitlines() if not line.startswith("Loaded"))
    assert line.startswith("llama: ") and expected in line and "Llama.build" not in line
    assert out == "" and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "complete hi --max_new_tokens 5 --do-sample",
            ["--max_new_tokens is --max_gen_len here", "--do_sample is --temp"],
        ),
        ("complete hi --model x --torch-dtype=half", ["--model is --ckpt_dir here", "--torch_dtype is --dtype here"]),
        ("batch a b --tensor_parallel_size 2", ["--tensor_parallel_size is --model_parallel_size here"]),
        ("batch a b --n 4", ["--n is --num_return_sequences here"]),
        ("sample a b --scorer logprob --num_samples 4", ["--num_samples is -n here"]),
    ],
)
def test_a_flag_of_another_program_is_answered_with_ours(words, said, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(words.split())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llama: ")]
    assert exit.value.code == 2 and len(lines) == len(said)
    assert all(line.startswith(f"llama: {begin}") for line, begin in zip(lines, said)), lines


def test_the_context_is_256_for_the_embedded_model_and_2048_for_others(write_checkpoint):
    assert arguments.Loading(device="cpu").build().args.max_seq_len == 256
    assert arguments.Loading(str(write_checkpoint()), device="cpu").build().args.max_seq_len == 2048
    assert arguments.Loading(max_seq_len=300, device="cpu").build().args.max_seq_len == 300


def test_an_empty_text_has_no_score(write_checkpoint, capfd):
    with pytest.raises(SystemExit):
        cli.main(["score", "", "--ckpt_dir", str(write_checkpoint())])
    assert capfd.readouterr().err.splitlines()[-1] == "llama: the text is empty: expected a text to score"


def test_a_mistake_in_a_real_process():
    command = [*LLAMA, "complete", "x", "--top_p", "0"]
    result = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "llama: --top_p = 0.0: expected a number of at least 1e-30\n"


def test_only_one_of_two_processes_explains_the_error():
    result = ranks(2, "-m", "llama", "chat", "--tempratur", "1")
    assert result.returncode != 0 and result.stderr.count("Perhaps you meant") == 1


def test_without_the_embedded_checkpoint_it_says_what_to_pass(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(arguments, "DEMO", tmp_path / "demo")
    with pytest.raises(SystemExit) as exit:
        cli.main(["chat"])
    assert exit.value.code == 2 and "pass --ckpt_dir DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["complete", "One day", "--max_gen_len", "200", "--temperature", "1", "--device", "cpu"],  # piece by piece
        ["info", DEMO],  # all at once, at the end
        ["--help"],
    ],
    ids=lambda command: command[0],
)
def test_a_closed_pipe_ends_the_command_quietly(command, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with (tmp_path / "shown").open("w") as shown, open(os.devnull) as nothing:
        streams = [nothing.fileno(), writer, shown.fileno()]
        process = forks.parent().start(["-m", "llama", *command], streams, ENV, None)
    os.close(writer)
    assert process.wait() == 0
    assert re.fullmatch(r"(Loaded .*\n)?", (tmp_path / "shown").read_text())


def test_ctrl_c_ends_a_command_with_130_and_no_traceback(tmp_path):
    command = ["-m", "llama", "complete", "One day", "--logit_bias", "{97: 1e9}", "--device", "cpu"]
    reader, writer = os.pipe()
    with (tmp_path / "shown").open("w") as shown, open(os.devnull) as nothing:
        streams = [nothing.fileno(), writer, shown.fileno()]
        process = forks.parent().start([*command, "--max_seq_len", "100000"], streams, ENV, None)
    os.close(writer)
    with open(reader) as printed:
        assert printed.read(1)
        process.send_signal(signal.SIGINT)
        printed.read()
    assert process.wait() == 130
    assert re.fullmatch(r"Loaded .*\n", (tmp_path / "shown").read_text())


# Help


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_alone_and_with_help_it_lists_the_commands_on_stdout(words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(words)
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    assert __version__ in out
    for command in commands.COMMANDS:
        first = inspect.getdoc(command).split()[:3]
        assert f"• {command.__name__} {' '.join(first)}" in re.sub(r" +", " ", out)


def test_the_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"llama {__version__}\n"


def test_python_m_llama_cli_runs_too():
    result = run([sys.executable, "-m", "llama.cli", "info", DEMO])
    assert result.returncode == 0 and result.stdout.startswith("architecture"), result.stderr


def test_help_says_what_each_option_means(capsys):
    chat, batch, sample = help_of(capsys, "chat"), help_of(capsys, "batch"), help_of(capsys, "sample")
    assert (
        "--temperature FLOAT Divides the logits before sampling" in chat and "None: 0.6, or 0 in a beam search" in chat
    )
    assert "if positive and multiplies it if negative" in chat  # at the end of the comment's first line
    assert "--ckpt_dir STR Meta's directory or Hugging Face's; the embedded checkpoint when left out" in chat
    assert "--system STR the system prompt" in chat
    assert "-n INT, --n INT" in sample and "Under torchrun write -n, because torchrun has an option --n" in sample
    assert "(default: 1)" in chat.partition("--max_batch_size INT")[2].partition("--device")[0]
    assert "(default: 16)" in batch.partition("--max_batch_size INT")[2].partition("--device")[0]


def test_each_command_has_the_decoding_options_that_it_can_use(capsys):
    names = {field.name for field in fields(DecodingOptions)}
    for command, expected in (
        *[(name, STREAMED) for name in ("chat", "complete", "sample")],
        *[("batch", names - {"logits_processor"}), ("score", set()), ("rescore", set())],
    ):
        shown = help_of(capsys, command)
        assert {name for name in names if re.search(rf"--{name}\b", shown)} == expected, command
