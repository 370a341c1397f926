"""Hooks, patched methods and replaced modules are called, whether the matrices are packed or not."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, random_model, ranks, split_checkpoint
from fairscale.nn.model_parallel.layers import ColumnParallelLinear as FairscaleLinear
from torch import nn

from llama import Llama
from llama.layers.hooks import check_hooks, watched
from llama.layers.linear import ColumnParallelLinear
from llama.layers.packing import pack
from llama.model import ModelArgs, Transformer

TOKENS = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(0))
MODULES = [name for name, module in random_model(**SMALL).named_modules() if name and not name.endswith("layers")]


def pair(**changes) -> tuple[Transformer, Transformer]:
    """A packed model, and the same model unpacked."""
    packed, plain = (random_model(**SMALL | changes) for _ in range(2))
    plain.packable = False
    assert pack(packed)
    return packed, plain


def close(packed: Transformer, plain: Transformer) -> bool:
    return torch.allclose(packed(TOKENS), plain(TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODULES)
@torch.inference_mode()
def test_a_forward_hook_sees_and_changes_what_a_module_gives(name):
    packed, plain = pair()
    seen: list[list[torch.Size]] = [[], []]
    before = plain(TOKENS)
    handles = []
    for shapes, model in zip(seen, (packed, plain)):

        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor, shapes: list = shapes) -> torch.Tensor:
            shapes.append(output.shape)
            return output * 1.5 + 0.25

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    for _ in range(3):
        assert close(packed, plain)
        pack(packed)
    assert seen[0] == seen[1] and len(seen[0]) == 3 and seen[0][0][:2] == TOKENS.shape
    changed = plain(TOKENS)
    assert not torch.allclose(changed, before, atol=1e-3)
    for handle in handles:
        handle.remove()
    assert close(packed, plain) and torch.equal(plain(TOKENS), before)
    assert len(seen[0]) == 3


@pytest.mark.parametrize("name", [name for name in MODULES if name != "tok_embeddings"])
@torch.inference_mode()
def test_a_pre_hook_changes_what_a_module_gets(name):
    packed, plain = pair()
    before = plain(TOKENS)
    for model in (packed, plain):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5 + 0.1, *inputs[1:]))
    assert close(packed, plain) and not torch.allclose(plain(TOKENS), before, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "tok_embeddings"])
@torch.inference_mode()
def test_a_patched_forward_is_called(name):
    packed, plain = pair()
    before = plain(TOKENS)
    for model in (packed, plain):
        module = model.get_submodule(name)
        module.forward = lambda x, *rest, original=module.forward: original(x, *rest) * 0.5 + 0.1
    assert close(packed, plain) and not torch.allclose(plain(TOKENS), before, atol=1e-3)
    for model in (packed, plain):
        del model.get_submodule(name).forward
    assert close(packed, plain) and torch.equal(plain(TOKENS), before)


@torch.inference_mode()
def test_a_patched_class_is_called(monkeypatch):
    packed, plain = pair()
    original = ColumnParallelLinear.forward
    monkeypatch.setattr(ColumnParallelLinear, "forward", lambda self, x: original(self, x) * 0.5)
    before = plain(TOKENS)
    assert close(packed, plain)
    monkeypatch.undo()
    assert not torch.allclose(plain(TOKENS), before, atol=1e-3) and close(packed, plain)


@torch.inference_mode()
def test_global_hooks_see_every_module():
    packed, plain = pair()
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(type(module).__name__))
    try:
        packed(TOKENS)
        of_packed, seen[:] = list(seen), []
        plain(TOKENS)
    finally:
        handle.remove()
    assert of_packed == seen and seen.count("ColumnParallelLinear") == 5 * 2 + 1


def test_backward_hooks_see_gradients():
    packed, _ = pair()
    seen = []
    packed.layers[0].attention.wk.register_full_backward_hook(lambda module, inputs, outputs: seen.append(module))
    packed.requires_grad_(True)
    packed(TOKENS).sum().backward()
    assert seen == [packed.layers[0].attention.wk]


def test_a_hook_added_and_removed_by_a_hook_counts_from_the_next_module_on():
    packed, plain = pair()
    for model in (packed, plain):
        w3 = model.layers[1].feed_forward.w3

        def steer(module: nn.Module, inputs: tuple, output: torch.Tensor, w3: nn.Module = w3) -> None:
            w3.handle = w3.register_forward_hook(lambda *arguments: (w3.handle.remove(), arguments[2] * 2)[1])

        model.layers[0].attention.wv.register_forward_hook(steer)
    for _ in range(2):
        assert close(packed, plain)


class LoRALinear(nn.Module):
    """As LoRA is commonly written: the frozen matrix plus a product of two small ones."""

    def __init__(self, base: nn.Module, rank: int = 4):
        super().__init__()
        self.base = base
        n_out, n_in = base.weight.shape
        generator = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(0.3 * torch.randn(rank, n_in, generator=generator))
        self.b = nn.Parameter(0.3 * torch.randn(n_out, rank, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class MergingLoRALinear(LoRALinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.base.weight + self.b @ self.a)


def as_linear(base: nn.Module) -> nn.Linear:
    linear = nn.Linear(*reversed(base.weight.shape), bias=False)
    linear.weight = nn.Parameter(base.weight * 0.9)
    return linear


def as_fairscale(base: nn.Module) -> nn.Module:
    linear = FairscaleLinear(*reversed(base.weight.shape), bias=True, gather_output=False, init_method=lambda x: x)
    linear.weight.data, linear.bias.data = base.weight * 0.9, torch.ones(len(base.weight))
    return linear


def subclass(base: nn.Module) -> nn.Module:
    class Louder(ColumnParallelLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.1

    louder = Louder(base.in_features, base.out_features)
    louder.load_state_dict(base.state_dict())
    return louder


EXCHANGES: list[Callable] = [LoRALinear, MergingLoRALinear, as_linear, as_fairscale, subclass]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", ["attention.wq", "attention.wk", "feed_forward.w3", "output"])
@torch.inference_mode()
def test_an_exchanged_matrix_is_used(exchange, name):
    packed, plain = pair()
    before = plain(TOKENS)
    for model in (packed, plain):
        with torch.inference_mode(False), torch.no_grad():
            parent = model if name == "output" else model.layers[1].get_submodule(name.split(".")[0])
            setattr(parent, name.split(".")[-1], exchange(getattr(parent, name.split(".")[-1])))
    for _ in range(12):
        assert close(packed, plain)
        pack(packed)
    assert not torch.allclose(plain(TOKENS), before, atol=1e-3)


@torch.inference_mode()
def test_matrices_that_swap_places_are_not_mixed_up():
    packed, plain = pair()
    for model in (packed, plain):
        attention, other = model.layers[0].attention, model.layers[1].attention
        attention.wk, attention.wv = attention.wv, attention.wk
        attention.wq, other.wq = other.wq, attention.wq
    for _ in range(12):
        assert close(packed, plain)
        pack(packed)


@torch.inference_mode()
def test_layers_may_be_removed_repeated_copied_and_reordered():
    import copy

    packed, plain = pair(n_layers=4)
    for model in (packed, plain):
        with torch.inference_mode(False):
            a, b, c, _ = model.layers
            model.layers = nn.ModuleList([b, a, copy.deepcopy(c), c, a])
            model.layers[2].attention.wq.weight.mul_(1.5)
    for _ in range(12):
        assert close(packed, plain)
        pack(packed)


@torch.inference_mode()
def test_hooks_on_the_output_see_every_position_even_if_few_are_requested():
    model, _ = pair()
    expected, seen = model(TOKENS), []
    torch.testing.assert_close(model.run(TOKENS)[:, -1], expected[:, -1])

    def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.shape)
        return output + 1

    handle = model.output.register_forward_hook(hook)
    logits = model.run(TOKENS)
    handle.remove()
    torch.testing.assert_close(logits[:, -1], expected[:, -1] + 1)
    torch.testing.assert_close(logits[[0, 1], [3, 4]], expected[[0, 1], [3, 4]] + 1)
    assert seen == [(2, 9, 512)]  # once


def test_a_compiled_step_is_refused_where_it_would_ignore_somebody():
    model, _ = pair()
    check_hooks(model)
    assert list(watched(model)) == []
    handle = model.layers[0].attention.wk.register_forward_pre_hook(lambda *arguments: None)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wk has hooks, which a compiled step would ignore"):
        check_hooks(model)
    handle.remove()
    model.norm.forward = model.norm.forward.__func__.__get__(model.norm)  # the same method is no patch
    check_hooks(model)
    model.norm.forward = model.layers[0].ffn_norm.forward
    assert len(list(watched(model))) == 1
    model.norm.forward = functools.wraps(type(model.norm).forward)(lambda x: x)
    with pytest.raises(ValueError, match="norm is a RMSNorm, or its forward was patched"):
        check_hooks(model)
    del model.norm.forward
    model.layers[1].feed_forward.w1 = nn.Linear(64, model.args.hidden_dim, bias=False)
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.w1 is a Linear"):
        check_hooks(model)
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *arguments: None)
    with pytest.raises(ValueError, match="every module has hooks"):
        check_hooks(model)
    handle.remove()


def test_a_hook_and_a_compiled_step_are_refused_before_anything_is_compiled(write_checkpoint):
    llama = Llama.build(write_checkpoint(), None, 64, 1, device="cpu")
    llama.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.1 has hooks, which a compiled step would ignore: remove it"):
        Llama(llama.model, llama.tokenizer, compile=True)


SHARDS = """
import sys
import torch, torch.distributed as dist
from pathlib import Path
from llama import ModelArgs, Transformer, parallel
parallel.initialize(device=torch.device("cpu"))
model = Transformer(ModelArgs(**eval(sys.argv[2])))
shard = torch.load(Path(sys.argv[1]) / f"consolidated.{dist.get_rank():02d}.pth", weights_only=True)
print(model.load_state_dict(shard, strict=False))
logits = model(torch.tensor([[1, 2, 3, 300]]))
if dist.get_rank() == 0:
    torch.save(logits, Path(sys.argv[1]) / "logits.pt")
