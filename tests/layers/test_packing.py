"""Packed matrices: the same numbers, plain parameters as soon as they are read, and no second copy in memory."""

import copy
import gc
import io
import json
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, random_model, run_python
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrize, prune

from llama.layers import packing
from llama.layers.layouts import Packed
from llama.layers.packing import FIRST_WAIT, RETRY_AFTER, groups, pack, signature, unpack
from llama.model import Transformer

TOKENS = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(0))
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def packed_model(**changes) -> Transformer:
    model = random_model(**SMALL | changes)
    assert pack(model)
    return model


def n_packed(model: Transformer) -> int:
    return sum(linear.pack is not None for group in groups(model) for linear in group)


def in_steps(model: Transformer, n: int = 200) -> bool:
    """Whether the model is packed after so many decoding steps."""
    return any(pack(model) for _ in range(n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_packed_matrices_give_the_same_logits_and_the_same_bits_back(dtype, tied):
    model = random_model(**SMALL, tied_embeddings=tied).to(dtype)
    if not Packed.supports(model.norm.weight):
        pytest.skip(f"this processor has no packed product in {dtype}")
    expected, state = model(TOKENS), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert pack(model)
    layouts = {id(linear.layout) for linears in groups(model) for linear in linears}
    assert len(layouts) == 4 * model.args.n_layers + 1  # q, k and v are packed together, and so are w1 and w3
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(model(TOKENS), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(model(TOKENS[:, :1]), expected[:, :1], atol=tolerance, rtol=0)
    assert n_packed(model) == 15  # running the model unpacks nothing
    found = model.state_dict()
    assert found.keys() == state.keys() and n_packed(model) == 0
    assert all(torch.equal(found[name].view(BITS[dtype]), state[name].view(BITS[dtype])) for name in state)
    assert {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_pattern_survives(dtype):
    """Signed zeros, subnormal numbers, infinities, every kind of NaN."""
    if not Packed.supports(torch.empty(0, dtype=dtype)):
        pytest.skip(f"this processor has no packed product in {dtype}")
    model = random_model(**SMALL).to(dtype)
    weight = model.layers[0].attention.wk.weight
    size = weight.shape[0] * weight.shape[1] * dtype.itemsize // 2
    numbers = torch.arange(size, dtype=torch.int32).mul(4073).to(torch.int16).view(dtype).view(weight.shape)
    weight.copy_(numbers)
    del weight
    assert pack(model)
    assert torch.equal(model.layers[0].attention.wk.weight.view(torch.int16), numbers.view(torch.int16))


def add(model: Transformer) -> None:
    model.layers[0].attention.wq.weight.add_(0.1)


def add_to_data(model: Transformer) -> None:
    model.layers[0].attention.wq.weight.data += 0.1


def replace_data(model: Transformer) -> None:
    weight = model.layers[0].attention.wq.weight
    weight.data = weight.data + 0.1


def assign(model: Transformer) -> None:
    wq = model.layers[0].attention.wq
    wq.weight = nn.Parameter(wq.weight + 0.1, requires_grad=False)


def register(model: Transformer) -> None:
    wq = model.layers[0].attention.wq
    weight = wq.weight + 0.1
    del wq.weight
    wq.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def through_parameters(model: Transformer) -> None:
    for name, parameter in model.named_parameters():
        if name == "layers.0.attention.wq.weight":
            parameter.add_(0.1)


def through_the_dict(model: Transformer) -> None:
    model.layers[0].attention.wq._parameters["weight"].add_(0.1)


def through_state_dict(model: Transformer) -> None:
    model.state_dict()["layers.0.attention.wq.weight"].add_(0.1)


def load(model: Transformer) -> None:
    state = {"layers.0.attention.wq.weight": model.layers[0].attention.wq.weight + 0.1}
    model.load_state_dict(state, strict=False)


def load_assigned(model: Transformer) -> None:
    state = {"layers.0.attention.wq.weight": model.layers[0].attention.wq.weight + 0.1}
    model.load_state_dict(state, strict=False, assign=True)


def apply(model: Transformer) -> None:
    model.apply(lambda module: module.weight.add_(0.1) if module is model.layers[0].attention.wq else None)


def through_numpy(model: Transformer) -> None:
    model.layers[0].attention.wq.weight.numpy()[:] += 0.1


def with_an_optimizer(model: Transformer) -> None:
    weight = model.layers[0].attention.wq.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.full_like(weight, -0.1)
    optimizer.step()
    weight.requires_grad_(False).grad = None


EDITS = [add, add_to_data, replace_data, assign, register, through_parameters, through_the_dict, through_state_dict]
EDITS += [load, load_assigned, apply, through_numpy, with_an_optimizer]


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_an_edit_by_any_way_is_in_the_next_answer_and_the_model_is_packed_again(edit):
    model, plain = packed_model(), random_model(**SMALL)
    before = model(TOKENS)
    plain.layers[0].attention.wq.weight.add_(0.1)
    edit(model)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=1e-4, rtol=0)
    assert not torch.allclose(model(TOKENS), before, atol=1e-2)
    assert in_steps(model) and n_packed(model) == 15
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=1e-4, rtol=0)
    assert torch.equal(model.layers[0].attention.wq.weight, plain.layers[0].attention.wq.weight)


def started(iterator: Iterator) -> Iterator:
    next(iterator)
    return iterator


HELD = {
    "the parameter": lambda model: model.layers[0].attention.wk.weight,
    "its data": lambda model: model.layers[0].attention.wk.weight.data,
    "a view": lambda model: model.layers[0].attention.wk.weight[:3, :5],
    "an array": lambda model: model.layers[0].attention.wk.weight.numpy(),
    "its memory": lambda model: model.layers[0].attention.wk.weight.untyped_storage(),
    "a state_dict": lambda model: model.state_dict(),
    "all parameters": lambda model: list(model.parameters()),
    "an iterator": lambda model: started(model.layers[0].attention.wk.named_parameters()),
    "an optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "the dict of parameters": lambda model: model.layers[0].attention.wk._parameters,
    "a weak reference": lambda model: weakref.ref(model.layers[0].attention.wk.weight),
    "a graph of autograd": lambda model: model(TOKENS[:1, :2]),
}


@pytest.mark.parametrize("held", HELD)
def test_a_weight_is_not_packed_while_there_are_other_references_to_it(held):
    model = packed_model()
    if held == "a graph of autograd":
        model.tok_embeddings.weight.requires_grad_(True)
    thing = HELD[held](model)
    assert not in_steps(model)
    assert model.layers[0].attention.wk.pack is None
    assert not any(parameter.numel() == 0 for parameter in model.layers[0].attention.wk.parameters())
    del thing
    gc.collect()
    model.tok_embeddings.weight.requires_grad_(False)
    assert in_steps(model) and n_packed(model) == 15


def test_a_view_from_before_packing_still_edits_the_model():
    model, tokens = random_model(**SMALL), TOKENS[:1]
    view = model.state_dict()["layers.1.feed_forward.w1.weight"]
    assert not pack(model) and n_packed(model) == 14
    before = model(tokens)
    view.mul_(2)
    assert not torch.allclose(model(tokens), before, atol=1e-3)


def test_asking_for_one_weight_unpacks_those_of_its_product_alone():
    model = packed_model()
    assert model.layers[1].attention.wk.weight.shape == (32, 64)
    assert n_packed(model) == 12
    assert model.layers[1].attention.wq.pack is None and model.layers[0].attention.wq.pack is not None


def test_parameters_that_were_packed_do_not_share_memory():
    model = packed_model()
    attention = model.layers[0].attention
    addresses = {m.weight.untyped_storage().data_ptr() for m in (attention.wq, attention.wk, attention.wv)}
    assert len(addresses) == 3
    assert attention.wk.weight.untyped_storage().nbytes() == attention.wk.weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_casts_work_at_any_time_and_keep_the_angles_exact(dtype):
    model, plain = packed_model(), random_model(**SMALL).to(dtype)
    model.to(dtype)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert torch.equal(model.rotary, random_model(**SMALL).rotary)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert in_steps(model) or not Packed.supports(model.norm.weight)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=0.05, rtol=0)


@torch.no_grad()
def test_the_cache_follows_a_cast():
    model = packed_model(max_seq_len=48)
    model(TOKENS[:, :20], 0)
    model.double()
    expected = random_model(**SMALL).double()(TOKENS)
    torch.testing.assert_close(model(TOKENS[:, 20:], 20), expected[:, 20:], atol=1e-3, rtol=0)
    assert model.layers[0].attention.cache_k.dtype == torch.float64


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_copies_and_pickles_of_a_packed_model_are_models_of_their_own(tied):
    model = packed_model(tied_embeddings=tied)
    expected = model(TOKENS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        torch.testing.assert_close(other(TOKENS), expected, atol=1e-4, rtol=0)
        assert (other.output.weight is other.tok_embeddings.weight) == tied
        assert in_steps(other, 1)  # nobody has touched it
        other.layers[0].attention.wq.weight.zero_()
        assert not torch.allclose(other(TOKENS), expected, atol=1e-3)
    assert in_steps(model)
    torch.testing.assert_close(model(TOKENS), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_edit_of_a_tied_embedding_is_in_the_output_too():
    model, plain = packed_model(tied_embeddings=True), random_model(**SMALL, tied_embeddings=True)
    assert model.output.pack is not None
    for each in (model, plain):
        each.tok_embeddings.weight.mul_(1.5)
    assert model.output.pack is None
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=1e-4, rtol=0)
    assert in_steps(model)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=1e-4, rtol=0)


def test_an_edit_of_a_mapped_embedding_is_not_lost_when_its_pages_are_dropped(tmp_path):
    model = random_model(**SMALL | {"vocab_size": 4096}, tied_embeddings=True)
    torch.save(model.state_dict(), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", mmap=True, weights_only=True)
    model.load_state_dict(state, assign=True)
    model.output.weight = model.tok_embeddings.weight
    model.requires_grad_(False)
    del state
    weight = model.tok_embeddings.weight
    assert packing.is_mapped(weight)
    weight.mul_(2)
    expected = weight.clone()
    del weight
    assert in_steps(model)
    assert torch.equal(vars(model.tok_embeddings)["_parameters"]["weight"], expected)


@torch.no_grad()
def test_gradients_flow_through_a_model_that_was_packed():
    model, plain = packed_model(), random_model(**SMALL)
    tokens = TOKENS[:1]
    for each in (model, plain):
        each.requires_grad_(True)
        with torch.enable_grad():
            each(tokens).logsumexp(-1).mean().backward()
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)
    assert not in_steps(model) and n_packed(model) == 0  # while they are trained


def test_gradients_of_the_input_flow_through_packed_matrices():
    """As soft prompts and gradient attacks need them: no parameter is trained."""
    model, plain = packed_model(), random_model(**SMALL)
    gradients = []
    for each in (model, plain):
        each.tok_embeddings = nn.Embedding(512, 64, _weight=torch.ones(512, 64))
        each.tok_embeddings.weight.requires_grad_(True)
        each(TOKENS[:1]).logsumexp(-1).mean().backward()
        gradients.append(each.tok_embeddings.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_transforms_and_autocast_see_the_plain_weights():
    model, plain = packed_model(n_layers=1), random_model(**SMALL | {"n_layers": 1})
    state = {name: parameter + 0.1 for name, parameter in plain.named_parameters()}
    found, expected = (torch.func.functional_call(each, state, (TOKENS,)) for each in (model, plain))
    assert torch.equal(found, expected)
    model = packed_model(n_layers=1)
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    feed_forward = model.layers[0].feed_forward
    expected = torch.func.jvp(plain.layers[0].feed_forward, (x,), (x,))
    torch.testing.assert_close(torch.func.jvp(feed_forward, (x,), (x,)), expected)
    model = packed_model(n_layers=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(TOKENS), plain(TOKENS))


@torch.no_grad()
def test_parametrised_and_pruned_weights_count():
    model, plain = packed_model(), random_model(**SMALL)

    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    for each in (model, plain):
        parametrize.register_parametrization(each.layers[0].attention.wq, "weight", Doubled())
        prune.l1_unstructured(each.layers[1].feed_forward.w1, "weight", 0.5)
    in_steps(model)
    assert n_packed(model) == 13
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=1e-4, rtol=0)
    assert not torch.allclose(model(TOKENS), random_model(**SMALL)(TOKENS), atol=1e-2)


def test_a_bias_counts():
    model, plain = packed_model(), random_model(**SMALL)
    for each in (model, plain):
        for linear in (each.layers[0].attention.wq, each.layers[0].attention.wo):
            linear.bias = nn.Parameter(torch.ones(64), requires_grad=False)
    in_steps(model)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=1e-4, rtol=0)
    x = torch.randn(2, 64)
    wq = model.layers[0].attention.wq
    torch.testing.assert_close(wq(x), F.linear(x, wq.weight) + 1)


