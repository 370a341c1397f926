"""Trains the embedded checkpoint from nothing, without outside data or an accelerator. On two cores:

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m demo.train --compile

(one process a core beats two threads, for no core waits for the other but once a step; plain `python -m demo.train`
works too).

Makes the tokenizer, streams documents from `demo.corpus` (never the same twice), trains `llama.model.Transformer` and
writes the checkpoint in Meta's layout: consolidated.00.pth (bfloat16), params.json, tokenizer.model, checklist.chk. A
run that is broken off goes on where its last save was.

Matrices of the layers are trained with Muon, the embedding and the norms with AdamW; the learning rate rises, stays,
and falls linearly to zero over the last part of the budget. Only what the model has to say is in the loss: the answers
of dialogs, all of a plain text.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from demo import corpus, train_tokenizer
from llama.model import ModelArgs, Transformer
from llama.parallel import initialize
from llama.tokenizer import ChatFormat, Tokenizer

HERE = Path(__file__).parent / "checkpoint"
N_TOKENS = 3328  # of the byte-pair encoding; 256 special tokens follow
PARAMS = {"dim": 256, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "vocab_size": N_TOKENS + 256}
PARAMS |= {"multiple_of": 64, "norm_eps": 1e-5, "rope_theta": 10000.0}
MAX_LEN = 512
SEED = 1
PHASES = (19, 33, 45, 58)  # the chunks at which the mixture of documents changes
BATCH_TOKENS, BATCHES_PER_STEP = 3072, 4  # a step is about 12,000 tokens, over all processes


def encode(doc: corpus.Document, tokenizer: Tokenizer, chat: ChatFormat) -> tuple[list[int], list[bool]]:
    """A document's ids, and for each whether it is to be learned."""
    ids, learned = [tokenizer.bos_id], [False]
    if isinstance(doc, str):
        text = tokenizer.encode(doc, bos=False, eos=True)
        return ids + text, learned + [True] * len(text)
    for message in doc:
        whole = chat.encode_message(message)
        header = len(chat.encode_header(message))
        ids += whole
        learned += [False] * header + [message["role"] == "assistant"] * (len(whole) - header)
    return ids, learned


Batch = tuple[torch.Tensor, torch.Tensor]  # ids [B, T], and which of them are learned


def batches(tokenizer: Tokenizer, chunk: int, tokens_per_batch: int) -> list[Batch]:
    """The batches of one chunk of the stream: documents of like length share a batch, so little is padding."""
    chat = ChatFormat(tokenizer)
    phase = sum(chunk >= first for first in PHASES)
    drawn = itertools.islice(corpus.documents(SEED * 1_000_003 + chunk, phase), 4096)
    docs = [encode(doc, tokenizer, chat) for doc in drawn]
    docs = sorted((doc for doc in docs if len(doc[0]) <= MAX_LEN), key=lambda doc: len(doc[0]))
    groups: list[list] = [[]]
    for doc in docs:
        if groups[-1] and (len(groups[-1]) + 1) * len(doc[0]) > tokens_per_batch:
            groups.append([])
        groups[-1].append(doc)
    random.Random(chunk).shuffle(groups)
    made = []
    for group in groups:
        width = len(group[-1][0])
        ids = torch.tensor([ids + [tokenizer.pad_id] * (width - len(ids)) for ids, _ in group])
        learned = torch.tensor([learned + [False] * (width - len(learned)) for _, learned in group])
        made.append((ids, learned))
    return made


def stream(tokenizer: Tokenizer, first: int, tokens_per_batch: int) -> Iterator[tuple[int, Batch]]:
    """Endless batches from chunk `first` on, each with its chunk's number."""
    for chunk in itertools.count(first):
        for batch in batches(tokenizer, chunk, tokens_per_batch):
            yield chunk, batch


