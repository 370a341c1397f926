"""Conversions there and back, read by Transformers, safetensors and PyTorch; conversions that fail or are killed."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_python, split_checkpoint

from llama import ChatFormat, Llama, ModelArgs, Tokenizer
from llama.checkpoint import convert as convert_module
from llama.checkpoint import loading
from llama.checkpoint.convert import convert
from llama.checkpoint.open import open_checkpoint
from llama.checkpoint.writer import PthFile

safetensors_torch = pytest.importorskip("safetensors.torch", reason="pip install safetensors to write its files")

LLAMA_32 = {"rope_theta": 500000.0, "use_scaled_rope": True, "rope_scale_factor": 32.0, "tied_embeddings": True}
VARIANTS = {
    "llama 2": {"n_kv_heads": 8},
    "llama 3, odd hidden size": {"rope_theta": 500000.0, "ffn_dim_multiplier": 1.37, "multiple_of": 7},
    "llama 3.2, bfloat16": LLAMA_32 | {"dtype": torch.bfloat16},
}


def load(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "consolidated.00.pth", weights_only=True)


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor.flatten().view(torch.uint8), right[name].flatten().view(torch.uint8)), name


def args_of(folder: Path) -> ModelArgs:
    """The shape of a model, with the hidden size instead of a file's parameters for it."""
    args = open_checkpoint(folder)[1].args
    return replace(args, multiple_of=args.hidden_dim, ffn_dim_multiplier=None)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("shards", [None, 1, 3, 7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_meta_to_hugging_face_and_back_is_bit_for_bit(write_checkpoint, tmp_path, variant, shards):
    src = write_checkpoint(**VARIANTS[variant])
    convert(src, tmp_path / "hf", "hf", shards=shards)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == (shards or 1)
    convert(tmp_path / "hf", tmp_path / "back", "meta")
    assert_same_bits(load(src), load(tmp_path / "back"))
    assert args_of(src) == args_of(tmp_path / "hf") == args_of(tmp_path / "back")
    assert (src / "tokenizer.model").read_bytes() == (tmp_path / "back" / "tokenizer.model").read_bytes()


def test_the_real_model_converted_there_and_back_gives_the_same_text(stories, tmp_path):
    convert(stories, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "meta")
    assert_same_bits(load(stories), load(tmp_path / "back"))
    golden = json.loads((stories / "expected.json").read_text())
    llm = Llama.build(tmp_path / "hf", max_seq_len=256, device="cpu")
    tokens = llm.generate([golden["prompt_tokens"]], max_gen_len=60, temperature=0)[0][0]
    assert tokens == golden["tokens"][:60]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_transformers_gives_our_logits_from_a_converted_directory(write_checkpoint, tmp_path, variant, shards):
    transformers = pytest.importorskip("transformers")
    src = write_checkpoint(**VARIANTS[variant])
    convert(src, tmp_path / "hf", "hf", shards=shards)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(0, 512, (2, 200), generator=torch.Generator().manual_seed(1))
    expected = Llama.build(src, max_seq_len=256, max_batch_size=2, device="cpu", dtype="float32").model(tokens)
    assert expected.std() > 0.3  # the logits are not all alike
    torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-4, rtol=0)


def test_transformers_gives_our_ids_and_chats_from_a_converted_directory(write_checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    src = write_checkpoint()
    convert(src, tmp_path / "hf", "hf")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(src / "tokenizer.model")
    text = "Hello  wörld 123!\n\n  it's"
    assert theirs(text).input_ids == ours.encode(text, bos=True)
    dialog = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "tool", "content": "42"},
    ]
    ids = theirs.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
    assert ids == ChatFormat(ours).encode_dialog_prompt(dialog)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert set(settings.eos_token_id) == ours.stop_tokens


def test_a_tokenizer_json_becomes_the_rank_file_it_was_made_from(write_checkpoint, tmp_path):
    src = write_checkpoint()
    convert(src, tmp_path / "hf", "hf")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes().split() == (
        (src / "tokenizer.model").read_bytes().split()
    )
    content = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    first, second = content["added_tokens"][:2]
    first["content"], second["content"] = second["content"], first["content"]
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"Meta's format has only the 256 special tokens .* has <\|end_of_text\|> in an"
    ):
        convert(tmp_path / "hf", tmp_path / "moved", "meta")
    assert not (tmp_path / "moved").exists()


