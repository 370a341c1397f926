"""Shared by the tests of training: data, a run of the package, and the slow obvious loop with Transformers."""

import json
import random
from pathlib import Path
from unittest import mock

import torch

from llama import Tokenizer
from llama.checkpoint.convert import convert
from llama.datasets.rows import Rows
from llama.training import Options, finetune
from llama.training.batches import plan_steps
from llama.training.examples import Example, Reader
from llama.training.report import read_log
from llama.training.trainer import cosine

# The beginning of a script that forks its runs from a process that has imported everything, because importing takes
# longer than a run. `start` forks the ranks of a run, each of which calls a function; `ended` waits for them.
FORKS = """
import json, os, random, signal, socket, sys, time, traceback
import torch
import torch._dynamo  # as optimizers do
torch.set_num_threads(1)
sys.modules["matplotlib.figure"] = None  # drawing curves takes longer than the training
import llama.training.sft
from llama import Llama
from llama.training import Options, finetune
from llama.training.trainer import Trainer
llama.training.sft.measured_peak = lambda device, dtype: 1e9  # so does this

def start(n_processes, function):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(n_processes):
        if pid := os.fork():
            ranks.append(pid)
            continue
        if n_processes > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_processes))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    return ranks

def ended(ranks):
    return [os.waitpid(pid, 0)[1] for pid in ranks]
"""


def write_rows(path: Path, n: int = 120, seed: int = 0) -> Path:
    """Dialogs of one to three turns and unequal lengths, in letters."""
    rng = random.Random(seed)
    words = ["sun", "moon", "a", "river", "stone", "to", "be", "green", "x"]

    def text(longest: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, longest)))

    with path.open("w") as file:
        for _ in range(n):
            dialog = []
            for _ in range(rng.randint(1, 2)):
                dialog += [{"role": "user", "content": text(4)}, {"role": "assistant", "content": text(8)}]
            file.write(json.dumps({"messages": dialog}) + "\n")
    return path


def write_pairs(path: Path, n: int = 60, seed: int = 0) -> Path:
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(n):
            question = {"role": "user", "content": f"number {rng.randint(0, 99)}"}
            row = {"messages": [question], "chosen": "yes " * rng.randint(1, 5), "rejected": "no " * rng.randint(1, 5)}
            file.write(json.dumps(row) + "\n")
    return path


def run(data: Path, out: Path, ckpt: Path, **options) -> list[dict]:
    """Runs a fine-tuning; returns the lines of its log."""
    settings = {"max_seq_len": 128, "batch_tokens": 300, "epochs": 100, "steps": 50, "lr": 1e-3}
    # Both take longer than the training.
    curves, peak = mock.patch("llama.training.report.plot_curves"), mock.patch("llama.training.sft.measured_peak")
    with curves, peak as measured:
        measured.return_value = 1e9
        finetune(data, out, ckpt, Options(**settings | options), progress=False)
    return read_log(out.parent / f"{out.name}.training")


def steps_of(data: Path, ckpt: Path, pairs: bool = False, **options) -> list[list[Example]]:
    """The examples of each step of a `run` with these options."""
    settings = {"batch_tokens": 300, "epochs": 100, "steps": 50, "seed": 1} | options
    examples = Reader(Tokenizer(ckpt / "tokenizer.model"), 128, pairs=pairs).read(Rows(data))
    steps = plan_steps(examples, settings["batch_tokens"], settings["epochs"], settings["seed"], settings["steps"])
    return [[examples[i] for i in step] for step in steps]


def hugging_face(ckpt: Path, folder: Path):
    """Transformers' model with the same weights, float32."""
    from transformers import LlamaForCausalLM

    convert(ckpt, folder, "hf")
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def padded(documents: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, attention mask and labels, [n, longest], padded on the right; the labels of Transformers."""
    width = max(len(d.ids) for d in documents)
    ids = torch.tensor([d.ids + [0] * (width - len(d.ids)) for d in documents])
    mask = torch.tensor([[1] * len(d.ids) + [0] * (width - len(d.ids)) for d in documents])
    labels = [[i if ok else -100 for i, ok in zip(d.ids, d.learned)] + [-100] * (width - len(d.ids)) for d in documents]
    return ids, mask, torch.tensor(labels)


def decaying(model: torch.nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW without decay of the norms, like Transformers' Trainer."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if "norm" not in name], "weight_decay": weight_decay},
        {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]])


def train_with_transformers(model, steps, loss_of, lr: float = 1e-3, weight_decay: float = 0.0) -> list[float]:
    """The plain loop: one batch, one backward pass, clipping, AdamW with warm-up and cosine; its losses."""
    optimizer, rate = decaying(model, weight_decay), cosine(lr, len(steps), -(-3 * len(steps) // 100))
    losses = []
    for number, step in enumerate(steps):
        loss = loss_of(model, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def language_loss(model, step) -> torch.Tensor:
    ids, mask, labels = padded([d for example in step for d in example.documents])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest of all tensors' |ours - theirs| / |theirs|, in the Euclidean norm."""
    assert ours.keys() == theirs.keys() and ours
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in ours)