def loss_sum(model: Transformer, ids: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy of the learned tokens."""
    hidden = model.hidden_states(ids[:, :-1])
    return F.cross_entropy(model.logits(hidden[learned[:, 1:]]), ids[:, 1:][learned[:, 1:]], reduction="sum")


def export(model: Transformer, folder: Path) -> None:
    """Writes the checkpoint, each file at once (a reader never sees half of one)."""
    state = model.state_dict()
    state.pop("output.weight")  # tied
    tensors = {name: tensor.detach().to(torch.bfloat16).clone() for name, tensor in state.items()}
    torch.save(tensors, folder / "new.pth")
    os.replace(folder / "new.pth", folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS) + "\n")
    names = ["consolidated.00.pth", "params.json", "tokenizer.model"]
    sums = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "checklist.chk").write_text("".join(sums))


def learning_rate(progress: float, steps: int) -> float:
    """The share of the full learning rate: a short rise, a plateau, a linear fall over the last 45%."""
    return min((steps + 1) / 60, 1.0, max(0.0, (1 - progress) / 0.45))


def sum_gradients(model: Transformer) -> None:
    """Adds up the gradients of all processes, in one message."""
    if dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(whole.view_as(gradient))


def train(args: argparse.Namespace) -> None:
    """Trains until the token budget or the time budget is spent, whichever is first."""
    folder, state, lr = args.folder, args.state, args.lr
    initialize(1, torch.device("cpu"))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    folder.mkdir(parents=True, exist_ok=True)
    if not state.exists() and rank == 0:
        texts = map(corpus.as_text, itertools.islice(corpus.documents(SEED), 40_000))
        train_tokenizer.write(
            train_tokenizer.learn(train_tokenizer.count_words(texts), N_TOKENS), folder / "tokenizer.model"
        )
    dist.barrier()
    tokenizer = Tokenizer(folder / "tokenizer.model")
    model = Transformer(ModelArgs(**PARAMS, max_seq_len=MAX_LEN, tied_embeddings=True))
    model.init_weights(generator=torch.Generator().manual_seed(SEED))
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or name.startswith("tok_")]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    done = {"chunk": 0, "steps": 0, "tokens": 0, "seconds": 0.0}
    if state.exists():
        saved = torch.load(state, weights_only=True)
        done = saved["done"]
        model.load_state_dict(saved["model"])
        for optimizer, old in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(old)
        done["chunk"] += 1  # the rest of a half-used chunk is left out
    if args.compile:
        model.hidden_states = torch.compile(model.hidden_states, dynamic=True)
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {done['tokens']:,} tokens done", flush=True)

    def save() -> None:
        if rank != 0:
            return
        torch.save(
            {"done": done, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]},
            state.with_suffix(".new"),
        )
        os.replace(state.with_suffix(".new"), state)
        export(model, folder)

    source = stream(tokenizer, done["chunk"], BATCH_TOKENS)
    begun, saved_at, seconds_before = time.time(), time.time(), done["seconds"]
    window = [0.0, 0, 0, time.time()]  # loss, learned tokens, tokens, since
    while (progress := max(done["tokens"] / args.tokens, done["seconds"] / 60 / args.minutes)) < 1:
        parts = list(itertools.islice(source, BATCHES_PER_STEP))
        n_learned = sum(int(learned[:, 1:].sum()) for _, (_, learned) in parts)
        for _, (ids, learned) in parts[rank::world_size]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_sum(model, ids, learned) / n_learned
            loss.backward()
            window[0] += loss.item() * n_learned
            window[1] += int(learned[:, 1:].sum())
        done["chunk"] = parts[-1][0]
        n_tokens = sum(ids.numel() for _, (ids, _) in parts)
        done["tokens"] += n_tokens
        window[2] += n_tokens
        sum_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate(progress, done["steps"])
            optimizer.step()
            optimizer.zero_grad()
        done["steps"] += 1
        clock = torch.tensor(seconds_before + time.time() - begun, dtype=torch.float64)
        dist.broadcast(clock, 0)  # all processes stop at the same step
        done["seconds"] = clock.item()
        if done["steps"] % 25 == 0 and rank == 0:
            speed = window[2] / (time.time() - window[3])
            print(
                f"step {done['steps']} {progress:.1%} tokens {done['tokens'] / 1e6:.2f}M "
                f"loss {window[0] / window[1]:.4f} {speed:.0f} tokens/s {done['seconds'] / 60:.1f} min",
                flush=True,
            )
            window = [0.0, 0, 0, time.time()]
        if time.time() - saved_at > 60 * args.save_every:
            save()
            saved_at = time.time()
    save()
    dist.barrier()
    if rank == 0:
        state.unlink()
        print(f"done: {done['tokens']:,} tokens, {done['steps']:,} steps, {done['seconds'] / 60:.0f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=HERE, help="where the checkpoint goes")
    parser.add_argument(
        "--state", type=Path, default=Path("demo-training.pt"), help="what an interrupted run goes on from"
    )
    parser.add_argument("--tokens", type=float, default=30e6, help="token budget")
    parser.add_argument("--minutes", type=float, default=77, help="time budget")
    parser.add_argument("--compile", action="store_true", help="a quarter faster, after two minutes of compiling")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save_every", type=float, default=3, help="minutes between saves")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
