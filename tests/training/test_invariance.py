"""A step is the same step however it is packed, or divided into passes and over processes."""

import json
from pathlib import Path

import torch
from conftest import run_python
from safetensors.torch import load_file
from training_helpers import FORKS, relative_difference, run, write_pairs, write_rows

from llama import Llama
from llama.checkpoint.convert import quantize
from llama.checkpoint.meta import open_shard
from llama.tokenizer import Tokenizer
from llama.training.batches import collate, cut_into_passes, plan_steps
from llama.training.examples import Document, Example
from llama.training.loss import LanguageLoss
from llama.training.report import read_log

# On some number of processes: runs fine-tunings [model_parallel_size, options, data, checkpoint, result], then answers
# with each [checkpoint, adapter].
SCRIPT = """
def all_of(runs, adapted):
    for size, options, data, ckpt, out in runs:
        finetune(data, out, ckpt, Options(**options), model_parallel_size=size, device="cpu", progress=False)
    for ckpt, adapter in adapted:
        llama = Llama.build(ckpt, max_seq_len=64, dtype="float32", device="cpu", adapter=adapter)
        answers = llama.generate([[1, 2, 3], [4, 5]], 10, 0)[0]
        with open(f"{sys.argv[2]}/answers.jsonl", "a") as file:
            if os.environ["RANK"] == "0":
                file.write(json.dumps([ckpt, answers]) + "\\n")

for n_processes, runs, adapted in json.loads(sys.argv[1]):
    assert not any(ended(start(n_processes, lambda: all_of(runs, adapted))))
"""


def losses(log: list[dict]) -> list[float]:
    return [line["loss"] for line in log]


def largest_difference(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) for x, y in zip(a, b))


def example(*lengths: int) -> Example:
    return Example(tuple(Document(list(range(1, n + 1)), [False] + [True] * (n - 1)) for n in lengths))


def test_packing_passes_and_recomputing_do_not_change_losses_or_weights(write_checkpoint, tmp_path):
    ckpt, data = write_checkpoint(), write_rows(tmp_path / "rows.jsonl")
    whole = run(data, tmp_path / "whole", ckpt, to="hf", steps=10)
    for changes in ({"pack": False}, {"pass_tokens": 100}, {"pass_tokens": 20}, {"recompute": True}):
        out = tmp_path / str(changes)
        other = run(data, out, ckpt, to="hf", steps=10, **changes)
        assert largest_difference(losses(whole), losses(other)) < 1e-5, changes
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
        assert relative_difference(ours, theirs) < 1e-4, changes


def test_a_document_in_a_packed_row_sees_no_other(write_checkpoint):
    model = Llama.build(write_checkpoint(), max_seq_len=64, max_batch_size=1, train=True).model
    packed = collate([example(9), example(20), example(5), example(30)], 64)
    assert packed.tokens.shape == (1, 64) and packed.documents is not None
    loss = LanguageLoss(model)
    alone = sum(loss(collate([example(n)], 64)) for n in (9, 20, 5, 30))
    assert abs(loss(packed) - alone) < 1e-3  # of a sum of about 400
    packed.documents[:] = 0  # if they saw each other, the sum would be this
    assert abs(loss(packed) - alone) > 1


def test_a_step_holds_as_many_examples_as_fit_and_each_epoch_all_of_them():
    examples = [example(n) for n in (10, 40, 25, 60, 5, 90)]
    steps = plan_steps(examples, 100, epochs=2, seed=1)
    assert all(sum(examples[i].n_tokens for i in step) <= 100 for step in steps)
    flat = [i for step in steps for i in step]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list(range(6)) and flat[:6] != flat[6:]
    assert plan_steps(examples, 100, 2, 1) == steps != plan_steps(examples, 100, 2, 2)
    half = [i for step in plan_steps(examples, 100, 0.5, 1) for i in step]
    assert half == flat[:3]


