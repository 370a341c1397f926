"""Quantised models: saving and loading gives the same model as rounding while loading, on any number of processes."""

import copy
import json

import pytest
import torch
from conftest import DEMO, random_model, ranks, run_python, split_checkpoint

from llama import Llama
from llama.checkpoint.convert import convert, quantize
from llama.checkpoint.inspect import info, verify
from llama.checkpoint.open import open_checkpoint
from llama.cli import commands as cli

PROMPTS = [[1, 2, 3, 4, 5], [7, 200, 9]]
WIDE = {"dim": 128, "dtype": torch.bfloat16}  # rows long enough for 4 bits; hidden 352, in groups of 32


def build(folder, **options) -> Llama:
    return Llama.build(folder, max_seq_len=64, max_batch_size=2, device="cpu", **options)


@torch.inference_mode()
def logits(llama: Llama) -> torch.Tensor:
    return llama.model.forward(torch.tensor([PROMPTS[0]]))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_the_one_that_is_rounded_while_loading(write_checkpoint, tmp_path, kind, tied):
    folder = write_checkpoint(tied_embeddings=tied, **WIDE)
    cli.main(["quantize", str(folder), str(tmp_path / "saved"), "--to", kind])
    rounded, saved = build(folder, quantize=kind), build(tmp_path / "saved")
    assert torch.equal(logits(rounded), logits(saved))
    plain = build(folder)
    assert not torch.equal(logits(plain), logits(saved))
    assert torch.equal(logits(build(tmp_path / "saved", quantize=kind)), logits(saved))
    assert saved.generate(PROMPTS, 8, temperature=0)[0] == rounded.generate(PROMPTS, 8, temperature=0)[0]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_hugging_face_directory_is_quantised_alike(write_checkpoint, tmp_path, kind):
    folder = write_checkpoint(**WIDE)
    convert(folder, tmp_path / "hf", to="hf")
    quantize(tmp_path / "hf", tmp_path / "saved", kind)
    assert torch.equal(logits(build(folder, quantize=kind)), logits(build(tmp_path / "saved")))


@pytest.mark.parametrize(("kind", "kinds"), [("int8", {"int8"}), ("int4", {"int4", "int8"})])
def test_a_slice_of_a_quantised_matrix_has_the_same_values(write_checkpoint, tmp_path, kind, kinds):
    quantize(write_checkpoint(n_layers=1, n_heads=12, n_kv_heads=2, dim=96, dtype=torch.bfloat16), tmp_path / "q", kind)
    checkpoint = open_checkpoint(tmp_path / "q")[1]
    found = set()
    for name in ("layers.0.attention.wq.weight", "layers.0.attention.wo.weight", "layers.0.feed_forward.w2.weight"):
        whole = checkpoint.read(name)
        found.add(whole.kind)
        for dim, start, stop in [(0, 16, 48), (1, 32, 64), (1, 33, 65), (1, 64, whole.in_features)]:
            piece = checkpoint.read(name, dim, start, stop)
            values = piece if isinstance(piece, torch.Tensor) else piece.to_dense()
            assert torch.equal(values, whole.to_dense().narrow(dim, start, stop - start)), (name, dim, start)
    assert found == kinds  # rows of 96 stay at 8 bits, those of 256 go to 4


