"""Matrices packed for decoding: the same numbers, the same state_dict, and no second copy of them in memory."""

import json

import pytest
import torch
from conftest import SMALL, random_model, run_python

from llama.layers.packing import pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_packed_matrices_give_the_same_logits(dtype, tied):
    model = random_model(**SMALL, tied_embeddings=tied).to(dtype)
    tokens = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(0))
    expected, state = model(tokens), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack(model)
    layouts = {id(linear.layout) for linears in model.matrices() for linear in linears}
    assert len(layouts) == 4 * model.args.n_layers + 1  # q, k and v are one product, and so are w1 and w3
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(model(tokens), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(model(tokens[:, :1]), expected[:, :1], atol=tolerance, rtol=0)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_is_trained_is_not_packed():
    model = random_model(**SMALL).requires_grad_(True)
    pack(model)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert model.layers[0].attention.wq.weight.grad.abs().sum() > 0


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
print(json.dumps([weights, private() - before]))
"""


def test_packing_makes_one_copy_and_only_before_the_second_token(write_checkpoint):
    folder = write_checkpoint(dim=512, n_layers=8, multiple_of=256, vocab_size=2048, n_heads=8, n_kv_heads=4)
    result = run_python(MEMORY_SCRIPT, folder)
    assert result.returncode == 0, result.stderr
    weights, grown = json.loads(result.stdout.splitlines()[-1])
    assert weights > 80e6
    assert 0.8 * weights < grown < 1.1 * weights