def test_a_model_that_is_not_to_be_packed_is_not():
    model = random_model(**SMALL)
    model.packable = False
    assert not in_steps(model) and n_packed(model) == 0
    model.packable = True
    assert pack(model)
    unpack(model)
    assert n_packed(model) == 0


def test_packing_waits_longer_after_each_touch_that_came_too_soon():
    model = packed_model()
    waits = []
    for _ in range(4):
        parameters_to_vector(model.parameters())
        waits.append(next(n for n in range(1, 1000) if pack(model)))
    assert waits == [2 * FIRST_WAIT + 1, 4 * FIRST_WAIT + 1, 8 * FIRST_WAIT + 1, 16 * FIRST_WAIT + 1]
    for _ in range(packing.WORTH_IT):  # decoding goes on undisturbed
        pack(model)
    parameters_to_vector(model.parameters())
    assert next(n for n in range(1, 1000) if pack(model)) == FIRST_WAIT + 1


def test_a_weight_with_other_references_is_tried_again_only_now_and_then(monkeypatch):
    model, looks = random_model(**SMALL), []
    held = model.output.weight
    monkeypatch.setattr(packing, "_Holders", lambda model, made=packing._Holders: looks.append(1) or made(model))
    for _ in range(2 * RETRY_AFTER):
        assert not pack(model)
    assert len(looks) == 2 and held.numel() > 0


