"""Loading: any number of shards on any number of processes, what it costs in memory, and broken directories."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_model, ranks, run_python, split_checkpoint, torchrun

from llama import Llama
from llama.checkpoint import loading
from llama.checkpoint.loading import StagedCopy, load_weights
from llama.checkpoint.meta import MetaCheckpoint
from llama.model import ModelArgs, Transformer

# For every directory of a folder, on the processes of this run: the error of the golden tokens' logprobs, the likeliest
# tokens, and, for the first directory, the greedy answer.
RESHARD_SCRIPT = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from llama import Llama

folder, expected, n_new = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
ids = expected["prompt_tokens"] + expected["tokens"]
found = {}
for path in sorted(folder.iterdir()):
    llm = Llama.build(path, max_seq_len=256, max_batch_size=1, device="cpu")
    with torch.inference_mode():
        likeliest = llm.model.forward(torch.tensor([ids]))[0, :-1].argmax(-1).tolist()
    _, [logprobs] = llm.generate([ids], max_gen_len=0, logprobs=True, echo=True)
    off = max(abs(a - b) for a, b in zip(logprobs[1:], expected["logprobs"], strict=True))
    found[path.name] = {"off": off, "likeliest": likeliest}
    if len(found) == 1 and n_new:
        [answer], _ = llm.generate([expected["prompt_tokens"]], max_gen_len=n_new, temperature=0)
        found[path.name]["answer"] = answer
if dist.get_rank() == 0:
    print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def split_stories(stories, tmp_path_factory) -> Path:
    """The same weights as 1, 2, 4 and 8 shards, the embedding cut in each of the two ways."""
    folder = tmp_path_factory.mktemp("shards")
    for n_shards in (1, 2, 4, 8):
        for embedding in ("rows", "columns"):
            split_checkpoint(stories, folder / f"{n_shards}-{embedding}", n_shards, embedding)
    return folder


@pytest.mark.parametrize("n_ranks, n_new", [(1, 200), (2, 200), (4, 24), (8, 12)])
def test_any_number_of_shards_on_any_number_of_processes(split_stories, stories, tmp_path, n_ranks, n_new):
    expected = json.loads((stories / "expected.json").read_text())
    script = tmp_path / "reshard.py"
    script.write_text(RESHARD_SCRIPT)
    run = ranks(n_ranks, script, split_stories, stories / "expected.json", n_new)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.split("FOUND")[1])
    assert sorted(found) == sorted(f"{n}-{cut}" for n in (1, 2, 4, 8) for cut in ("rows", "columns"))
    for name, result in found.items():
        assert result["off"] < 1e-4, name
        assert result["likeliest"] == expected["tokens"], name
    assert found["1-columns"]["answer"] == expected["tokens"][:n_new]


def test_uneven_shards_give_back_every_tensor_bit_for_bit(write_checkpoint, tmp_path):
    source = write_checkpoint(vocab_size=515)  # over 2 shards: 257 and 258 rows
    split = split_checkpoint(source, tmp_path / "split", 2, "rows")
    assert_same_tensors(split, source, vocab_size=515)


def assert_same_tensors(folder: Path, source: Path, **shape) -> None:
    params = json.loads((source / "params.json").read_text()) | shape
    whole = torch.load(source / "consolidated.00.pth", weights_only=True)
    opened = MetaCheckpoint(folder, ModelArgs(**params))
    for name in opened.shapes:
        assert torch.equal(opened.read(name), whole[name]), name


# --- memory -----------------------------------------------------------------------------------------------------------

MEDIUM = {"dim": 512, "n_layers": 12, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 256, "vocab_size": 4096}


@pytest.fixture(scope="module")
def medium(tmp_path_factory) -> Path:
    """About 160 MB of float32."""
    folder = tmp_path_factory.mktemp("medium")
    state = random_model(**MEDIUM).state_dict()
    torch.save(state, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(MEDIUM))
    return folder


# Loads this rank's share; prints the bytes of its weights, and the largest growth of private memory.
MEMORY_SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import torch
import torch.distributed as dist
from llama.checkpoint import meta as checkpoint
from llama.checkpoint import loading
from llama import parallel
from llama.model import ModelArgs, Transformer

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

dtype, results, folders = getattr(torch, sys.argv[1]), sys.argv[2], sys.argv[3:]
parallel.initialize(device=torch.device("cpu"))
torch.ones(1 << 10, 1 << 10).to(torch.bfloat16).sum()  # the thread pool
found = []
for folder in map(Path, folders):
    args = ModelArgs(**json.loads((folder / "params.json").read_text()))
    before = peak = private()
    done = threading.Event()

    def watch():
        global peak
        while not done.wait(0.001):
            peak = max(peak, private())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with torch.device("meta"):
        model = Transformer(args)
    loaded = loading.load_weights(model, checkpoint.MetaCheckpoint(folder, args), dtype, torch.device("cpu"))
    done.set()
    watcher.join()
    grown = max(peak, private()) - before
    found.append({"weights": loaded.n_bytes, "mapped": loaded.n_mapped, "grown": grown})
    del model
Path(results, f"{dist.get_rank()}.json").write_text(json.dumps(found))
"""


