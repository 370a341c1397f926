"""`llama info` and `llama verify`: their output for sound and for broken directories."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import forks
import pytest
import torch
from conftest import ROOT, split_checkpoint

from llama import ModelArgs
from llama.checkpoint import inspect as inspect_checkpoint
from llama.checkpoint.convert import convert, quantize
from llama.checkpoint.inspect import family, info, memory, parse_size, verify


def command(*arguments: object) -> subprocess.CompletedProcess:
    return forks.run(["-m", "llama", *arguments], dict(os.environ), cwd=ROOT)


def write_checklist(folder: Path) -> None:
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "checklist.chk").write_text("".join(lines))


@pytest.fixture
def two_shards(write_checkpoint, tmp_path) -> Path:
    folder = split_checkpoint(write_checkpoint(), tmp_path / "two", 2, "rows")
    write_checklist(folder)
    return folder


@pytest.fixture
def hugging_face(write_checkpoint, tmp_path) -> Path:
    convert(write_checkpoint("source"), tmp_path / "hf", "hf", shards=2)
    return tmp_path / "hf"


PUBLISHED = {
    "Llama 3.2 1B": ({"dim": 2048, "n_layers": 16, "tied_embeddings": True, "use_scaled_rope": True}, 131072),
    "Llama 3.1 8B": ({"dim": 4096, "n_layers": 32, "use_scaled_rope": True}, 131072),
    "Llama 3 70B": ({"dim": 8192, "n_layers": 80}, 8192),
    "Llama 2 7B": ({"dim": 4096, "n_layers": 32, "vocab_size": 32000, "rope_theta": 10000.0}, 4096),
    "Code Llama 13B": ({"dim": 5120, "n_layers": 40, "vocab_size": 32016, "rope_theta": 1e6}, 16384),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_known_by_name_and_context(name):
    shape, context = PUBLISHED[name]
    args = ModelArgs(**{"vocab_size": 128256, "rope_theta": 500000.0, "n_heads": 32} | shape)
    assert family(args) == (name, context)


def test_info_says_what_the_directory_holds(two_shards):
    found = dict(info(two_shards))
    args = ModelArgs(**json.loads((two_shards / "params.json").read_text()))
    n_parameters = sum(t.numel() for t in torch.load(two_shards.parent / "ckpt" / "consolidated.00.pth").values())
    assert found["parameters"] == f"{n_parameters:,}"
    assert found["dtype"] == "float32"
    assert found["files"].startswith("2 (Meta)")
    assert found["model_parallel_size"] == "one of " + ", ".join(map(str, args.model_parallel_sizes))


def test_the_memory_shown_is_that_of_the_built_model(two_shards):
    from llama import Llama

    llm = Llama.build(two_shards, max_seq_len=100, max_batch_size=3, device="cpu")
    n_parameters = sum(p.numel() for p in llm.model.parameters())
    found = memory(llm.model.args, n_parameters, 4)
    assert found["weights"] == sum(p.nbytes for p in llm.model.parameters())
    assert found["cache"] == llm.model.cache.nbytes
    assert found["logits"] == llm.model.forward(torch.zeros(3, 1, dtype=torch.long)).nbytes


def test_with_more_processes_than_key_heads_each_still_has_one(two_shards):
    args = ModelArgs(**json.loads((two_shards / "params.json").read_text()))
    assert (args.n_kv_heads, args.n_heads) == (4, 8)
    assert memory(args, 1000, 4, n_ranks=8)["cache"] == memory(args, 1000, 4, n_ranks=4)["cache"]


def test_verify_finds_nothing_wrong_with_sound_directories(two_shards, hugging_face):
    advanced = []
    for folder in (two_shards, hugging_face):
        found = verify(folder, advance=advanced.append)
        assert found.problems == []
        assert found.notes == []
        assert found.n_bytes > 500_000
    weights = [path for folder in (two_shards, hugging_face) for path in folder.iterdir() if path.suffix != ".json"]
    assert sum(advanced) > 1.9 * sum(path.stat().st_size for path in weights if "tokenizer" not in path.name)


def test_verify_without_a_checklist_says_so(two_shards):
    (two_shards / "checklist.chk").unlink()
    found = verify(two_shards)
    assert found.problems == []
    assert "no checklist.chk" in found.notes[0]


def test_verify_lists_every_problem_not_only_the_first(two_shards, monkeypatch):
    monkeypatch.setattr(inspect_checkpoint, "CHUNK_BYTES", 1024)  # the matrices are read in pieces
    for number in (0, 1):
        path = two_shards / f"consolidated.{number:02d}.pth"
        state = torch.load(path)
        state["layers.1.feed_forward.w1.weight"][-1, 3 : 5 + number] = float("nan")
        state["layers.0.attention.wo.weight"][0, 0] = float("-inf")
        if number == 1:
            del state["layers.0.attention.wq.weight"]
            state["layers.1.attention.wk.weight"] = torch.zeros(7, 64)
        torch.save(state, path)
    (two_shards / "checklist.chk").write_text((two_shards / "checklist.chk").read_text() + "nonsense\n")
    (two_shards / "tokenizer.model").rename(two_shards / "moved")
    shutil.copy(two_shards / "moved", two_shards / "elsewhere.model")
    problems = verify(two_shards, two_shards / "elsewhere.model").problems
    expected = [
        ("consolidated.00.pth", "checklist.chk says"),
        ("consolidated.01.pth", "checklist.chk says"),
        ("tokenizer.model is missing",),
        ("line 5", "'nonsense'"),
        ("01.pth lacks layers.0.attention.wq.weight",),
        ("layers.1.attention.wk.weight has shape [7, 64]",),
        ("00.pth: layers.1.feed_forward.w1.weight", "2 numbers are not finite"),
        ("00.pth: layers.0.attention.wo.weight", "1 numbers are not finite"),
        ("01.pth: layers.1.feed_forward.w1.weight", "3 numbers are not finite"),
        ("01.pth: layers.0.attention.wo.weight", "1 numbers are not finite"),
    ]
    for parts in expected:
        assert any(all(part in problem for part in parts) for problem in problems), (parts, problems)
    assert len(problems) == len(expected)


def test_verify_goes_on_after_a_file_that_cannot_be_read(two_shards):
    (two_shards / "checklist.chk").unlink()
    path = two_shards / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:5000])
    state = torch.load(two_shards / "consolidated.01.pth")
    state["output.weight"][2, 2] = float("inf")
    torch.save(state, two_shards / "consolidated.01.pth")
    problems = verify(two_shards).problems
    assert len(problems) == 2
    assert "consolidated.00.pth (5,000 bytes) is not a whole PyTorch checkpoint" in problems[0]
    assert "01.pth: output.weight: 1 numbers are not finite" in problems[1]


def test_verify_of_hugging_face_files(hugging_face):
    from safetensors.torch import load_file, save_file

    path = hugging_face / "model-00001-of-00002.safetensors"
    state = load_file(path)
    state["model.embed_tokens.weight"][3, 3] = float("nan")
    save_file(state, path)
    problems = verify(hugging_face).problems
    assert len(problems) == 2
    assert "checklist.chk says" in problems[0]
    assert "tok_embeddings.weight: 1 numbers are not finite" in problems[1]
    (hugging_face / "model-00002-of-00002.safetensors").unlink()
    assert any("is missing" in problem for problem in verify(hugging_face).problems)


def test_the_commands(two_shards):
    run = command("info", two_shards, "--max_seq_len", 4096, "--max_batch_size", 16)
    assert run.returncode == 0, run.stderr
    assert "at max_batch_size 16, max_seq_len 4096" in run.stdout
    run = command("verify", two_shards)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("no problems\n")
    (two_shards / "params.json").write_text((two_shards / "params.json").read_text() + "\n")
    run = command("verify", two_shards)
    assert run.returncode == 1
    assert "problem: " in run.stdout and "params.json has md5" in run.stdout
    run = command("info", two_shards / "nowhere")
    assert run.returncode == 2
    assert run.stderr.startswith("llama: ckpt_dir ") and "Traceback" not in run.stderr


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_info_predicts_the_size_of_a_quantised_directory(write_checkpoint, tmp_path, kind):
    folder = write_checkpoint(dim=128, dtype=torch.bfloat16)
    quantize(folder, tmp_path / kind, kind)
    rounded = [dict(info(path, None, 2048, 1, kind))["memory"] for path in (folder, tmp_path / kind)]
    assert rounded[0] == rounded[1] != dict(info(folder))["memory"]
    with pytest.raises(ValueError, match=f"is {kind} already: leave it out"):
        info(tmp_path / kind, quantize="int4" if kind == "int8" else "int8")


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("16GB", 16 * 10**9), ("24 GiB", 24 * 2**30), ("8e9", 8 * 10**9), ("500m", 5 * 10**8)]
)
def test_sizes_are_parsed(text, n_bytes):
    assert parse_size(text) == n_bytes


def test_info_says_whether_a_model_fits(write_checkpoint):
    folder = write_checkpoint()
    for size, word in (("1GB", "fits"), ("1MB", "does not fit")):
        told = [value for name, value in info(folder, None, 2048, 1, "int8", size) if name == "memory"]
        assert told[0].endswith(f", {word} in {size}")
    with pytest.raises(ValueError, match="gpu_memory = 'much': expected a number of bytes, such as 16GB"):
        info(folder, gpu_memory="much")
    with pytest.raises(ValueError, match="quantize = 'int3': expected one of int8, int4"):
        info(folder, quantize="int3")
