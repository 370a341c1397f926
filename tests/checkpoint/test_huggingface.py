"""Hugging Face directories, as Transformers itself writes them, read into our model; and those that must be refused."""

import json
import random
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model, ranks, write_byte_tokenizer
from test_model import transformers_model

from llama import Llama, ModelArgs, Tokenizer
from llama.checkpoint.config import LLAMA3_SCALING, args_from_config, feed_forward_params
from llama.checkpoint.huggingface import HuggingFaceCheckpoint, rows_in_halves, rows_in_pairs
from llama.checkpoint.meta import full_shapes, partition_dim, slice_of_rank
from llama.checkpoint.open import open_checkpoint
from llama.checkpoint.writer import safetensors_header
from llama.tokenizer.rank_file import LLAMA3_PATTERN
from llama.tokenizer.tokenizer_json import tokenizer_json

pytest.importorskip("transformers", reason="pip install transformers to compare with it")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="pip install safetensors to read its files")

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 16, "vocab_size": 512}
LLAMA_31 = {"rope_theta": 500000.0, "use_scaled_rope": True, "max_seq_len": 256}
VARIANTS = {
    "llama 2": {"n_kv_heads": 8},
    "llama 3, odd hidden size": {"rope_theta": 500000.0, "ffn_dim_multiplier": 1.37, "multiple_of": 7},
    "llama 3.1": LLAMA_31,
    "llama 3.2: tied, scaled by 32": LLAMA_31 | {"rope_scale_factor": 32.0, "tied_embeddings": True},
}


@pytest.fixture
def write_directory(tmp_path):
    """Saves random weights with Transformers' save_pretrained; returns the directory and its model."""

    def write(max_shard_size: str = "5GB", **changes):
        folder = tmp_path / "hf"
        theirs = transformers_model(random_model(**SHAPE | changes))
        theirs.save_pretrained(folder, max_shard_size=max_shard_size)
        write_byte_tokenizer(folder / "tokenizer.model", SHAPE["vocab_size"] - 256)
        return folder, theirs

    return write


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def build(folder: Path) -> Llama:
    return Llama.build(folder, max_seq_len=256, max_batch_size=2, device="cpu")


