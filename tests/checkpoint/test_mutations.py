"""Checkpoints damaged at random: each is read, or refused with one clear error, quickly and in little memory."""

import io
import json
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import split_checkpoint
from mutate import count_refused, damaged, damaged_json, memory_limit

from llama.checkpoint import build_model, open_checkpoint
from llama.checkpoint.convert import convert, quantize
from llama.checkpoint.inspect import verify


def load_model(folder: Path, tokenizer_path, max_seq_len, max_batch_size, dtype, device, quantize=None) -> tuple:
    """As `Llama.build` does it."""
    _, checkpoint = open_checkpoint(folder, tokenizer_path, max_seq_len, max_batch_size)
    return build_model(checkpoint, dtype, device, quantize)


KINDS = ["meta", "shards", "hugging face", "hugging face, two files", "quantised"]


@pytest.fixture
def folder(request, write_checkpoint, tmp_path) -> Path:
    """A directory of the kind that the test asks for."""
    if request.param in ("meta", "shards"):
        whole = write_checkpoint(norm_eps=1e-5, rope_theta=5e5, use_scaled_rope=True, ffn_dim_multiplier=1.0)
        return whole if request.param == "meta" else split_checkpoint(whole, tmp_path / "split", 2)
    target = tmp_path / "target"
    if request.param == "quantised":
        quantize(write_checkpoint(dim=256, n_heads=4, n_kv_heads=2, multiple_of=128), target, "int4")
    else:
        convert(write_checkpoint(), target, "hf", shards=2 if request.param.endswith("two files") else None)
    return target


def read_all(folder: Path) -> None:
    """Opens a directory and touches every number in it."""
    _, checkpoint = open_checkpoint(folder)
    for name in checkpoint.shapes:
        tensor = checkpoint.read(name)
        (tensor if isinstance(tensor, torch.Tensor) else tensor.to_dense()).float().sum().item()


def damaged_at_the_end(rng: random.Random, data: bytes) -> bytes:
    """Damages the end, where a zip archive has its directory; elsewhere a change would mostly hit numbers."""
    n = rng.choice((100, 2000, 6000, len(data)))
    return data[:-n] + damaged(rng, data[-n:])


def damaged_pickle(rng: random.Random, data: bytes) -> bytes:
    """An archive with right check sums, whose pickle is damaged."""
    return with_pickle(data, lambda content: damaged(rng, content))


def with_pickle(data: bytes, edit: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for record in source.infolist():
            content = source.read(record)
            archive.writestr(record.filename, edit(content) if record.filename.endswith("data.pkl") else content)
    return target.getvalue()


def damaged_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with a wrong header."""
    length = struct.unpack("<Q", data[:8])[0]
    header = damaged_json(rng, data[8 : 8 + length])
    said = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 8 + len(header), 10**8, 2**63, 2**64 - 1))
    return struct.pack("<Q", said) + header + data[8 + length :]


@pytest.mark.parametrize(
    ("folder", "name", "damage", "n"),
    [
        ("meta", "params.json", damaged_json, 150),
        ("meta", "consolidated.00.pth", damaged_at_the_end, 80),
        ("meta", "consolidated.00.pth", damaged_pickle, 100),
        ("shards", "consolidated.01.pth", damaged_pickle, 60),
        ("hugging face", "config.json", damaged_json, 150),
        ("hugging face", "model.safetensors", damaged, 80),
        ("hugging face", "model.safetensors", damaged_header, 100),
        ("hugging face, two files", "model.safetensors.index.json", damaged_json, 150),
        ("quantised", "params.json", damaged_json, 100),
        ("quantised", "consolidated.00.pth", damaged_at_the_end, 50),
        ("quantised", "consolidated.00.pth", damaged_pickle, 60),
    ],
    indirect=["folder"],
)
def test_a_damaged_file_is_read_or_refused_by_its_name(folder, name, damage, n):
    refused = count_refused(folder / name, damage, lambda: read_all(folder), n)
    assert n / 4 < refused < n, "the damage is too slight, or too great, to say much"
    read_all(folder)


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_verify_lists_the_problems_of_a_damaged_directory_and_raises_nothing(folder):
    files = sorted(path for path in folder.iterdir() if path.suffix != ".chk")
    for number in range(25):
        rng = random.Random(number)
        path = rng.choice(files)
        data = path.read_bytes()
        path.write_bytes((damaged_json if path.suffix == ".json" else damaged)(rng, data))
        if rng.random() < 0.5:
            (folder / "checklist.chk").write_bytes(damaged(rng, f"{'0' * 32}  {path.name}\n".encode() * 3))
        assert isinstance(verify(folder).problems, list)
        path.write_bytes(data)


@pytest.mark.parametrize("folder", ["meta"], indirect=True)
def test_impossible_shapes_are_refused_before_anything_is_allocated(folder):
    path = folder / "params.json"
    params = json.loads(path.read_text())
    started = time.perf_counter()
    with memory_limit(100_000_000):
        for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "vocab_size"):
            for value in (1 << 40, 10**400, -1, 0, 9_999, True, "64", 64.0, float("nan")):
                if (key, value) == ("vocab_size", -1):  # Llama 2's files leave it to the tokenizer
                    continue
                path.write_text(json.dumps(params | {key: value}))
                with pytest.raises(ValueError, match=r"params\.json|consolidated\.00\.pth"):
                    open_checkpoint(folder)
    assert time.perf_counter() - started < 20
    path.write_text(json.dumps(params | {"dim": None}))
    with pytest.raises(ValueError, match=r"params.json: dim is missing: expected a positive integer"):
        open_checkpoint(folder)
    path.write_text(json.dumps(params | {"n_layers": 1 << 40}))
    with pytest.raises(ValueError, match=r"n_layers is 1099511627776: expected .* from 1 to 10000"):
        open_checkpoint(folder)


class Allocates:
    """A large bytearray: PyTorch's own check of what a pickle may call allows it."""

    def __reduce__(self):
        return bytearray, (4_000_000_000,)


class Huge:
    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (1, 0, (1 << 40,), (1,), False, None)


@pytest.mark.parametrize("folder", ["meta"], indirect=True)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": Allocates()}, 2), "holds more than tensors.*bytearray"),
        (pickle.dumps({"a": Huge()}, 2), "is not a whole PyTorch checkpoint"),
        (pickle.dumps({"a": [1]}, 2), "expected a dictionary of tensor names to tensors"),
        (pickle.dumps([], 2), "holds a list: expected a dictionary"),
        (b"\x80\x02h\x40.", r"is not a whole PyTorch checkpoint: KeyError: 64"),
        (b"\x80\x02K\x01Q.", r"is not a whole PyTorch checkpoint: AssertionError"),
        (b"\x80\x02" + b"(" * 100_000 + b".", r"is not a whole PyTorch checkpoint"),
        (b"", r"is not a whole PyTorch checkpoint"),
    ],
)
def test_a_pickle_of_anything_but_tensors_is_refused(folder, content, message):
    path = folder / "consolidated.00.pth"
    path.write_bytes(with_pickle(path.read_bytes(), lambda _: content))
    with memory_limit(100_000_000), pytest.raises(ValueError, match=message) as error:
        open_checkpoint(folder)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("folder", ["meta"], indirect=True)
