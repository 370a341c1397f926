"""Every function that touches a device, on a card: `pytest --device cuda`. Without one, on one that is pretended.

Real cards have not run these tests yet; pretended ones find tensors of the wrong device (`pretended_card`), and leave
the kernels, streams and compilers of a real one to `--device cuda`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL, random_model, write_byte_tokenizer
from pretended_card import pretended_card

from llama import Llama, engine
from llama.checkpoint import convert
from llama.decode_step import DecodeStep
from llama.kv_cache import KVCache
from llama.layers import layouts
from llama.layers.quantization import quantize


@pytest.fixture(scope="module", autouse=True)
def card(request) -> Iterator[None]:
    if request.config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("--device cuda: there is no card that PyTorch can use")
        yield
        return
    with pytest.MonkeyPatch.context() as patches, pretended_card():
        patches.setattr(layouts, "_compiled_int8_product", lambda: layouts._int8_product)
        yield


@pytest.fixture(autouse=True)
def compiler(request) -> None:
    if request.node.get_closest_marker("real_card") and request.config.getoption("--device") != "cuda":
        pytest.skip("a pretended card has no compiler: `pytest --device cuda` on a machine with a card")


SIZE = {"max_seq_len": 128, "max_batch_size": 4}
PROMPTS = [[1, 2, 3], [4] * 20, [5, 6], [7, 8] * 20, [4] * 25]
OPTIONS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 1},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "logit_bias": {5: 4.0}},
    "samples": {"temperature": 1.0, "num_return_sequences": 3, "seed": 2},
    "beams": {"temperature": 0.0, "num_beams": 3},
    "details": {"temperature": 0.0, "logprobs": True, "echo": True, "top_logprobs": 3},
    "processor": {"temperature": 0.0, "logits_processor": lambda ids, scores: scores.scatter(1, ids, -5.0)},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("cuda") / "ckpt", dim=64)


@pytest.fixture(scope="module")
def cpu(card, small) -> Llama:
    return Llama.build(small, device="cpu", dtype="float32", **SIZE)


@pytest.fixture(scope="module")
def gpu(card, small) -> Llama:
    return Llama.build(small, device="cuda", dtype="float32", **SIZE)


def write(folder: Path, **changes) -> Path:
    """A directory as Meta's of random bfloat16 weights whose rows fill whole groups of 4 bits."""
    shape = SMALL | {"dim": 128} | changes
    folder.mkdir()
    state = {name: value.bfloat16() for name, value in random_model(0, **shape).state_dict().items()}
    torch.save(state, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(shape))
    write_byte_tokenizer(folder / "tokenizer.model", shape["vocab_size"] - 256)
    return folder


@pytest.mark.parametrize("name", OPTIONS)
def test_every_way_to_decode_gives_the_tokens_of_the_cpu(cpu, gpu, name):
    options = {"max_gen_len": 9} | OPTIONS[name]
    found, expected = ([a for group in x.answer(PROMPTS, **options) for a in group] for x in (gpu, cpu))
    for a, b in zip(found, expected, strict=True):
        assert (a.tokens, a.text, a.finish_reason) == (b.tokens, b.text, b.finish_reason)
        assert a.token_logprobs == pytest.approx(b.token_logprobs, abs=1e-3)
        assert a.prompt_token_logprobs == pytest.approx(b.prompt_token_logprobs, abs=1e-3)
    assert gpu.model.device.type == "cuda"
    assert gpu._engine.decode_step._graphs._graphs  # the steps were replayed from graphs


def test_long_prompts_in_pieces_kept_prefixes_and_streams(cpu, gpu, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 32)
    monkeypatch.setattr(engine, "PREFILL_TOKENS_WHILE_DECODING", 16)
    before = gpu._engine.counters.reused
    for prompts in ([[3] * 70, [1, 2], [5] * 40], [[3] * 60 + [4] * 9]):
        expected, _ = cpu.generate(prompts, 9, temperature=0)
        assert gpu.generate(prompts, 9, temperature=0)[0] == expected
    assert gpu._engine.counters.reused >= before
    text = cpu.text_completion(["One day"], temperature=0, max_gen_len=9)[0]["generation"]
    assert "".join(gpu.stream_text("One day", temperature=0, max_gen_len=9)) == text


def test_texts_are_scored_as_on_the_cpu(cpu, gpu):
    texts = ["Once upon a time", "One day, a little fox found a red boat."]
    assert gpu.perplexity(texts) == pytest.approx(cpu.perplexity(texts), rel=1e-3)
    found, expected = (x.score(texts, top_logprobs=2) for x in (gpu, cpu))
    assert [s["tokens"] for s in found] == [s["tokens"] for s in expected]


