"""The compiled step, and the step as recorded graphs run it, give the tokens of the plain step."""

import json
import re

import pytest
import torch
from conftest import ranks
from torch._dynamo.utils import counters

from llama import Llama
from llama.decode_step import DecodeStep
from llama.layers import cuda_graph

# Greedy, sampled, penalised, ended by a token: what an answer can depend on.
OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 1.2, "top_p": 0.9, "seed": 3},
    {"temperature": 0.8, "top_k": 20, "seed": 4, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 5, "no_repeat_ngram_size": 3, "stop": [7, 9]},
]


def answers(llama: Llama, n_prompts: int = 40) -> list:
    """Prompts of 1 to 40 ids, some with the same beginning, with answers of 1 to 30 tokens."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(0, 500, (20,), generator=generator).tolist()
    results = []
    for i, options in enumerate(OPTIONS):
        lengths = torch.randint(1, 21, (n_prompts,), generator=generator).tolist()
        prompts = [
            shared * (j % 2) + torch.randint(0, 500, (n,), generator=generator).tolist() for j, n in enumerate(lengths)
        ]
        results += llama.generate(prompts, [1 + (7 * j + i) % 30 for j in range(n_prompts)], **options)[0]
    return results


@pytest.mark.parametrize("max_batch_size", [2, 7])
def test_the_compiled_step_gives_the_same_tokens_and_is_compiled_once(write_checkpoint, capsys, max_batch_size):
    folder = write_checkpoint()
    size = {"max_seq_len": 96, "max_batch_size": max_batch_size, "device": "cpu"}
    expected = answers(Llama.build(folder, **size))
    counters.clear()
    compiled = Llama.build(folder, **size, compile=True)
    assert not counters["stats"]  # a build that is never decoded compiles nothing
    capsys.readouterr()
    assert answers(compiled) == expected
    said = ["one sequence", "several sequences"]
    assert re.findall(r"Compiled the step for (.*) in \d", capsys.readouterr().err) in (said, said[::-1])
    assert counters["stats"]["unique_graphs"] == len(said)  # for every length and number of rows


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_matrices_compile(write_checkpoint, quantize):
    folder = write_checkpoint(dim=128, dtype=torch.bfloat16)
    size = {"max_seq_len": 64, "max_batch_size": 1, "device": "cpu", "quantize": quantize}
    plain, exact = (Llama.build(folder, **size, dtype=dtype).model for dtype in ("bfloat16", "float32"))
    steps = [DecodeStep(plain), DecodeStep(plain, compile=True)]
    with torch.inference_mode():
        expected = [DecodeStep(exact)([token], [1]) for token in range(8)]
        found = [[step([token], [1]) for token in range(8)] for step in steps]
    off, compiled_off = ((torch.stack(logits) - torch.stack(expected)).square().mean().sqrt() for logits in found)
    assert off < 0.02
    assert compiled_off < 1.1 * off  # what is fused is rounded less often


SCRIPT = """
import json, sys
from llama import Llama
sys.path.insert(0, sys.argv[2])
from test_decode_step import answers
build = {"max_seq_len": 96, "max_batch_size": 4, "device": "cpu"}
plain = answers(Llama.build(sys.argv[1], **build), 6)
print(json.dumps([plain, answers(Llama.build(sys.argv[1], **build, compile=True), 6)]))
"""


def test_two_processes_compile_their_shares(write_checkpoint, tmp_path, request):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = ranks(2, script, write_checkpoint(), request.path.parent)
    assert run.returncode == 0, run.stderr
    plain, compiled = json.loads(run.stdout.splitlines()[-1])
    assert compiled == plain


class Recorded:
    """Runs what a CUDA graph replays: a step for fixed numbers of rows and keys."""

    made: list = []  # noqa: RUF012

    def __init__(self, step, n_rows, key_positions, pool):
        self.step, self.n_rows, self.key_positions = step, n_rows, key_positions
        self.made.append((n_rows, len(key_positions)))

    def __call__(self, tokens, positions):
        assert len(tokens) == len(positions) == self.n_rows
        return self.step(torch.tensor(tokens)[:, None], torch.tensor(positions), self.key_positions)


def test_graphs_for_more_rows_and_keys_than_there_are_change_nothing(write_checkpoint, monkeypatch):
    """A graph's unused rows write into slots with keys that later prompts reuse."""
    folder = write_checkpoint()
    size = {"max_seq_len": 96, "max_batch_size": 7, "device": "cpu"}
    expected = answers(Llama.build(folder, **size))
    monkeypatch.setattr(cuda_graph, "CUDAGraph", Recorded)
    monkeypatch.setattr(cuda_graph, "SHORTEST_LENGTH", 16)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Recorded, "made", [])
    llm = Llama.build(folder, **size)
    step = llm._engine.decode_step
    step._graphs = cuda_graph.CUDAGraphs(step.model.step, 7, step.key_positions)
    assert answers(llm) == expected
    assert 6 in {rows for rows, _ in Recorded.made} <= {1, 2, 3, 4, 6, 7}  # which five rows share
    assert {length for _, length in Recorded.made} <= {16, 24, 32, 48, 64, 96}
    assert len(Recorded.made) == len(set(Recorded.made))  # each is recorded once


def test_a_full_slot_gives_up_its_last_position(write_checkpoint):
    llm = Llama.build(write_checkpoint(), max_seq_len=16, max_batch_size=2, device="cpu")
    slots = llm._engine.slots
    slots.record(1, 0, list(range(16)))
    assert slots.spare_position(1) == 15 and len(slots.tokens[1]) == 15
    assert slots.spare_position(0) == 0