@pytest.mark.parametrize("n_shards", [1, 2, 4, 8])  # 8: more than the 4 heads of keys
@pytest.mark.parametrize("source", ["one shard", "4 shards, embedding in columns", "hugging face"])
def test_shards_of_any_source_are_cut_like_metas(write_checkpoint, tmp_path, source, n_shards):
    whole = write_checkpoint(rope_theta=500000.0)
    src = whole
    if source == "hugging face":
        src = tmp_path / "hf"
        convert(whole, src, "hf", shards=2)
    elif source != "one shard":
        src = split_checkpoint(whole, tmp_path / "four", 4, embedding="columns")
    convert(src, tmp_path / "cut", "meta", shards=n_shards)
    slow = split_checkpoint(whole, tmp_path / "slow", n_shards, embedding="rows")  # the obvious way
    shards = sorted((tmp_path / "cut").glob("*.pth"))
    assert len(shards) == n_shards
    for path in shards:
        expected = torch.load(slow / path.name, weights_only=True)
        del expected["rope.freqs"]
        assert_same_bits(torch.load(path, weights_only=True), expected)


@pytest.mark.parametrize("n_shards", [1, 2, 4])
def test_llama_2s_embedding_is_cut_by_columns_as_in_metas_files(stories, tmp_path, n_shards):
    convert(stories, tmp_path / "cut", "meta", shards=n_shards)
    slow = split_checkpoint(stories, tmp_path / "slow", n_shards, embedding="columns")
    for path in sorted(slow.glob("*.pth")):
        expected = torch.load(path, weights_only=True)
        expected.pop("rope.freqs", None)
        assert_same_bits(torch.load(tmp_path / "cut" / path.name, weights_only=True), expected)