def test_mapped_weights_take_no_memory(medium, tmp_path):
    run = run_python(MEMORY_SCRIPT, "float32", tmp_path, medium, is_forked=False)
    assert run.returncode == 0, run.stderr
    [found] = json.loads((tmp_path / "0.json").read_text())
    assert found["mapped"] == found["weights"] > 100e6
    assert found["grown"] < 0.1 * found["weights"]


def test_weights_of_another_dtype_are_in_memory_once(medium, tmp_path):
    run = run_python(MEMORY_SCRIPT, "bfloat16", tmp_path, medium, is_forked=False)
    assert run.returncode == 0, run.stderr
    [found] = json.loads((tmp_path / "0.json").read_text())
    assert found["mapped"] == 0
    assert found["grown"] < 1.1 * found["weights"]


def test_each_of_4_processes_holds_at_most_its_quarter(medium, tmp_path):
    split = split_checkpoint_without_tokenizer(medium, tmp_path / "split")
    script = tmp_path / "memory.py"
    script.write_text(MEMORY_SCRIPT)
    whole = (medium / "consolidated.00.pth").stat().st_size
    # From one file, where columns are copied, and from two.
    run = torchrun(4, script, "float32", tmp_path, medium, split)
    assert run.returncode == 0, run.stderr
    for rank in range(4):
        for found in json.loads((tmp_path / f"{rank}.json").read_text()):
            assert found["grown"] < 1.05 * whole / 4


def split_checkpoint_without_tokenizer(source: Path, target: Path) -> Path:
    (source / "tokenizer.model").touch()
    return split_checkpoint(source, target, 2, "rows")


@pytest.mark.parametrize("n_shards, dtype", [(1, torch.float32), (1, torch.float64), (4, torch.float64)])
def test_copying_in_small_pieces_gives_the_same_numbers(write_checkpoint, tmp_path, monkeypatch, n_shards, dtype):
    source = write_checkpoint()
    folder = split_checkpoint(source, tmp_path / "split", n_shards) if n_shards > 1 else source
    args = ModelArgs(**json.loads((source / "params.json").read_text()))
    monkeypatch.setattr(loading, "CHUNK_BYTES", 4096)
    opened = MetaCheckpoint(folder, args)
    with torch.device("meta"):
        model = Transformer(args)
    load_weights(model, opened, dtype, torch.device("cpu"))
    for name, tensor in torch.load(source / "consolidated.00.pth", weights_only=True).items():
        assert torch.equal(model.state_dict()[name], tensor.to(dtype)), name