"""


@pytest.mark.parametrize("embedding", ["columns", "rows"])
def test_each_rank_loads_its_shard_of_metas_as_a_state_dict(write_checkpoint, tmp_path, embedding):
    folder = write_checkpoint()
    split = split_checkpoint(folder, tmp_path / "split", 2, embedding=embedding)
    (tmp_path / "script.py").write_text(SHARDS)
    result = ranks(2, tmp_path / "script.py", split, SMALL)
    assert result.returncode == 0, result.stderr
    assert "missing_keys=[], unexpected_keys=['rope.freqs']" in result.stdout
    whole = Transformer(ModelArgs(**SMALL))
    whole.load_state_dict(torch.load(folder / "consolidated.00.pth", weights_only=True))
    expected = whole(torch.tensor([[1, 2, 3, 300]]))
    assert torch.allclose(torch.load(split / "logits.pt"), expected, atol=1e-5)


def test_a_model_without_a_cache_takes_the_place_of_another(write_checkpoint):
    llama, other = (
        Llama.build(write_checkpoint(name, seed=n), None, 64, 2, device="cpu") for n, name in enumerate("ab")
    )
    bare = Transformer(other.args)
    bare.load_state_dict(other.model.state_dict())
    llama.model = bare
    assert llama.generate([[1, 2, 3]], 5, temperature=0) == other.generate([[1, 2, 3]], 5, temperature=0)


def test_a_hook_that_uses_a_start_pos_that_rows_do_not_share_gets_an_error():
    model = random_model(**SMALL)
    seen: list[object] = []
    handle = model.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    with torch.inference_mode():
        model(TOKENS, 0)
        model(TOKENS[:, :1], [9, 9])
        model(TOKENS[:, :1], [9, 4])
    assert [int(position) for position in seen[:2]] == [0, 9]
    uneven = seen[2]
    assert uneven > 0 and uneven != 0 and uneven and not uneven < 4 and uneven != 5 and uneven <= 9
    uses = (int, lambda p: p + 1, lambda p: 2 - p, lambda p: p == 4, lambda p: p > 5, lambda p: TOKENS[p:])
    for use in uses:
        with pytest.raises(ValueError, match=r"at the positions \[9, 4\]: expected"):
            use(uneven)
    handle.remove()


@torch.inference_mode()
def test_heads_may_have_different_masks():
    attention = random_model(**SMALL).layers[0].attention
    x, freqs_cis = torch.randn(2, 9, 64), random_model(**SMALL).freqs_cis[:9]
    causal = torch.full((9, 9), -torch.inf).triu(1)
    slopes = torch.arange(8)[:, None, None] * (torch.arange(9) - torch.arange(9)[:, None]) / 10
    found = attention(x, 0, freqs_cis, causal + slopes)
    attention.wo = nn.Identity()
    expected = [attention(x, 0, freqs_cis, causal + slope)[..., 8 * i : 8 * i + 8] for i, slope in enumerate(slopes)]
    wo = random_model(**SMALL).layers[0].attention.wo
    torch.testing.assert_close(found, wo(torch.cat(expected, dim=-1)))
    assert not torch.allclose(found, wo(attention(x, 0, freqs_cis, causal)), atol=1e-3)
