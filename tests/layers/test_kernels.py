"""Our own kernels for few bits: exact integers, so the same bits in any batch. Without them, PyTorch's kernels."""

import re

import pytest
import torch

from llama import Llama
from llama.checkpoint.convert import quantize as write_quantised
from llama.layers import kernels
from llama.layers.layouts import Rounded, lay_out
from llama.layers.packing import groups
from llama.layers.quantization import KINDS, Blocks, quantize

needs_kernels = pytest.mark.skipif(kernels.missing() is not None, reason=f"no kernels here: {kernels.missing()}")

# Rows and columns: of real models, of small ones, and what divides by nothing.
SHAPES = [(48, 2048), (344, 172), (256, 256), (17, 300), (512, 64), (5, 8192), (100, 352)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_product(x: torch.Tensor, weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The simple way: x as 16-bit integers (24 bits for float32), times the rounded values; float64."""
    limit = 8323072 if x.dtype == torch.float32 else 32512
    scales = (x.float().abs().amax(dim=1, keepdim=True) / limit).clamp(min=1e-30)
    return (x.float() / scales).round().double() @ quantize(weight, kind).to_dense().double().T * scales.double()


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_that_of_integers_and_the_same_bits_in_any_batch(shape, kind, dtype, monkeypatch):
    weight, x = numbers(*shape), numbers(150, shape[1], seed=1).to(dtype)
    x[7] *= 100
    x[8] = 0
    layout = lay_out([weight[:3], weight[3:]], kind, dtype)
    assert isinstance(layout, Rounded)
    y, expected = layout(x), exact_product(x, weight, kind)
    largest = expected.abs().amax(dim=1, keepdim=True).float()
    off = (y.float() - expected.float()).abs() / largest.clamp(min=1e-20)
    assert off.max() < {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for n in (1, 2, 3, 4, 5, 6, 8, 9, 16, 17, 70):  # vectors, and tiles where the processor has them
        assert torch.equal(layout(x[:n]), y[:n]), n
    assert torch.equal(layout(x[7:8]), y[7:8])
    assert torch.equal(layout(x.view(10, 15, -1)), y.view(10, 15, -1))
    assert torch.equal(layout(x.T.contiguous().T), y)
    monkeypatch.setattr(kernels, "USE_TILES", False)
    assert torch.equal(layout(x), y)
    n_threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(layout(x), y)
    finally:
        torch.set_num_threads(n_threads)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_rounding_gives_the_bytes_that_the_obvious_way_gives(shape, kind, dtype):
    weight = numbers(*shape).to(dtype)
    weight[1] = 0
    weight[2] *= 1e-4
    weight[3, :5] = 100
    assert torch.equal(kernels.in_blocks(weight, kind).data, Blocks.of(quantize(weight, kind)).data)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_what_was_put_into_them(shape, kind):
    matrix = quantize(numbers(*shape), kind)
    blocks, dense = Blocks.of(matrix), matrix.to_dense()
    again = blocks.quantized()
    assert torch.equal(again.codes[:, : shape[1]], matrix.codes[:, : shape[1]]) and torch.equal(
        again.scales, matrix.scales
    )
    assert torch.equal(blocks.to_dense(), dense)
    chosen = torch.tensor([shape[1] - 1, 0, 17])
    assert torch.equal(blocks.to_dense(chosen), dense[:, chosen])
    for start, stop in [(0, 16), (16, shape[0]), (3, 5)]:
        if start < stop <= shape[0]:
            assert torch.equal(blocks.rows(start, stop).to_dense(), dense[start:stop])


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_gives_nan_and_changes_no_other_row(bad):
    layout = lay_out([numbers(48, 256)], "int4", torch.bfloat16)
    x = numbers(20, 256, seed=1).bfloat16()
    expected = layout(x)
    x[3, 200] = bad
    assert layout(x)[3].isnan().all() and layout(x[3:4]).isnan().all()
    assert torch.equal(layout(x)[4:], expected[4:])


@needs_kernels
def test_a_damaged_shape_is_refused_before_memory_is_read():
    blocks = kernels.in_blocks(numbers(32, 256), "int4")
    blocks.data = blocks.data[:, :-64].contiguous()
    with pytest.raises(ValueError, match=r"expected 2176 bytes in each"):
        kernels.Product([blocks])


@pytest.mark.parametrize("shape", [(32, 32), (96, 64), (3072, 160), (160, 2048)])
def test_few_rows_of_bfloat16_read_what_onednn_has_packed(shape):
    weight, x = numbers(*shape).bfloat16(), numbers(33, shape[1], seed=1).bfloat16()
    layout = lay_out([weight[:16], weight[16:]], None, torch.bfloat16)
    if getattr(layout, "blocks", None) is None:
        pytest.skip("this processor has no AMX, or oneDNN packs otherwise here")
    expected = x.float() @ weight.float().T
    torch.testing.assert_close(layout(x).float(), expected, atol=0.01, rtol=2**-8)
    y = layout(x[:32])
    torch.testing.assert_close(y.float(), expected[:32], atol=0.01, rtol=2**-8)
    for n in (1, 2, 15, 16, 17, 31):
        assert torch.equal(layout(x[:n]), y[:n]), n
    assert torch.equal(layout(x[:32].view(4, 8, -1)), y.view(4, 8, -1))
    assert torch.equal(layout(x[:32].T.contiguous().T), y)
    assert layout(x[:0]).shape == (0, shape[0])
    with pytest.raises(RuntimeError):
        layout(numbers(3, shape[1] + 32).bfloat16())
    n_threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(layout(x[:32]), y)
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.parametrize("place", [(0, 1), (95, 63)])
def test_blocks_that_are_not_the_weights_are_left_to_onednn(place):
    """As if another version of oneDNN packed otherwise: the first or the last block differs."""
    weight = numbers(96, 64).bfloat16()
    layout = lay_out([weight], None, torch.bfloat16)
    if getattr(layout, "blocks", None) is None:
        pytest.skip("this processor has no AMX, or oneDNN packs otherwise here")
    assert kernels.blocks_of(layout.weight, weight) == layout.blocks
    weight[place] += 1
    assert kernels.blocks_of(layout.weight, weight) is None


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "missing", lambda: "not here")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_our_kernels_pytorchs_give_the_same_to_their_precision(shape, kind, dtype, no_kernels):
    weight, x = numbers(*shape), numbers(3, shape[1], seed=1).to(dtype)
    layout = lay_out([weight[:3], weight[3:]], kind, dtype)
    assert not isinstance(layout, Rounded)
    expected = x.float() @ quantize(weight, kind).to_dense().T
    tolerance = (1e-5 if dtype == torch.float32 else 2**-7) * expected.abs().max().item()
    torch.testing.assert_close(layout(x).float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_our_kernels_a_directory_is_repacked(kind, write_checkpoint, tmp_path, no_kernels, capsys):
    folder = write_checkpoint(dim=128, dtype=torch.bfloat16)
    write_quantised(folder, tmp_path / "saved", kind)
    size = {"max_seq_len": 64, "max_batch_size": 2, "device": "cpu"}
    rounded = Llama.build(folder, **size, quantize=kind)
    assert "repacked" not in capsys.readouterr().out
    saved = Llama.build(tmp_path / "saved", **size)
    assert "(repacked: this machine's kernels do not read the file's blocks)" in capsys.readouterr().out
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.inference_mode():
        assert torch.equal(rounded.model(tokens), saved.model(tokens))


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_is_mapped_and_not_copied(kind, write_checkpoint, tmp_path, capsys):
    write_quantised(write_checkpoint(dim=128, dtype=torch.bfloat16), tmp_path / "saved", kind)
    model = Llama.build(tmp_path / "saved", max_seq_len=64, max_batch_size=2, device="cpu").model
    assert "mapped: read from the file when first used" in capsys.readouterr().out
    for group in groups(model):
        for blocks in group[0].layout.product.blocks:
            assert not blocks.untyped_storage().resizable()  # the memory is the mapped file


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", r"no C\+\+ compiler"), ("false", "false does not compile")]
)
def test_the_reason_for_missing_kernels_is_printed(compiler, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(kernels, "_functions", kernels._functions.__wrapped__)
    assert re.search(reason, kernels.missing.__wrapped__())
    assert "Matrices of 8 and 4 bits use PyTorch's kernels" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.so"))


@needs_kernels
def test_without_a_writable_cache_folder_kernels_still_compile(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kernels._functions.__wrapped__().has_tiles() in (0, 1)