@pytest.mark.parametrize("staged", [False, True])
def test_a_slice_copied_in_small_pieces_is_that_slice(write_checkpoint, tmp_path, monkeypatch, staged):
    source = write_checkpoint()
    folder = split_checkpoint(source, tmp_path / "split", 4)
    whole = torch.load(source / "consolidated.00.pth", weights_only=True)
    monkeypatch.setattr(loading, "CHUNK_BYTES", 2048)
    opened = MetaCheckpoint(folder, ModelArgs(**json.loads((source / "params.json").read_text())))
    copier = StagedCopy(torch.device("cpu"), buffer_bytes=1000) if staged else None
    for name, full in opened.shapes.items():
        for dim in range(len(full)):
            for start, stop in ((0, full[dim]), (full[dim] // 4, full[dim] // 2), (full[dim] // 2, full[dim])):
                found = loading._copy(opened, name, (dim, start, stop), torch.float64, torch.device("cpu"), copier)
                assert torch.equal(found, whole[name].narrow(dim, start, stop - start).double()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_staged_copy_equals_a_plain_one(dtype):
    copier = StagedCopy(torch.device("cpu"), buffer_bytes=1000)
    source = torch.randn(333, 7).to(torch.bfloat16)  # 14 bytes a row: several buffers, the last not full
    for part in (source, source[:, 2:5], source[:0], source[5], source[:71]):
        target = torch.full(part.shape, 9.0, dtype=dtype)
        copier.copy(part, target)
        assert torch.equal(target, part.to(dtype))
    wide = torch.zeros(333, 10, dtype=dtype)
    copier.copy(source, wide[:, 1:8])
    assert torch.equal(wide[:, 1:8], source.to(dtype))
    assert wide[:, 0].sum() == wide[:, 8:].sum() == 0
    copier.finish()


def test_pages_that_were_read_leave_memory_and_can_be_read_again(medium):
    def resident_file_pages() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssFile")).split()[1])

    opened = MetaCheckpoint(medium, ModelArgs(**MEDIUM))
    tensors = [opened.read(name) for name in opened.shapes if opened.shapes[name][0] > 1000]
    before = resident_file_pages()
    sums = [float(tensor.sum()) for tensor in tensors]
    n_read = sum(tensor.nbytes for tensor in tensors)
    assert resident_file_pages() - before > 0.9 * n_read
    for tensor in tensors:
        loading.drop_pages(tensor)
    assert resident_file_pages() - before < 0.1 * n_read
    assert [float(tensor.sum()) for tensor in tensors] == sums


def test_the_load_is_announced_with_size_speed_and_device(write_checkpoint, capsys):
    Llama.build(write_checkpoint(), max_seq_len=16, max_batch_size=1, device="cpu")
    line = capsys.readouterr().out
    assert line.startswith("Loaded in ")
    seconds, rest = line.removeprefix("Loaded in ").split(" seconds: ")
    assert len(seconds.split(".")[1]) == 2
    assert " GB on cpu, " in rest and " GB/s" in rest


# --- bad input --------------------------------------------------------------------------------------------------------


def edit_shard(folder: Path, number: int, edit) -> None:
    path = folder / f"consolidated.{number:02d}.pth"
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


def truncate(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-1000])


def another_model_of_the_same_shape(folder: Path) -> None:
    edit_shard(folder, 1, lambda state: state["layers.1.ffn_norm.weight"].mul_(1.001))


def another_model(folder: Path) -> None:
    edit_shard(folder, 1, lambda state: state.update({"layers.0.attention.wq.weight": torch.zeros(32, 96)}))


def half_in_bfloat16(folder: Path) -> None:
    edit_shard(folder, 1, lambda state: state.update({name: tensor.bfloat16() for name, tensor in state.items()}))


def one_in_bfloat16(folder: Path) -> None:
    name = "layers.0.attention.wo.weight"
    edit_shard(folder, 0, lambda state: state.update({name: state[name].bfloat16()}))


def nan_in_a_norm(folder: Path) -> None:
    for number in (0, 1):
        edit_shard(folder, number, lambda state: state["norm.weight"][3].fill_(float("nan")))


class Payload:
    """What a malicious file would run."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def malicious(folder: Path) -> None:
    edit_shard(folder, 1, lambda state: state.update({"norm.weight": Payload(folder.parent / "payload-has-run")}))


def malicious_plain_pickle(folder: Path) -> None:
    (folder / "consolidated.01.pth").write_bytes(pickle.dumps(Payload(folder.parent / "payload-has-run")))


BAD = [
    (truncate, "consolidated.01.pth", "is not a whole PyTorch checkpoint"),
    (
        lambda folder: (folder / "consolidated.01.pth").write_bytes(b""),
        "consolidated.01.pth",
        "(0 bytes) is not a whole",
    ),
    (
        lambda folder: (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth"),
        "consolidated.02.pth, but consolidated.01.pth is missing",
        "",
    ),
    (another_model, "consolidated.01.pth: layers.0.attention.wq.weight has shape [32, 96]", "parts of [64, 64]"),
    (another_model_of_the_same_shape, "consolidated.00.pth are not shards of one model", "layers.1.ffn_norm.weight"),
    (lambda folder: edit_shard(folder, 1, lambda s: s.pop("norm.weight")), "01.pth lacks norm.weight", "n_layers = 2"),
    (lambda folder: edit_shard(folder, 1, lambda s: s.update(x=s["norm.weight"])), "01.pth has unexpected x", ""),
    (half_in_bfloat16, "torch.float32 (consolidated.00.pth", "torch.bfloat16 (consolidated.01.pth"),
    (one_in_bfloat16, "torch.bfloat16 (consolidated.00.pth layers.0.attention.wo.weight)", "for all of them"),
    (
        lambda folder: [edit_shard(folder, i, lambda s: s.update({k: v.int() for k, v in s.items()})) for i in (0, 1)],
        "torch.int32",
        "expected one of torch.bfloat16",
    ),
    (nan_in_a_norm, "norm.weight has numbers that are not finite", ""),
    (malicious, "holds more than tensors", "nothing was run"),
    (malicious_plain_pickle, "or no checkpoint at all", "nothing of it was run"),
]


def write_bad_directories(source: Path, folder: Path) -> None:
    folder.mkdir()
    for number, (damage, *_) in enumerate(BAD):
        shutil.copytree(source, folder / f"{number:02d}")
        damage(folder / f"{number:02d}")


BAD_SCRIPT = """
import json, os, sys
from pathlib import Path
from llama import Llama
found = []
rank = os.environ["RANK"]
good = Path(sys.argv[2], "good")
for paths in [[path, path] for path in sorted(Path(sys.argv[1]).iterdir())] + [[good, Path(sys.argv[1], "00")]]:
    try:
        Llama.build(paths[int(rank)], max_seq_len=16, max_batch_size=1, device="cpu")
        found.append("nothing raised")
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        found.append(f"{type(error).__name__}: {error}")
Path(sys.argv[2], rank + ".json").write_text(json.dumps(found))
"""


def test_broken_directories_are_one_clear_error_on_every_rank(write_checkpoint, tmp_path):
    source = split_checkpoint(write_checkpoint(), tmp_path / "good", 2)
    write_bad_directories(source, tmp_path / "bad")
    script = tmp_path / "bad.py"
    script.write_text(BAD_SCRIPT)
    run = ranks(2, script, tmp_path / "bad", tmp_path)
    assert run.returncode == 0, run.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for messages in found:
        for message, (_, *parts) in zip(messages[:-1], BAD, strict=True):
            assert message.startswith(("ValueError", "FileNotFoundError")), message
            assert all(part in message for part in parts), (message, parts)
    # The last directory was broken only on rank 1.
    assert found[1][-1] == found[1][0]
    assert found[0][-1] == f"RankFailed: rank 1 failed: {found[1][0]}"
    assert not (tmp_path / "bad" / "payload-has-run").exists()


def test_the_payload_of_the_malicious_file_is_real(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_files_from_before_pytorch_1_6_are_refused_with_a_remedy(write_checkpoint):
    folder = write_checkpoint()
    path = folder / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before PyTorch 1\.6.*torch\.save"):
        Llama.build(folder, max_seq_len=16, max_batch_size=1, device="cpu")
