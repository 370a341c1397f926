"""Our own kernel for attention at one position over long contexts, against softmax(q k^T) v written out."""

import pytest
import torch

from llama import Llama
from llama.layers import attention, kernels
from llama.layers.attention import attend

SHAPES = [  # rows, heads of keys, queries to each, keys, head_dim
    (1, 2, 4, 256, 64),
    (3, 2, 4, 2500, 64),
    (2, 2, 8, 1030, 128),
    (2, 3, 1, 300, 16),
    (2, 1, 3, 1025, 80),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, and keys and values as slices of a cache."""
    n_rows, n_heads, group, length, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(n_rows, n_heads * group, 1, head_dim, generator=generator)
    k, v = (torch.randn(n_rows, n_heads, length + 7, head_dim, generator=generator) for _ in range(2))
    return q.to(dtype), *(x.to(dtype)[:, :, :length] for x in (k, v))


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


@pytest.fixture(autouse=True)
def kernel() -> None:
    if attention._kernel() is None:
        pytest.skip("no C++ compiler: attention is PyTorch's")


@pytest.mark.parametrize("dtype, off", [(torch.float32, 5e-6), (torch.bfloat16, 0.01), (torch.float16, 2e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_computes_softmax_over_the_keys_that_a_row_sees(shape, dtype, off):
    q, k, v = inputs(shape, dtype)
    n_seen = torch.linspace(1, shape[3], shape[0]).int() if shape[0] > 1 else torch.tensor([200])
    ragged = (torch.arange(shape[3]) < n_seen[:, None])[:, None, None]
    for mask in (None, ragged):
        expected = written_out(q, k, v, mask)
        torch.testing.assert_close(attend(q, k, v, mask).double(), expected, atol=off, rtol=off)
    holes = torch.rand(shape[0], 1, 1, shape[3], generator=torch.Generator().manual_seed(1)) < 0.3
    holes[..., 5] = True
    torch.testing.assert_close(attend(q, k, v, holes).double(), written_out(q, k, v, holes), atol=off, rtol=off)


def test_a_row_has_the_same_bits_alone_beside_others_and_on_any_number_of_threads():
    q, k, v = inputs(SHAPES[1], torch.bfloat16)
    n_seen = torch.tensor([300, 2500, 1100])
    mask = (torch.arange(2500) < n_seen[:, None])[:, None, None]
    together = attend(q, k, v, mask)
    for row, n in enumerate(n_seen.tolist()):
        alone = attend(q[row : row + 1], k[row : row + 1, :, :n], v[row : row + 1, :, :n], None)
        assert torch.equal(alone[0], together[row])
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(attend(q, k, v, mask), together)
    finally:
        torch.set_num_threads(n_threads)


def test_keys_that_a_row_does_not_see_are_not_read_and_nan_is_not_hidden():
    q, k, v = inputs(SHAPES[1], torch.float32)
    mask = (torch.arange(2500) < torch.tensor([300, 2500, 1100])[:, None])[:, None, None]
    expected = attend(q, k, v, mask)
    k, v = k.clone(), v.clone()
    k[0, :, 300:], v[0, :, 300:] = torch.nan, torch.nan
    k[2, 1, 7, 0] = torch.nan
    found = attend(q, k, v, mask)
    assert torch.equal(found[:2], expected[:2]) and torch.equal(found[2, :4], expected[2, :4])
    assert found[2, 4:].isnan().all()


def test_tokens_and_gradients_are_those_of_pytorchs_attention(write_checkpoint, monkeypatch):
    folder = write_checkpoint(dim=128)
    calls = []
    kernel = attention._attend_to_long_rows
    monkeypatch.setattr(attention, "_attend_to_long_rows", lambda *a: (calls.append(a), kernel(*a))[1])
    prompts, options = [[5] * 60, [7, 8] * 3, [9]], {"temperature": [0, 0.8, 1.0], "seed": 3}
    answers = []
    for long in (1, 10**9):
        monkeypatch.setattr(attention, "LONG", long)
        llama = Llama.build(folder, max_seq_len=96, max_batch_size=3, device="cpu")
        answers.append(llama.generate(prompts, 30, **options)[0])
    assert answers[0] == answers[1] and calls
    calls.clear()
    monkeypatch.setattr(attention, "LONG", 1)
    q, k, v = inputs(SHAPES[0], torch.float32)
    attend(q.requires_grad_(), k, v, None).sum().backward()
    assert q.grad is not None and not calls


@pytest.mark.parametrize("n_new", [2, attention.MANY])
def test_several_positions_see_what_their_masks_say(n_new):
    """Few queries become rows of one longer query, many do not. Masks may be boolean or numbers."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 8, n_new, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, 100, 16, generator=generator)
    mask = attention.causal_mask(torch.tensor([3, 36])[:, None] + torch.arange(n_new), 100)[:, None]
    expected = written_out(q, k, v, mask)
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        torch.testing.assert_close(attend(q, k, v, given).double(), expected, atol=5e-6, rtol=5e-6)


def test_without_a_compiler_pytorchs_attention_serves(monkeypatch):
    q, k, v = inputs(SHAPES[0], torch.float32)
    expected = attend(q, k, v, None)
    monkeypatch.setattr(attention, "_kernel", attention._kernel.__wrapped__)
    monkeypatch.setattr(kernels, "compiled", lambda *a: (_ for _ in ()).throw(RuntimeError("no compiler")))
    torch.testing.assert_close(attend(q, k, v, None), expected, atol=5e-6, rtol=5e-6)
