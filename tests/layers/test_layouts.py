"""Each layout of a matrix multiplies as the plain matrix does, and quantisation errs by half a step at most."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, random_model

from llama.layers.layouts import Packed, lay_out
from llama.layers.packing import pack
from llama.layers.quantization import KINDS, group_size, quantize

# Rows and columns: of real models, of small ones, and what divides by nothing.
SHAPES = [(48, 2048), (344, 172), (256, 256), (17, 300), (512, 64)]


def matrix(n_rows: int, n_columns: int) -> torch.Tensor:
    return torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(n_rows))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_rows", [1, 3, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_product_is_that_of_the_values_it_stands_for(shape, kind, n_rows, dtype):
    weight = matrix(*shape)
    layout = lay_out([weight[:5], weight[5:]], kind, dtype)  # of stacked matrices
    x = torch.randn(n_rows, 2, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = F.linear(x.float(), quantize(weight, kind).to_dense())
    # A bfloat16 has 8 bits: the values it stands for are rounded to one, and so are the sums, in the kernels' steps.
    tolerance = (1e-5 if dtype == torch.float32 else 2**-7) * expected.abs().max().item()
    assert layout(x).dtype == dtype
    torch.testing.assert_close(layout(x).float(), expected, atol=tolerance, rtol=0)
    dense = quantize(weight, kind).to_dense()
    step = 0 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(layout.to_dense().float(), dense, atol=1e-6, rtol=step)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "n_steps"), [("int8", 254), ("int4", 15)])
def test_quantisation_is_off_by_half_a_step(shape, kind, n_steps):
    weight = matrix(*shape)
    quantized = quantize(weight, kind)
    assert quantized.codes.dtype == torch.int8
    group = shape[1] if kind == "int8" else group_size(shape[1])
    scales = quantized.scales.repeat_interleave(group, dim=1)[:, : shape[1]]
    # Scales are rounded to bfloat16, so that the ends of the range are missed by up to 2^-8 of it on either side, and
    # zeros are, by up to 2^-9 of what they are.
    slack = 2**-8 * (n_steps * scales + weight.abs().amax())
    assert ((quantized.to_dense() - weight).abs() <= scales / 2 + slack).all()
    widest = weight.abs().amax(dim=1) * 2 if kind == "int8" else weight.amax(dim=1) - weight.amin(dim=1)
    assert (quantized.scales.amax(dim=1) <= widest / n_steps * (1 + 2**-8)).all()


def test_rows_of_zeros_stay_zero():
    for kind in KINDS:
        assert (quantize(torch.zeros(16, 64), kind).to_dense() == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(kind, bad):
    weight = matrix(16, 64)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight, kind)


def test_groups_divide_a_row_where_they_can():
    assert [group_size(n) for n in (4096, 11008, 192, 96, 172)] == [128, 128, 64, 32, 32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [1, 7, 300])
def test_a_packed_product_is_the_plain_one(dtype, n_rows):
    weight, x = matrix(344, 172).to(dtype), matrix(n_rows, 172).to(dtype)
    layout = lay_out([weight[:100], weight[100:]], None, dtype)
    if not Packed.supports(weight):
        pytest.skip(f"this processor has no packed product in {dtype}")
    expected = F.linear(x.float(), weight.float())
    tolerance = 1e-4 if dtype == torch.float32 else 2**-8 * expected.abs().max().item()
    torch.testing.assert_close(layout(x).float(), expected, atol=tolerance, rtol=0)
    assert torch.equal(layout.to_dense(), weight)


def test_matrices_that_are_trained_are_left_alone():
    assert lay_out([matrix(4, 4).requires_grad_(True)], None, torch.float32) is None


def test_matrices_that_were_packed_together_are_separate_again():
    model = random_model(**SMALL)
    attention = model.layers[0].attention
    x = torch.randn(2, 3, SMALL["dim"], generator=torch.Generator().manual_seed(0))
    expected = [F.linear(x, linear.weight) for linear in (attention.wq, attention.wk, attention.wv)]
    pack(model)
    for linear, value in zip((attention.wq, attention.wk, attention.wv), expected):
        torch.testing.assert_close(linear(x), value, atol=1e-5, rtol=0)