SCRIPT = """
import json, sys, torch
from llama import Llama
results = {}
text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
for folder, kind in zip(sys.argv[1::2], sys.argv[2::2]):
    quantize = None if kind == "-" else kind
    llama = Llama.build(folder, max_seq_len=256, max_batch_size=2, device="cpu", quantize=quantize)
    results[folder + " " + kind] = llama.perplexity([text])[0]
print(json.dumps(results))
"""


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_any_number_of_processes_gives_nearly_the_same_logits(stories, tmp_path, n_ranks):
    """Two shards are read by 2 and 4 processes: the hidden size, 172, cuts groups of 4-bit codes in two."""
    folders = [split_checkpoint(stories, tmp_path / "split", 2), tmp_path / "int8", tmp_path / "int4"]
    for kind in ("int8", "int4"):
        quantize(stories, tmp_path / kind, kind)
    arguments = [folders[0], "int8", folders[0], "int4", folders[1], "-", folders[2], "-"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    alone, split = (ranks(n, script, *arguments) for n in (1, n_ranks))
    assert alone.returncode == 0 and split.returncode == 0, alone.stderr + split.stderr
    expected, found = (json.loads(run.stdout.splitlines()[-1]) for run in (alone, split))
    for which, perplexity in expected.items():
        # A process rounds the columns it holds by scales of their own, which are finer: int4 differs by what it is off.
        assert found[which] == pytest.approx(perplexity, rel=0.03 if "int4" in which else 0.01), which


MEMORY = """
import json, sys, threading
import torch
from llama import Llama

def private():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

options = dict(max_seq_len=64, max_batch_size=1, device="cpu", quantize=sys.argv[3])
Llama.build(sys.argv[1], **options)  # what is imported, threads, and the code of kernels are not the model's
before, peak, done = private(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, private())
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
llama = Llama.build(sys.argv[2], **options)
done.set()
watcher.join()
print(json.dumps([peak - before, private() - before]))
"""


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.5), ("int4", 0.28)])
def test_a_quantised_model_is_never_in_memory_in_bfloat16(write_checkpoint, tmp_path, kind, share):
    shape = {"dim": 512, "n_layers": 16, "multiple_of": 256, "vocab_size": 2048, "n_heads": 8, "n_kv_heads": 4}
    # Of two shards, so that what is read is a copy and not the file.
    folder = split_checkpoint(write_checkpoint(dtype=torch.bfloat16, **shape), tmp_path / "split", 2)
    small = write_checkpoint("small", dtype=torch.bfloat16, **shape | {"n_layers": 1})
    n_bytes = sum(2 * p.numel() for p in random_model(**shape).parameters())
    result = run_python(
        MEMORY, small, folder, kind, is_forked=False, MALLOC_MMAP_THRESHOLD_="65536"
    )  # freed memory goes back to the system
    assert result.returncode == 0, result.stderr
    peak, left = json.loads(result.stdout.splitlines()[-1])
    assert n_bytes > 90e6
    assert left < share * n_bytes + 6e6  # with the embedding, the scales and the cache, 3 MB together
    assert peak < left + 25e6  # some matrices in float32


def test_info_and_verify_read_quantised_directories(write_checkpoint, tmp_path):
    folder = write_checkpoint(**WIDE)
    quantize(folder, tmp_path / "saved", "int4")
    assert ("dtype", "bfloat16, matrices int4") in info(tmp_path / "saved")
    assert not verify(tmp_path / "saved").problems
    path = tmp_path / "saved" / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    tensors["layers.0.attention.wq.weight"][0, 3] = 0x7F  # the upper byte of the first scale
    tensors["layers.0.attention.wq.weight"][0, 2] = 0xC0
    torch.save(tensors, path)
    assert any("wq.weight: 1 numbers are not finite" in problem for problem in verify(tmp_path / "saved").problems)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("layers.0.feed_forward.w2.weight"), "lacks layers.0.feed_forward.w2.weight"),
        (lambda t: t.update({"other": torch.zeros(1)}), "has unexpected other"),
        (lambda t: t.update({"layers.0.attention.wq.weight": torch.zeros(3, 3).byte()}), r"expected .*\[4, 1088\]"),
        (lambda t: t.update({"layers.0.attention.wq.weight": torch.zeros(4, 1088)}), "expected torch.uint8"),
        (lambda t: t["norm.weight"].fill_(float("inf")), "norm.weight has numbers that are not finite"),
    ],
)
def test_a_damaged_directory_is_refused(write_checkpoint, tmp_path, damage, message):
    quantize(write_checkpoint(dtype=torch.bfloat16), tmp_path / "saved", "int8")
    path = tmp_path / "saved" / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    damage(tensors)
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "saved")


