"""Several processes: replicas of split models, two nodes, impossible sizes, gradients and dtypes."""

import json
import os
import socket
import subprocess
import sys
from itertools import chain

import pytest
import torch
from conftest import ROOT, torchrun
from test_engine import prompts_of_every_length

from llama import Llama
from llama.parallel import partition, pick_dtype

SCRIPT = """
import json, sys
from llama import Llama
import torch.distributed as dist
folder, size, prompts, out = sys.argv[1], json.loads(sys.argv[2]), json.load(open(sys.argv[3])), sys.argv[4]
llama = Llama.build(folder, None, 512, 4, size, device="cpu")
print("only rank 0 prints")
answers = llama.generate(prompts, 8, temperature=0.8, seed=1, logprobs=True)
json.dump(answers, open(f"{out}.{dist.get_rank()}", "w"))
"""


@pytest.fixture
def task(write_checkpoint, tmp_path):
    """A checkpoint, 37 prompts of mixed length, and the answers of one process."""
    folder = write_checkpoint()
    prompts = prompts_of_every_length(37)
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "script.py").write_text(SCRIPT)
    expected = Llama.build(folder, None, 512, 4, device="cpu").generate(
        prompts, 8, temperature=0.8, seed=1, logprobs=True
    )
    return folder, tmp_path, expected


def check(tmp_path, n_processes: int, expected: tuple) -> None:
    for rank in range(n_processes):
        tokens, logprobs = json.loads((tmp_path / f"out.{rank}").read_text())
        assert tokens == expected[0]
        assert list(chain(*logprobs)) == pytest.approx(list(chain(*expected[1])), abs=1e-4)


def test_2_replicas_of_2_processes_give_the_answers_of_one_process_in_order(task):
    folder, tmp_path, expected = task
    result = torchrun(4, tmp_path / "script.py", folder, 2, tmp_path / "prompts.json", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    check(tmp_path, 4, expected)
    assert result.stdout.count("only rank 0 prints") == result.stdout.count("Loaded in") == 1


def test_two_nodes_give_the_answers_of_one_process(task):
    folder, tmp_path, expected = task
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    agents = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        command += [f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        command += [str(tmp_path / "script.py"), str(folder), "2"]
        command += [str(tmp_path / "prompts.json"), str(tmp_path / "out")]
        agents.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    errors = [agent.communicate(timeout=120)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    check(tmp_path, 2, expected)


@pytest.mark.parametrize(
    ("n_processes", "size", "message"),
    [
        (2, "3", "model_parallel_size=3 does not divide the 2 process(es) of this run: expected one of [1, 2]"),
        (3, "null", "cannot be shared out among 3 processes: expected model_parallel_size to be one of [1, 2, 4, 8]"),
    ],
)
def test_the_error_of_an_impossible_size_lists_the_possible_ones(task, n_processes, size, message):
    folder, tmp_path, _ = task
    result = torchrun(n_processes, tmp_path / "script.py", folder, size, tmp_path / "prompts.json", tmp_path / "out")
    assert result.returncode != 0
    assert message in result.stderr


def test_a_forward_pass_outside_no_grad_works_on_two_processes_with_an_odd_vocabulary(write_checkpoint, tmp_path):
    folder = write_checkpoint(vocab_size=513)
    expected = Llama.build(folder, max_seq_len=32, device="cpu").model(torch.tensor([[1, 2, 3]]))
    torch.save(expected, tmp_path / "expected.pt")
    (tmp_path / "script.py").write_text(
        "import sys, torch\nfrom llama import Llama\n"
        "llama = Llama.build(sys.argv[1], max_seq_len=32, device='cpu')\n"
        "expected = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(llama.model(torch.tensor([[1, 2, 3]])), expected, atol=1e-4, rtol=0)\n"
    )
    result = torchrun(2, tmp_path / "script.py", folder, tmp_path / "expected.pt")
    assert result.returncode == 0, result.stderr


def test_training_gradients_on_two_processes_equal_those_on_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist\n"
        "from llama import parallel, ModelArgs, Transformer\n"
        "from llama.parallel.groups import partition\n"
        "parallel.initialize(int(sys.argv[1]), torch.device('cpu'))\n"
        "args = ModelArgs(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=16)\n"
        "model = Transformer(args)\n"
        "rank, n = model.tok_embeddings.rank, int(sys.argv[1])\n"
        "for i, (name, p) in enumerate(model.named_parameters()):\n"
        "    g = torch.Generator().manual_seed(i)\n"
        "    dim = {'wo': 1, 'w2': 1}.get(name.split('.')[-2], 0)\n"
        "    whole = list(p.shape)\n"
        "    if 'norm' not in name: whole[dim] *= n\n"
        "    full = torch.randn(whole, generator=g) * 0.1\n"
        "    part = full if 'norm' in name else full.chunk(n, dim)[rank]\n"
        "    p.data.copy_(part)\n"
        "loss = model(torch.arange(20).view(2, 10)).logsumexp(-1).mean()\n"
        "loss.backward()\n"
        "w2 = model.layers[0].feed_forward.w2.weight.grad\n"
        "torch.save((loss.detach(), w2), f'{sys.argv[2]}.{n}.{rank}')\n"
    )
    for n in (1, 2):
        result = torchrun(n, script, n, tmp_path / "grad")
        assert result.returncode == 0, result.stderr
    loss, grad = torch.load(tmp_path / "grad.1.0")
    for rank in range(2):
        split_loss, part = torch.load(tmp_path / f"grad.2.{rank}")
        torch.testing.assert_close(split_loss, loss)
        torch.testing.assert_close(part, grad.chunk(2, dim=1)[rank], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 7, 172, 128_256])
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
def test_a_partition_covers_a_dimension_once_and_evenly(size, n_ranks):
    parts = [partition(size, rank, n_ranks) for rank in range(n_ranks)]
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(size))
    assert max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1


def test_dtypes_that_a_device_lacks_become_the_nearest():
    cpu, mps = torch.device("cpu"), torch.device("mps")
    assert [pick_dtype(d, cpu) for d in (torch.bfloat16, torch.float16, torch.float64)] == [
        torch.bfloat16,
        torch.float16,
        torch.float64,
    ]
    assert pick_dtype(torch.float64, mps) == torch.float32