def test_a_model_without_references_is_freed_at_once():
    gc.collect()
    gc.disable()
    try:
        model = packed_model()
        alive = weakref.ref(model.layers[0].attention.wq)
        layout = weakref.ref(model.layers[0].attention.wq.layout)
        del model
        assert alive() is None and layout() is None
    finally:
        gc.enable()


def test_the_signature_of_a_model_changes_with_its_modules_and_not_with_its_numbers():
    model = packed_model()
    before = signature(model)
    model.layers[0].attention.wq.weight.add_(1)
    assert signature(model) != before  # it is unpacked
    assert in_steps(model) and signature(model) == before
    model.layers[0].feed_forward.w1 = nn.Linear(64, model.args.hidden_dim, bias=False)
    in_steps(model)
    assert signature(model) != before


MEMORY_SCRIPT = """
import json, sys, torch
from llama import Llama

def private():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

llama = Llama.build(sys.argv[1], max_seq_len=64, max_batch_size=1, device="cpu")
weights = sum(tensor.nbytes for tensor in llama.model.state_dict().values())
llama.tokenizer.stop_tokens = set()
llama.generate([[1, 2, 3]], 1, temperature=0)
before = private()
llama.generate([[1, 2, 3]], 8, temperature=0)
packed = private() - before
most = 0
for name, parameter in llama.model.named_parameters():
    most = max(most, private() - before)
del parameter
print(json.dumps([weights, packed, most, private() - before]))
"""


def test_one_copy_is_in_memory_packed_or_plain(write_checkpoint):
    folder = write_checkpoint(dim=512, n_layers=8, multiple_of=256, vocab_size=2048, n_heads=8, n_kv_heads=4)
    # Freed memory goes back to the system, so that it can be measured.
    result = run_python(MEMORY_SCRIPT, folder, is_forked=False, MALLOC_MMAP_THRESHOLD_="65536")
    assert result.returncode == 0, result.stderr
    weights, packed, most, plain = json.loads(result.stdout.splitlines()[-1])
    assert weights > 80e6
    assert 0.8 * weights < packed < 1.1 * weights  # before, they were mapped
    assert most < 1.2 * weights and plain < 1.1 * weights