def test_files_are_valid_zip_archives_with_aligned_tensors(write_checkpoint, tmp_path):
    convert(write_checkpoint(dtype=torch.bfloat16), tmp_path / "cut", "meta", shards=2)
    for path in (tmp_path / "cut").glob("*.pth"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None  # check sums hold
        mapped = torch.load(path, weights_only=True, mmap=True)
        assert_same_bits(mapped, torch.load(path, weights_only=True))
        assert all(tensor.data_ptr() % PthFile.ALIGNMENT == 0 for tensor in mapped.values())
        assert all(tensor.is_contiguous() for tensor in mapped.values())


def test_safetensors_files_have_at_most_the_size_limit(write_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "MAX_FILE_BYTES", 150_000)
    src = write_checkpoint()
    convert(src, tmp_path / "hf", "hf")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    state = {}
    for path in files:
        assert path.stat().st_size < 150_000 + 3000  # and the header
        state |= safetensors_torch.load_file(path)
    assert len(files) == 5
    assert torch.equal(state["model.embed_tokens.weight"], load(src)["tok_embeddings.weight"])
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert index["weight_map"].keys() == state.keys()


def test_dtype_is_the_one_asked_for(write_checkpoint, tmp_path):
    src = write_checkpoint()
    convert(src, tmp_path / "hf", "hf", dtype="bfloat16")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    convert(tmp_path / "hf", tmp_path / "meta", "meta", dtype=torch.float16)
    expected = {name: tensor.bfloat16().half() for name, tensor in load(src).items()}
    assert_same_bits(load(tmp_path / "meta"), expected)


def test_numbers_beyond_float16_are_refused_and_not_made_infinite(write_checkpoint, tmp_path):
    src = write_checkpoint()
    state = load(src)
    state["layers.1.feed_forward.w2.weight"][3, 5] = 70000.0
    torch.save(state, src / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"layers.1.feed_forward.w2.weight has numbers beyond float16"):
        convert(src, tmp_path / "out", "hf", dtype="float16")
    assert names(tmp_path) == ["ckpt"]


def test_hugging_face_to_hugging_face_keeps_the_settings_of_the_directory(write_checkpoint, tmp_path):
    convert(write_checkpoint(), tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"max_position_embeddings": 777, "note": "x"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "generation_config.json").write_text('{"temperature": 0.5}')
    convert(tmp_path / "hf", tmp_path / "again", "hf", shards=2)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    assert (tmp_path / "again" / "generation_config.json").read_text() == '{"temperature": 0.5}'
    before, after = (open_checkpoint(tmp_path / name)[1] for name in ("hf", "again"))
    assert_same_bits(*({name: checkpoint.read(name) for name in checkpoint.shapes} for checkpoint in (before, after)))


def test_checklist_is_what_md5sum_checks(write_checkpoint, tmp_path):
    convert(write_checkpoint(), tmp_path / "hf", "hf", shards=2)
    result = subprocess.run(["md5sum", "-c", "checklist.chk"], cwd=tmp_path / "hf", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == len(names(tmp_path / "hf")) - 1


def anonymous_bytes() -> int:
    """Private memory of this process, without mapped files."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_memory_is_a_few_pieces_not_a_whole_tensor(write_checkpoint, tmp_path, monkeypatch, to):
    changes = {"dim": 512, "n_layers": 1, "vocab_size": 24000}
    largest = 24000 * 512 * 4
    src = write_checkpoint(**changes)
    split = split_checkpoint(src, tmp_path / "columns", 2, embedding="columns")  # no piece lies in one place
    monkeypatch.setattr(loading, "CHUNK_BYTES", 1 << 19)
    seen = []
    pieces = convert_module._part_bytes

    def watched(*arguments, **named):
        for piece in pieces(*arguments, **named):
            seen.append(anonymous_bytes())
            yield piece

    monkeypatch.setattr(convert_module, "_part_bytes", watched)
    convert(split, tmp_path / "out", to, shards=2)
    assert len(seen) > 60
    assert max(seen) - seen[0] < largest / 4


# --- what goes wrong


def test_an_existing_target_is_left_alone(write_checkpoint, tmp_path):
    src = write_checkpoint()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
            convert(src, tmp_path / name, "hf")
    assert names(tmp_path) == ["ckpt", "file", "full"]
    assert (tmp_path / "full" / "notes").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert(src, tmp_path / "empty", "hf")
    assert "model.safetensors" in names(tmp_path / "empty")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "gguf"}, r"to = 'gguf': expected 'meta' or 'hf'"),
        ({"to": "hf", "dtype": "int8"}, r"dtype = .*int8.*: expected bfloat16, float16, float32"),
        ({"to": "hf", "dtype": "half a float"}, r"dtype = 'half a float'"),
        ({"to": "hf", "shards": 0}, r"shards = 0: expected an integer of at least 1"),
        ({"to": "hf", "shards": 22}, r"shards = 22: expected at most 21, one for each tensor"),
        ({"to": "meta", "shards": 3}, r"shards = 3: 8 heads with 4 .* among \[1, 2, 4, 8\]"),
    ],
)
def test_an_impossible_conversion_is_refused_and_leaves_nothing(write_checkpoint, tmp_path, arguments, message):
    src = write_checkpoint()
    with pytest.raises(ValueError, match=message):
        convert(src, tmp_path / "out", **arguments)
    assert names(tmp_path) == ["ckpt"]


LIMITED = """
import resource, sys
from llama.checkpoint.convert import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # a file's largest size: writing fails in the middle
for to in ("hf", "meta"):
    try:
        convert(sys.argv[1], sys.argv[2], to)
    except OSError as error:
        print(error)
"""


def test_a_failed_write_leaves_nothing(write_checkpoint, tmp_path):
    src = write_checkpoint()
    result = run_python(LIMITED, src, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("out could not be written, and nothing of it is left: File too large") == 2
    assert names(tmp_path) == ["ckpt"]


@pytest.mark.parametrize("known_before", [True, False])
@pytest.mark.parametrize("to", ["hf", "meta"])
def test_a_full_disk_leaves_nothing(write_checkpoint, mount_disk, to, known_before):
    small_disk = mount_disk("2300k")
    src = write_checkpoint(dim=256 if known_before else 128)
    if not known_before:  # room for the weights, and for nothing else
        n_bytes = sum(tensor.nbytes for tensor in load(src).values())
        (small_disk / "other").write_bytes(bytes((shutil.disk_usage(small_disk).free - n_bytes) // 4096 * 4096))
    reason = "bytes are free" if known_before else "No space left on device"
    with pytest.raises(OSError, match=f"out could not be written, and nothing of it is left: .*{reason}.*it needs"):
        convert(src, small_disk / "out", to)
    assert names(small_disk) == ([] if known_before else ["other"])


KILLED = """
import os, signal, sys
from llama.checkpoint import convert as module
module.write_checklist = lambda folder: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is renamed yet
module.convert(sys.argv[1], sys.argv[2], "hf")
"""


def test_a_killed_conversion_leaves_no_target_and_the_next_one_clears_up(write_checkpoint, tmp_path):
    src = write_checkpoint()
    result = run_python(KILLED, src, tmp_path / "out")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert names(tmp_path) == [".out.partial", "ckpt"]
    assert "model.safetensors" in names(tmp_path / ".out.partial")
    convert(src, tmp_path / "out", "meta")
    assert names(tmp_path) == ["ckpt", "out"]
    assert names(tmp_path / "out") == ["checklist.chk", "consolidated.00.pth", "params.json", "tokenizer.model"]


def test_two_conversions_to_one_target_do_not_mix(write_checkpoint, tmp_path):
    src = write_checkpoint()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "theirs").touch()
    other = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another conversion is writing"):
            convert(src, tmp_path / "out", "hf")
        assert names(tmp_path / ".out.partial") == ["theirs"]
    finally:
        os.close(other)


def test_a_broken_source_leaves_nothing(write_checkpoint, tmp_path):
    src = write_checkpoint()
    convert(src, tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        convert(tmp_path / "hf", tmp_path / "out", "meta")
    assert names(tmp_path) == ["ckpt", "hf"]


def test_nothing_is_printed_if_stderr_is_no_terminal(write_checkpoint, tmp_path, capfd):
    convert(write_checkpoint(), tmp_path / "hf", "hf")
    assert capfd.readouterr() == ("", "")
