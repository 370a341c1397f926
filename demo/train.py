"""Trains the embedded checkpoint from scratch, without outside data or an accelerator. On two cores:

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m demo.train

(one process a core is faster than two threads, because the cores wait for each other only once a step; plain
`python -m demo.train` works too).

Makes the tokenizer, draws documents from `demo.corpus` (never the same twice), trains on them with `llama.training` and
writes the checkpoint in Meta's layout: consolidated.00.pth (bfloat16), params.json, tokenizer.model, checklist.chk. A
run that was stopped goes on from its last save.

Muon trains the matrices of the layers, AdamW the embedding and the norms. The learning rate rises, stays, and falls
linearly to zero over the last part of the run. The loss has only the tokens that the model should write: the answers of
dialogs, and all of a plain text.
"""

import argparse
import functools
import itertools
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from demo import corpus, train_tokenizer
from llama import parallel
from llama.checkpoint import save_checkpoint
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer
from llama.training import saves
from llama.training.batches import collate, cut_into_passes
from llama.training.examples import Example, Reader
from llama.training.loss import LanguageLoss
from llama.training.report import Report
from llama.training.trainer import Trainer, shard_over_replicas

HERE = Path(__file__).parent / "checkpoint"
N_TOKENS = 3328  # of the byte-pair encoding; 256 special tokens follow
PARAMS = {"dim": 256, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "vocab_size": N_TOKENS + 256}
PARAMS |= {"multiple_of": 64, "norm_eps": 1e-5, "rope_theta": 10000.0}
MAX_LEN = 512
SEED = 1
STEP_TOKENS, PASS_TOKENS = 12288, 3072
CHUNK_STEPS = 50  # documents are drawn for this many steps at a time
PHASES = (0.27, 0.47, 0.64, 0.83)  # the mixture of documents changes after these shares of the run


class Stream:
    """The documents of each step: endless, never the same twice; a step has the same documents in each run.

    Args:
        reader: turns documents into examples.
        n_steps: the steps of the run; `PHASES` are shares of them.
    """

    def __init__(self, reader: Reader, n_steps: int):
        self.reader, self.n_steps = reader, n_steps
        self._chunk = functools.lru_cache(maxsize=1)(self._draw)

    def __getitem__(self, step: int) -> list[Example]:
        return self._chunk(step // CHUNK_STEPS)[step % CHUNK_STEPS]

    def _draw(self, chunk: int) -> list[list[Example]]:
        phase = sum(chunk * CHUNK_STEPS / self.n_steps >= first for first in PHASES)
        steps: list[list[Example]] = [[]]
        room = STEP_TOKENS
        for document in corpus.documents(SEED * 1_000_003 + chunk, phase):
            encoded = self.reader.text(document) if isinstance(document, str) else self.reader.dialog(document)
            if len(encoded.ids) > MAX_LEN:
                continue
            if room < len(encoded.ids):
                if len(steps) == CHUNK_STEPS:
                    return steps
                steps.append([])
                room = STEP_TOKENS
            steps[-1].append(Example((encoded,)))
            room -= len(encoded.ids)
        return steps


def learning_rate(peak: float, n_steps: int, step: int) -> float:
    """A short rise, a plateau, a linear fall over the last 45%."""
    return peak * min((step + 1) / 60, 1.0, (1 - step / n_steps) / 0.45)


def optimizers_of(module: LanguageLoss) -> list[torch.optim.Optimizer]:
    """Muon (kellerjordan.github.io/posts/muon) for the matrices of the layers, AdamW for the rest."""
    matrices = [p for p in module.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in module.named_parameters() if p.ndim == 1 or "tok_embeddings" in name]
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(folder: Path, state: Path, n_tokens: int, lr: float, save_every: int) -> None:
    """Trains until the token budget is spent, and writes the checkpoint into `folder`."""
    device, n_steps = torch.device("cpu"), max(1, n_tokens // STEP_TOKENS)
    parallel.initialize(1, device)
    with parallel.fail_together():
        if dist.get_rank() == 0:
            state.mkdir(parents=True, exist_ok=True)
            if not (state / "tokenizer.model").exists():
                texts = map(corpus.as_text, itertools.islice(corpus.documents(SEED), 40_000))
                words = train_tokenizer.count_words(texts)
                train_tokenizer.write(train_tokenizer.learn(words, N_TOKENS), state / "tokenizer.model")
    tokenizer = Tokenizer(state / "tokenizer.model")
    model = Transformer(ModelArgs(**PARAMS, max_seq_len=MAX_LEN, tied_embeddings=True))
    model.init_weights(generator=torch.Generator().manual_seed(SEED))
    module = LanguageLoss(model)
    shard_over_replicas(module, model)
    optimizers = optimizers_of(module)
    trainer = Trainer(module, optimizers, functools.partial(learning_rate, lr, n_steps), dtype=torch.bfloat16)
    stream = Stream(Reader(tokenizer, MAX_LEN), n_steps)
    with parallel.fail_at_once():
        run_steps(trainer, stream, n_steps, state, save_every)
        write(model, tokenizer, state, folder)


def run_steps(trainer: Trainer, stream: Stream, n_steps: int, state: Path, save_every: int) -> None:
    """Runs all steps after the last save."""
    tensors, done = saves.state_of(trainer.module, trainer.optimizers), saves.newest(state) or 0
    if done:
        saves.load(state, done, tensors)
    flops = 6.0 * sum(p.numel() for p in trainer.parameters.values())
    report = Report(state, done, n_steps, flops, None)
    n_replicas = parallel.n_replicas()
    for number in range(done, n_steps):
        examples = stream[number]
        passes = cut_into_passes(examples, PASS_TOKENS, n_replicas)[parallel.replica() :: n_replicas]
        step = trainer.step(number, [collate(group, MAX_LEN) for group in passes])
        n_tokens = sum(example.n_tokens for example in examples)
        values = {"loss": step.loss, "gradient_norm": step.gradient_norm, "lr": trainer.rate(number)}
        report.note(number + 1, n_tokens, **values)
        if (number + 1) % save_every == 0 or number + 1 == n_steps:
            saves.save(state, number + 1, tensors)
    report.close()


def write(model: Transformer, tokenizer: Tokenizer, state: Path, folder: Path) -> None:
    """Writes the checkpoint into `state`, then moves its files into `folder`."""
    new = state / "checkpoint"
    if dist.get_rank() == 0:
        shutil.rmtree(new, ignore_errors=True)
    tensors = dict(model.named_parameters())  # as FSDP has sharded them
    save_checkpoint(model, tokenizer, new, dtype=torch.bfloat16, tensors=tensors)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for path in new.iterdir():
            path.replace(folder / path.name)
        new.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=HERE, help="the directory of the checkpoint")
    parser.add_argument(
        "--state", type=Path, default=Path("demo-training"), help="the run's directory: saves, log, tokenizer"
    )
    parser.add_argument("--tokens", type=float, default=23e6, help="token budget")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save_every", type=int, default=100, help="steps between saves")
    args = parser.parse_args()
    train(args.folder, args.state, int(args.tokens), args.lr, args.save_every)


if __name__ == "__main__":
    main()