@pytest.mark.parametrize("files", ["one file", "files with an index", "files without their index"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_directory_of_transformers_gives_its_logits(write_directory, variant, files):
    folder, theirs = write_directory("5GB" if files == "one file" else "250KB", **VARIANTS[variant])
    assert (len(list(folder.glob("*.safetensors"))) == 1) == (files == "one file")
    if files == "files without their index":
        (folder / "model.safetensors.index.json").unlink()
    tokens = torch.randint(0, 512, (2, 200), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert expected.std() > 0.3  # the logits are not all alike
    torch.testing.assert_close(build(folder).model(tokens), expected, atol=1e-4, rtol=0)


def test_rows_are_reordered_there_and_back():
    rows = torch.arange(16).unsqueeze(1).expand(16, 3)  # two heads of 8
    assert rows_in_halves(rows, 8)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(rows_in_pairs(rows_in_halves(rows, 8), 8), rows)


@pytest.mark.parametrize("n_ranks", [1, 2, 4, 8])  # 8: more than the 4 heads of keys
def test_the_slices_of_ranks_equal_the_full_tensors_and_are_mapped_from_the_file(write_directory, n_ranks):
    folder, _ = write_directory()
    _, checkpoint = open_checkpoint(folder)
    for name, shape in checkpoint.shapes.items():
        full, dim = checkpoint.read(name), partition_dim(name)
        assert full.shape == shape
        for rank in range(n_ranks if dim is not None else 0):
            start, stop = slice_of_rank(name, shape[dim], checkpoint.args, rank, n_ranks)
            part = checkpoint.read(name, dim, start, stop)
            assert torch.equal(part, full.narrow(dim, start, stop - start)), name
            if name.endswith((".wq.weight", ".wk.weight")):  # a copy, of this rank's rows alone
                assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
            else:
                assert mapped_file(part) == str(folder / "model.safetensors")


def mapped_file(tensor: torch.Tensor) -> str | None:
    """The file that a tensor's memory is a map of."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return " ".join(line.split()[5:]) or None
    return None


SCRIPT = """
import sys
from llama import Llama
llm = Llama.build(sys.argv[1], max_seq_len=64, device="cpu")
print(llm.generate([[1, 5, 9], [7]], max_gen_len=20, temperature=0)[0])
"""


def test_two_processes_give_the_tokens_of_one(write_directory, tmp_path):
    folder, _ = write_directory("250KB", **LLAMA_31)
    expected = Llama.build(folder, max_seq_len=64, device="cpu").generate(
        [[1, 5, 9], [7]], max_gen_len=20, temperature=0
    )[0]
    (tmp_path / "script.py").write_text(SCRIPT)
    result = ranks(2, tmp_path / "script.py", folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(expected)


# --- config.json


def test_the_keys_of_transformers_4_and_5_mean_the_same(tmp_path):
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 8, "vocab_size": 512, "rms_norm_eps": 1e-5}
    scaling = {"rope_type": "llama3", "factor": 32.0, **LLAMA3_SCALING}
    old = args_from_config(config | {"rope_theta": 5e5, "rope_scaling": scaling}, tmp_path, 512, 64, 1)
    new = args_from_config(config | {"rope_parameters": {"rope_theta": 5e5, **scaling}}, tmp_path, 512, 64, 1)
    assert old == new
    assert (new.rope_theta, new.use_scaled_rope, new.rope_scale_factor, new.n_kv_heads) == (5e5, True, 32.0, 8)
    plain = args_from_config(config | {"rope_scaling": None}, tmp_path, 512, 64, 1)
    assert (plain.rope_theta, plain.use_scaled_rope) == (10000.0, False)


def test_any_hidden_size_is_reproduced_and_published_ones_have_metas_params():
    chosen = random.Random(0)
    for _ in range(2000):
        dim, hidden_dim = chosen.randrange(2, 20000, 2), chosen.randrange(1, 60000)
        multiple_of, multiplier = feed_forward_params(dim, hidden_dim)
        args = ModelArgs(dim=dim, n_heads=1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
        assert args.hidden_dim == hidden_dim
    assert feed_forward_params(4096, 11008) == (256, None)  # Llama 2 7B
    assert feed_forward_params(4096, 14336) == (1024, 1.3)  # Llama 3 8B
    assert feed_forward_params(8192, 28672) == (4096, 1.3)  # Llama 2 and 3 70B
    assert feed_forward_params(2048, 8192) == (256, 1.5)  # Llama 3.2 1B


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, r"model_type is 'mistral': only 'llama' is supported"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            r"is a reward model, .* \(LlamaForSequenceClassification\): expected a language model",
        ),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu': only 'silu' is supported"),
        ({"attention_bias": True}, r"attention_bias is True: only False"),
        ({"mlp_bias": True}, r"mlp_bias is True: only False"),
        ({"head_dim": 16}, r"head_dim is 16: only 8 is supported"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is \{'bits': 4\}: only None"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type .* is 'linear': only 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_type .* is 'yarn': only 'llama3'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3_SCALING, "high_freq_factor": 8.0}},
            r"high_freq_factor is 8.0: only 4.0",
        ),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}}, r"factor is missing: expected a positive number"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0.5: only 1"),
        ({"hidden_size": None}, r"hidden_size is missing: expected a positive integer"),
        ({"num_hidden_layers": "2"}, r"num_hidden_layers is '2': expected a positive integer"),
        ({"num_key_value_heads": 3}, r"config.json: dim = 64, n_heads = 8, n_kv_heads = 3"),
        ({"vocab_size": 640}, r"vocab_size 640, but the tokenizer has 512 tokens"),
        ({"num_hidden_layers": 3}, r"lacks model\.layers\.2\..* and 8 more: .*num_hidden_layers 3"),
        ({"num_hidden_layers": 1}, r"has unexpected model\.layers\.1\..* and 8 more"),
        ({"intermediate_size": 160}, r"gate_proj.weight has shape \[176, 64\]: expected \[160, 64\]"),
    ],
)
def test_a_config_of_another_model_is_refused(write_directory, change, message):
    folder, _ = write_directory()
    change_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


# --- files


def rewrite(path: Path, edit) -> None:
    """Writes a safetensors file again, with header and data changed by `edit`."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = edit(json.loads(data[8 : 8 + length]), data[8 + length :])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def lie(field: str, change):
    def edit(header, body):
        header["model.norm.weight"][field] = change(header["model.norm.weight"][field])
        return header, body

    return lambda path: rewrite(path, edit)


def save_again(**changes):
    """Writes the tensors again, with changes: a tensor, or None for none."""

    def damage(path: Path) -> None:
        state = safetensors_torch.load_file(path)
        state |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
        safetensors_torch.save_file({name: t for name, t in state.items() if t is not None}, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"is not a whole safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), r"\(1,000 bytes\) is not a whole safetensors file"),
        (lambda path: path.write_bytes(b""), r"\(0 bytes\) is not a whole safetensors file"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), r"header too large"),
        (lambda path: path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:]), r"header too large"),
        (lie("data_offsets", lambda ends: [ends[0] + 2**40, ends[1] + 2**40]), r"is not a whole safetensors file"),
        (lie("data_offsets", lambda ends: [ends[0] - 8, ends[1] - 8]), r"is not a whole safetensors file.*offset"),
        (lie("shape", lambda shape: [shape[0] * 2]), r"is not a whole safetensors file.*shape"),
        (lie("shape", lambda shape: [-64]), r"is not a whole safetensors file"),
        (lie("dtype", lambda dtype: "F16"), r"is not a whole safetensors file"),
        (save_again(model__norm__weight=None), r"lacks model\.norm\.weight: expected the 21 tensors"),
        (save_again(surplus=torch.zeros(2)), r"has unexpected surplus"),
        (save_again(lm_head__weight=None), r"lacks lm_head.*tie_word_embeddings False"),
        (save_again(model__norm__weight=torch.ones(32)), r"model.norm.weight has shape \[32\]: expected \[64\]"),
        (
            save_again(model__norm__weight=torch.ones(64).half()),
            r"torch.float32 \(.*\) and torch.float16 \(model.norm.weight\)",
        ),
        (lambda path: path.unlink(), r"expected model.safetensors, or model-00001-of-0000N.safetensors"),
        (lambda path: path.rename(path.with_name("pytorch_model.bin")), r"\.bin files are not read"),
    ],
)
def test_a_damaged_file_is_one_clear_error(write_directory, damage, message):
    folder, _ = write_directory()
    damage(folder / "model.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_checkpoint(folder)


def edit_index(edit):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), r"model-00002-of-00003.*is missing"),
        (
            lambda folder: [
                (folder / name).unlink()
                for name in ("model-00003-of-00003.safetensors", "model.safetensors.index.json")
            ],
            r"model-00003-of-00003.safetensors is missing",
        ),
        (edit_index(lambda names: names.update({"lm_head.weight": "absent.safetensors"})), r"absent.*is missing"),
        (edit_index(lambda names: names.update({"x": "../../x.safetensors"})), r"names '../../x.safetensors'"),
        (edit_index(lambda names: names.update({"y": "model-00001-of-00003.safetensors"})), r"y is in .* not hold it"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), r"no usable weight_map"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weig'), r"not valid JSON"),
        (
            lambda folder: (folder / "model-00001-of-00003.safetensors").write_bytes(
                (folder / "model-00002-of-00003.safetensors").read_bytes()
            ),
            r"both hold model\.",
        ),
    ],
)
def test_a_broken_index_is_one_clear_error(write_directory, damage, message):
    folder, _ = write_directory("250KB")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_checkpoint(folder)