def test_mistakes_are_refused(write_checkpoint, tmp_path):
    folder = write_checkpoint(dtype=torch.bfloat16)
    quantize(folder, tmp_path / "saved", "int8")
    with pytest.raises(ValueError, match="is quantised to int8 already"):
        build(tmp_path / "saved", quantize="int4")
    with pytest.raises(ValueError, match="is quantised to int8: expected the checkpoint that it was made from"):
        quantize(tmp_path / "saved", tmp_path / "again", "int4")
    with pytest.raises(ValueError, match="is quantised to int8: expected the checkpoint that it was made from"):
        convert(tmp_path / "saved", tmp_path / "again", to="hf")
    for call in (lambda: quantize(folder, tmp_path / "x", "int3"), lambda: build(folder, quantize="int3")):
        with pytest.raises(ValueError, match="expected 'int8' or 'int4'"):
            call()
    params = tmp_path / "saved" / "params.json"
    params.write_text(json.dumps(json.loads(params.read_text()) | {"quantization": {"kind": "int3"}}))
    with pytest.raises(ValueError, match="int3"):
        build(tmp_path / "saved")
    assert not (tmp_path / "again").exists()


@pytest.mark.skipif(not DEMO.is_dir(), reason="only a clone has the embedded checkpoint")
@pytest.mark.parametrize(("kind", "bar"), [("int8", 0.005), ("int4", 0.05)])
def test_the_perplexity_of_the_embedded_checkpoint_stays(kind, bar):
    from benchmarks.quality import demo_texts

    texts = demo_texts(40)
    plain, rounded = (build_demo(quantize=q) for q in (None, kind))
    assert abs(mean_nats(rounded, texts) - mean_nats(plain, texts)) < bar  # relative, of the perplexity


def build_demo(**options) -> Llama:  # in the dtype of the kernels
    return Llama.build(DEMO, max_seq_len=256, max_batch_size=8, device="cpu", dtype="bfloat16", **options)


def mean_nats(llama: Llama, texts: list) -> float:
    logprobs = [value for score in llama.score(texts) for value in score["logprobs"][1:]]
    return -sum(logprobs) / len(logprobs)


TOUCHES = {
    "weight": lambda model: model.layers[0].attention.wq.weight,
    "edit": lambda model: model.layers[0].feed_forward.w2.weight.mul_(2),
    "assign": lambda model: setattr(model.layers[0].attention.wq, "weight", torch.nn.Parameter(torch.zeros(128, 128))),
    "parameters": lambda model: list(model.parameters()),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    "half": lambda model: model.half(),
    "requires_grad_": lambda model: model.requires_grad_(True),
    "an optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_a_quantised_model_cannot_do_is_refused(write_checkpoint, kind):
    llama = build(write_checkpoint(**WIDE), quantize=kind)
    model, expected = llama.model, logits(llama)
    for name, touch in TOUCHES.items():
        with pytest.raises(RuntimeError, match=f"is {kind} and .*: build the model without `quantize`"):
            touch(model)
            pytest.fail(name)
    x = torch.ones(1, 1, 128, dtype=torch.bfloat16, requires_grad=True)
    for module in (model.layers[0].attention.wq, model.layers[0].attention.wo, model.layers[0].feed_forward):
        with pytest.raises(RuntimeError, match="has no gradient: build the model without `quantize`"):
            module(x)
    assert torch.equal(logits(llama), expected)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_calls_that_do_not_change_a_quantised_model_work(write_checkpoint, tmp_path, kind):
    llama = build(write_checkpoint(**WIDE), quantize=kind)
    expected = logits(llama)
    model = llama.model.to("cpu").to(torch.bfloat16).eval()
    assert next(model.parameters()).dtype == torch.bfloat16
    other = copy.deepcopy(model)
    assert other.layers[0].attention.wq.layout is model.layers[0].attention.wq.layout  # codes never change
    assert torch.equal(other(torch.tensor([PROMPTS[0]])), expected)
    assert model.state_dict()["layers.0.attention.wk.weight"].shape == (64, 128)
    with pytest.raises(TypeError, match=f"quantised to {kind} cannot be pickled: `llama quantize`"):
        torch.save(model, tmp_path / "model.pt")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_hooks_on_quantised_matrices_fire(write_checkpoint, kind):
    llama = build(write_checkpoint(**WIDE), quantize=kind)
    expected, seen = logits(llama), []
    attention = llama.model.layers[0].attention
    handle = attention.wk.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(logits(llama), expected)
    assert seen == [(1, 5, 64)]
    handle.remove()
    attention.wk.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    assert not torch.allclose(logits(llama), expected)