def test_a_small_file_that_unpacks_to_a_large_one_is_refused(folder):
    path = folder / "consolidated.00.pth"
    path.write_bytes(with_pickle(path.read_bytes(), lambda content: content + bytes(2 * 10**8), zipfile.ZIP_DEFLATED))
    with memory_limit(100_000_000), pytest.raises(ValueError, match=r"00\.pth .* compresses nothing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("folder", ["meta"], indirect=True)
def test_a_changed_pickle_is_noticed_by_its_check_sum(folder):
    path = folder / "consolidated.00.pth"
    data = bytearray(path.read_bytes())
    at = data.index(b"layers.0.attention.wq.weight")
    data[at + 7] = ord("1")  # the names and shapes of another sound file
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"consolidated.00.pth .*the check sum of its data.pkl is wrong"):
        open_checkpoint(folder)


@pytest.mark.parametrize("folder", ["meta"], indirect=True)
def test_files_without_check_sums_are_read(folder):
    path = folder / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    _, checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.read("output.weight"), state["output.weight"])


@pytest.mark.parametrize("folder", ["hugging face"], indirect=True)
def test_a_reward_models_context_is_bounded(folder):
    from llama.rejection_sampling.reward_model import RewardModel

    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "max_position_embeddings": 10**12}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: max_position_embeddings is 1000000000000: expected"):
        RewardModel.build(folder, device="cpu")


@pytest.mark.parametrize("folder", ["meta"], indirect=True)
def test_a_damaged_checkpoint_that_loads_also_runs(folder):
    """Numbers that are within their limits give finite logits."""
    path, n_built = folder / "params.json", 0
    data = path.read_bytes()
    for number in range(250):
        path.write_bytes(damaged_json(random.Random(number), data))
        try:
            open_checkpoint(folder)
        except ValueError:
            continue
        model, _ = load_model(folder, None, 16, 1, None, torch.device("cpu"))
        assert model.forward(torch.tensor([[1, 5, 9]])).isfinite().all(), number
        n_built += 1
    assert n_built > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_seq_len": 0}, "max_seq_len = 0: expected an integer of at least 1"),
        ({"max_seq_len": 10**5000}, r"max_seq_len has \d+ bits: expected an integer of at most"),
        ({"max_batch_size": "8"}, "max_batch_size = '8': expected an integer"),
        ({"dtype": "int8"}, "dtype = 'int8': expected bfloat16, float16, float32 or float64"),
        ({"dtype": torch.int8}, "dtype = torch.int8: expected bfloat16"),
        ({"quantize": "int3"}, "quantize = 'int3': expected 'int8' or 'int4', or None"),
    ],
)
def test_arguments_are_checked_before_weights_are_read(write_checkpoint, arguments, message):
    defaults = {"tokenizer_path": None, "max_seq_len": 16, "max_batch_size": 1, "dtype": None}
    with pytest.raises(ValueError, match=message):
        load_model(write_checkpoint(), **defaults | {"device": torch.device("cpu")} | arguments)


@pytest.mark.parametrize("sizes", [(1 << 40, 1), (64, 1 << 40)])
def test_too_little_memory_is_a_memory_error_that_says_what_to_do(write_checkpoint, sizes):
    with pytest.raises(MemoryError, match=r"max_batch_size = \d+: `python -m llama info` says what it takes"):
        load_model(write_checkpoint(), None, *sizes, None, torch.device("cpu"))