def test_a_copy_of_the_tied_embedding_is_ignored(write_directory):
    folder, _ = write_directory(**VARIANTS["llama 3.2: tied, scaled by 32"])
    save_again(lm_head__weight=torch.zeros(512, 64))(folder / "model.safetensors")
    weights = build(folder).model.state_dict()
    assert weights["output.weight"].std() > 0
    assert torch.equal(weights["output.weight"], weights["tok_embeddings.weight"])


def test_rotary_angles_in_a_file_are_ignored_and_unaligned_numbers_are_read(write_directory):
    folder, _ = write_directory()
    expected = build(folder).model.state_dict()
    save_again(**{"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)})(folder / "model.safetensors")
    # safetensors' own writer pads the header to 8 bytes; the format does not require it.
    rewrite(folder / "model.safetensors", lambda header, body: (header | {"__metadata__": {"a": "b" * 3}}, body))
    length = struct.unpack("<Q", (folder / "model.safetensors").read_bytes()[:8])[0]
    assert length % 4 != 0
    for name, tensor in build(folder).model.state_dict().items():
        assert torch.equal(tensor, expected[name])
        assert tensor.data_ptr() % 4 == 0


# --- which kind of directory


def test_a_directory_of_neither_kind_names_both(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"holds notes.txt; expected params.json and .*, or config.json and"):
        open_checkpoint(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"does not exist: expected a directory with params.json .* config.json"
    ):
        open_checkpoint(tmp_path / "absent")


def test_metas_files_are_preferred_but_only_with_their_shards(write_checkpoint, write_directory):
    meta, (folder, _) = write_checkpoint(), write_directory()
    (folder / "params.json").write_text("{}")
    assert isinstance(open_checkpoint(folder)[1], HuggingFaceCheckpoint)
    (meta / "config.json").write_text("{}")
    assert not isinstance(open_checkpoint(meta)[1], HuggingFaceCheckpoint)


def test_without_the_safetensors_package_the_error_says_how_to_get_it(write_directory, monkeypatch):
    folder, _ = write_directory()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        open_checkpoint(folder)


def test_tokenizer_json_is_used_if_there_is_no_tokenizer_model(write_directory):
    folder, _ = write_directory()
    expected = Tokenizer(folder / "tokenizer.model")
    text = tokenizer_json(expected.ranks, expected.special_tokens, "<|begin_of_text|>", LLAMA3_PATTERN)
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer.model").unlink()
    llm = build(folder)
    assert llm.tokenizer.ranks == expected.ranks
    dialog = [{"role": "user", "content": "hi"}]
    assert llm.formatter.encode_dialog_prompt(dialog)[0] == expected.bos_id
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer file .*tokenizer.model, nor a tokenizer.json"):
        open_checkpoint(folder)


def test_the_library_reads_the_header_that_we_write(tmp_path):
    shapes = full_shapes(ModelArgs(**SHAPE))
    header = safetensors_header(shapes, torch.bfloat16)
    size = sum(torch.Size(shape).numel() for shape in shapes.values()) * 2
    (tmp_path / "x.safetensors").write_bytes(header + bytes(size))
    assert {n: tuple(t.shape) for n, t in safetensors_torch.load_file(tmp_path / "x.safetensors").items()} == shapes
    assert len(header) % 8 == 0