@pytest.mark.parametrize("draft", ["model", "ngram"])
def test_drafts_change_no_answer(cpu, small, draft):
    options = {"temperature": [0, 0.8, 1.0, 0, 0.7], "seed": 1}
    expected, _ = cpu.generate(PROMPTS, 12, **options)
    llama = Llama.build(small, device="cuda", dtype="float32", draft=small if draft == "model" else draft, **SIZE)
    llama._engine.payoff.clock = lambda: 0.0
    assert llama.generate(PROMPTS, 12, **options)[0] == expected
    assert llama._engine.counters.speculation.accepted > 0


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_quantised_layouts(tmp_path, kind, on_disk):
    folder = write(tmp_path / "ckpt")
    size = {"max_seq_len": 64, "max_batch_size": 2}
    plain = Llama.build(folder, device="cuda", **size)
    if on_disk:
        convert.quantize(folder, tmp_path / "small", kind)
        llama = Llama.build(tmp_path / "small", device="cuda", **size)
    else:
        llama = Llama.build(folder, device="cuda", quantize=kind, **size)
    tokens = torch.tensor([[1, 2, 3, 4]], device="cuda")
    with torch.inference_mode():
        expected, found = (x.model(tokens) for x in (plain, llama))
    assert (found - expected).abs().max().item() < (0.1 if kind == "int8" else 0.6) * expected.abs().max().item()
    layout = llama.model.layers[0].feed_forward.w2.layout
    assert isinstance(layout, layouts.Int8 if kind == "int8" else layouts.Int4) and layout.has_kernel == (
        kind == "int4"
    )
    assert len(llama.generate([[1, 2], [3]], 6, temperature=0)[0][1]) == 6


@pytest.mark.parametrize("n_columns", [160, 192, 384])  # in groups of 32, 64 and 128
def test_four_bits_of_every_group_and_few_and_many_rows(n_columns):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(72, n_columns, generator=generator)
    rounded = quantize(weight.to("cuda"), "int4")
    layout = layouts.Int4(rounded, torch.bfloat16)
    dense = rounded.to_dense().cpu()
    for n_rows in (1, 5, 200):
        x = torch.randn(n_rows, n_columns, generator=generator).bfloat16()
        torch.testing.assert_close(layout(x.to("cuda")).cpu().float(), x.float() @ dense.T, atol=0.3, rtol=2e-2)
    torch.testing.assert_close(layout.to_dense().cpu().float(), dense, atol=2e-2, rtol=2e-2)


def test_the_cache_moves_and_touched_weights_come_back(small):
    cache = KVCache(2, (3, 2, 8, 4), torch.float32, "cuda")
    for i, tensor in enumerate(cache.keys + cache.values):
        tensor.copy_(torch.arange(3.0)[:, None, None, None].expand(3, 2, 8, 4) + 10 * i)
    cache.move([0, 1], [1, 0], 2, 5)
    rows = cache.values[1][:, 0, 3, 0].tolist()
    assert rows == [31.0, 30.0, 32.0] and cache.values[1][0, 0, 0, 0].item() == 30.0
    llama = Llama.build(small, device="cuda", dtype="float32", **SIZE)
    llama.generate(PROMPTS, 4, temperature=0)
    llama.model.output.weight.data.mul_(-1)  # side by side before, plain again
    mirrored = Llama.build(small, device="cpu", dtype="float32", **SIZE)
    mirrored.model.output.weight.data.mul_(-1)
    assert llama.generate(PROMPTS, 6, temperature=0)[0] == mirrored.generate(PROMPTS, 6, temperature=0)[0]


def test_a_step_of_training(tmp_path):
    llama = Llama.build(write(tmp_path / "ckpt"), device="cuda", dtype="float32", train=True, max_seq_len=64)
    model = llama.model
    tokens = torch.tensor([[1, 2, 3, 4]], device="cuda")
    loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
    loss.backward()
    assert all(p.grad is not None and p.grad.is_cuda for p in model.parameters())


@pytest.mark.real_card
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_compiled_step(tmp_path, quantize):
    folder = write(tmp_path / "ckpt")
    size = {"max_seq_len": 64, "max_batch_size": 2, "device": "cuda", "quantize": quantize}
    plain, compiled = (Llama.build(folder, **size, compile=compile).model for compile in (False, True))
    with torch.inference_mode():
        expected, found = (DecodeStep(m, compile=c)([5], [1]) for m, c in ((plain, False), (compiled, True)))
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