def test_passes_are_about_equal_and_a_multiple_of_the_replicas():
    examples = [example(n) for n in (50, 30, 30, 20, 10, 10)]
    passes = cut_into_passes(examples, 80, 2)
    assert len(passes) == 2 and [sum(e.n_tokens for e in group) for group in passes] == [80, 70]
    assert len(cut_into_passes(examples[:1], 80, 4)) == 4  # three of them empty
    assert [len(group) for group in cut_into_passes(examples[:2], 5, 1)] == [1, 1]  # no example is divided


PLAIN = {"max_seq_len": 128, "batch_tokens": 300, "epochs": 100, "steps": 5, "lr": 1e-3, "pass_tokens": 128}
KINDS = {"full": PLAIN, "lora": PLAIN | {"lora_rank": 4, "lr": 1e-2}, "head": PLAIN | {"head": "scalar"}}
KINDS |= {"head and lora": KINDS["lora"] | {"head": "scalar"}}
CASES = {  # for each number of processes: the kinds, each with a model-parallel size
    2: [("full", 2), ("full", 1), ("lora", 2)],
    4: [("full", 4), ("full", 2), ("full", 1), ("lora", 2), ("lora", 4), ("head", 4), ("head and lora", 2)],
}


def test_any_number_of_processes_has_the_losses_and_weights_of_one(write_checkpoint, tmp_path):
    rows, pairs = write_rows(tmp_path / "rows.jsonl"), write_pairs(tmp_path / "pairs.jsonl")
    ckpt = write_checkpoint(n_kv_heads=2, dim=128)  # fewer heads than four processes
    data = {kind: pairs if "head" in kind else rows for kind in KINDS}
    for kind, options in KINDS.items():
        run(data[kind], tmp_path / kind, ckpt, **options)
    quantize(ckpt, tmp_path / "int8", "int8")
    adapted = [(str(folder), str(tmp_path / "lora")) for folder in (ckpt, tmp_path / "int8")]  # folded in, and beside
    groups = []
    for n, cases in CASES.items():
        outs = {case: tmp_path / f"{case[0]} over {case[1]} of {n}" for case in cases}
        runs = [(size, KINDS[kind], str(data[kind]), str(ckpt), str(out)) for (kind, size), out in outs.items()]
        groups.append((n, runs, adapted))
    result = run_python(FORKS + SCRIPT, json.dumps(groups), tmp_path, timeout=580, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-3000:]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [folder for folder, _ in answers] == [folder for folder, _ in adapted] * len(CASES)
    for folder, answer in answers:
        llama = Llama.build(folder, max_seq_len=64, dtype="float32", adapter=tmp_path / "lora")
        assert llama.generate([[1, 2, 3], [4, 5]], 10, 0)[0] == answer
    for n, cases in CASES.items():
        for kind, size in cases:
            many_of = f"{kind} over {size} of {n}"
            one, many = (read_log(tmp_path / f"{name}.training") for name in (kind, many_of))
            assert largest_difference(losses(one), losses(many)) < 1e-5, many_of
            assert relative_difference(written(tmp_path / many_of), written(tmp_path / kind)) < 1e-4, many_of


def written(folder: Path) -> dict[str, torch.Tensor]:
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return load_file(folder / name)
    return open_shard(folder / "consolidated.00.pth")


def test_llama_2s_dialogs_are_learned_as_they_are_prompted(stories):
    from llama.training.examples import Reader

    tokenizer = Tokenizer(stories / "tokenizer.model")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    reader = Reader(tokenizer, 100)
    document = reader.dialog([*messages, *messages])
    prompt = reader.formatter.encode_dialog_prompt([*messages, messages[0]])
    assert document.ids[: len(prompt)] == prompt and document.ids[-1] == tokenizer.eos_id
    assert tokenizer.decode([i for i, ok in zip(document.ids, document.learned) if ok]).split() == ["Yes", "Yes"]
