"""A whole fine-tuning run, from a checkpoint and a data file to new weights. It can be killed and started again.

While it runs, `OUT.training` holds its saves, its log and its curves; `OUT` appears whole at the end. A user's mistakes
are found before the first step. Knows nothing of command lines.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama import parallel
from llama.checkpoint.config import REWARD_MODEL
from llama.checkpoint.meta import MetaCheckpoint
from llama.checkpoint.save import save_checkpoint
from llama.datasets.rows import Rows
from llama.model import Transformer
from llama.training import saves
from llama.training.base import Base, load_model, open_base, weights
from llama.training.batches import Batch, collate, cut_into_passes, plan_steps
from llama.training.examples import Example, Reader
from llama.training.lora import add_lora, gather_adapter, write_adapter
from llama.training.loss import LanguageLoss, PreferenceLoss
from llama.training.options import Options
from llama.training.report import Report, measured_peak
from llama.training.trainer import Diverged, Trainer, adamw, cosine, shard_over_replicas

# The keys that a reward model's config.json has besides those of a language model.
REWARD_CONFIG = {"architectures": [REWARD_MODEL], "num_labels": 1, "id2label": {"0": "LABEL_0"}}
# The width of a row that short documents share. Attention costs the square of the width, so it is no wider.
PACKED_WIDTH = 512
COLUMNS_AS_JSON = ("messages", "answers", "tokens")  # in a CSV file; its other columns are text


def finetune(
    data: str | os.PathLike,
    out: str | os.PathLike,
    ckpt_dir: str | os.PathLike,
    options: Options,
    *,
    tokenizer_path: str | None = None,
    device: str | None = None,
    model_parallel_size: int | None = 1,
    force: bool = False,
    progress: bool = True,
) -> None:
    """Trains on a data file and writes `out`. Goes on from the last save if the same run was killed before.

    Under torchrun every process calls this. The model is split over `model_parallel_size` of them; each such group is a
    replica, and the replicas share the data, the weights and the optimizer's state.

    Args:
        data: a .jsonl, .csv or .parquet file of rows, in the forms of `examples.Reader`.
        out: the directory to make: a checkpoint, an adapter, or a reward model.
        ckpt_dir: the checkpoint to start from.
        tokenizer_path, device: as in `Llama.build`.
        model_parallel_size: over how many processes the model is split; None for all.
        force: whether to delete an earlier run and start over. An existing `out` is never overwritten.
        progress: whether to show a bar.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing; `out` is not empty.
        ValueError: an option is out of range or does not suit the checkpoint; the data has nothing to learn from; an
            earlier run was started differently (the message says what differs).
        Diverged: the loss or a gradient is not finite; the state before that step is saved.
        OSError: a file could not be written; the last save is whole.
    """
    out, ckpt_dir = Path(out), Path(ckpt_dir)
    folder = out.parent / f"{out.name}.training"
    device = parallel.pick_device(device)
    parallel.initialize(model_parallel_size, device)
    with parallel.fail_together():
        is_there = out.exists() and not (out.is_dir() and not any(out.iterdir()))
        n_saved = saves.newest(folder) if folder.is_dir() else None
        taken = f"{out} exists and is not an empty directory: name another, or remove it first"
        if is_there and n_saved is None:
            raise FileExistsError(taken)
        if not out.parent.is_dir():
            raise FileNotFoundError(f"cannot make {out}: {out.parent} is not a directory")
        rows = Rows(data, COLUMNS_AS_JSON)
        base = open_base(ckpt_dir, tokenizer_path, options)
        training, held_out = read_examples(rows, base, options)
        steps = plan_steps(training, options.batch_tokens, options.epochs, options.seed, options.steps)
        if not steps:
            found = f"epochs = {options.epochs} of {len(training)} examples"
            raise ValueError(f"{found} is less than one example: expected more of either")
        if is_there and (force or n_saved != len(steps)):
            raise FileExistsError(taken)
        started_as = describe(options, base, [*training, *held_out])
    with saves.run_folder(folder, started_as, force), parallel.fail_at_once():
        if not is_there:  # else the run was killed after it wrote `out`, before it removed the saves
            trainer = prepare_trainer(base, options, len(steps), device)
            report = open_report(trainer, base, options, folder, len(steps), progress)
            run_steps(trainer, steps, training, held_out, options, folder, report)
            write_result(base, options, out, trainer.module)
        if dist.get_rank() == 0:
            saves.remove_all(folder)


def read_examples(rows: Rows, base: Base, options: Options) -> tuple[list[Example], list[Example]]:
    """The examples to train on and those held out; rank 0 prints on stderr what was skipped.

    Raises:
        ValueError: there are none.
    """
    cut, pairs = options.long == "cut", options.head is not None
    reader = Reader(base.tokenizer, options.max_seq_len, options.learn, options.threshold, cut, pairs)
    examples = reader.read(rows)
    skipped = reader.skipped.lines()
    if not examples:
        raise ValueError(f"{rows.path} has nothing to learn from: {'; '.join(skipped) or 'it has no rows'}")
    if dist.get_rank() == 0:
        for line in skipped:
            print(f"{rows.path}: {line}", file=sys.stderr)
    n_held_out = round(options.eval_share * len(examples))
    if options.eval_share and not 0 < n_held_out < len(examples):
        raise ValueError(
            f"eval_share = {options.eval_share} of {len(examples)} examples is {n_held_out}: expected at least one, "
            "and at least one left to train on"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(options.seed)).tolist()
    held_out = set(order[:n_held_out])
    training = [example for index, example in enumerate(examples) if index not in held_out]
    return training, [examples[index] for index in sorted(held_out)]


def describe(options: Options, base: Base, examples: list[Example]) -> dict[str, Any]:
    """The data, the base and the options of a run: it goes on from a save only if they are the same."""
    digest = hashlib.sha256()
    for example in examples:
        for document in example.documents:
            digest.update(repr((document.ids, document.learned)).encode())
    layout = {"processes": dist.get_world_size(), "replicas": parallel.n_replicas()}
    model = {name: value for name, value in vars(base.checkpoint.args).items() if name != "max_batch_size"}
    sources = {"data": f"{len(examples)} examples, {digest.hexdigest()[:16]}", "base": base.digests, "model": model}
    chosen = asdict(options) | {"dtype": str(base.dtype).removeprefix("torch."), "tokenizer": base.tokenizer.digest}
    del chosen["to"]  # the format of the result may still change
    return json.loads(json.dumps(sources | chosen | layout))


def prepare_trainer(base: Base, options: Options, n_steps: int, device: torch.device) -> Trainer:
    """The model with its first weights, sharded over the replicas, and AdamW for the weights that learn."""
    model = load_model(base, options, device)
    module = prepare_module(model, options)
    shard_over_replicas(module, model)
    peak_rate = options.lr or (1e-5 if options.lora_rank is None else 2e-4)
    rate = cosine(peak_rate, n_steps, math.ceil(options.warmup * n_steps))
    return Trainer(module, [adamw(module, options.weight_decay)], rate, options.clip or None, base.dtype)


def prepare_module(model: Transformer, options: Options) -> LanguageLoss | PreferenceLoss:
    """The loss to minimise, with the model inside; the weights that learn require gradients."""
    generator = torch.Generator().manual_seed(options.seed)
    if options.head is not None:
        # As small as the network's weights, so that the first rewards are close to each other.
        score = torch.randn(1, model.args.dim, generator=generator) * model.args.dim**-0.5
    if options.lora_rank is not None:
        add_lora(model, options.lora_rank, options.alpha / options.lora_rank, options.targets, generator)
    if options.head is None:
        return LanguageLoss(model, options.recompute, options.temperature)
    return PreferenceLoss(model, score.to(model.rotary.device), options.recompute)


def passes_of(examples: list[Example], options: Options) -> Iterator[Batch]:
    """This replica's forward passes over the examples of a step."""
    pass_tokens = options.pass_tokens or max(options.max_seq_len, min(options.batch_tokens, 8192))
    passes = cut_into_passes(examples, pass_tokens, parallel.n_replicas())
    for group in passes[parallel.replica() :: parallel.n_replicas()]:
        longest = max((len(document.ids) for example in group for document in example.documents), default=0)
        yield collate(group, max(longest, min(options.max_seq_len, PACKED_WIDTH)), options.pack)


def open_report(trainer: Trainer, base: Base, options: Options, folder: Path, n_steps: int, progress: bool) -> Report:
    """Opens the report of a run. A token takes 6 operations for each weight that learns, and 4 for a frozen one."""
    n_weights = sum(math.prod(shape) for shape in base.checkpoint.shapes.values())
    flops = (6.0 if options.lora_rank is None else 4.0) * n_weights / dist.get_world_size()
    peak = measured_peak(trainer.device, trainer.dtype)
    return Report(folder, saves.newest(folder) or 0, n_steps, flops, peak, progress)


def run_steps(
    trainer: Trainer,
    steps: list[list[int]],
    training: list[Example],
    held_out: list[Example],
    options: Options,
    folder: Path,
    report: Report,
) -> None:
    """Runs all steps after the newest save; saves, evaluates and reports between them."""
    state = saves.state_of(trainer.module, trainer.optimizers)
    done = saves.newest(folder) or 0
    if done:
        saves.load(folder, done, state)
    for number in range(done, len(steps)):
        examples = [training[index] for index in steps[number]]
        try:
            step = trainer.step(number, passes_of(examples, options))
        except Diverged as error:
            _stop(trainer, report, folder, number, state, error)
            raise
        n_done = number + 1
        values = {"loss": step.loss, "gradient_norm": step.gradient_norm, "lr": trainer.rate(number)}
        if held_out and (n_done % options.eval_every == 0 or n_done == len(steps)):
            values["eval_loss"] = trainer.evaluate(passes_of(held_out, options))
        report.note(n_done, sum(example.n_tokens for example in examples), learned=step.weight, **values)
        if n_done % options.save_every == 0 or n_done == len(steps):
            saves.save(folder, n_done, state)
            report.plot()
    report.close()


def _stop(trainer: Trainer, report: Report, folder: Path, done: int, state: dict[str, Any], error: Diverged) -> None:
    """Saves the state before the step that diverged."""
    report.close()
    report.plot()
    report.warn(f"{error}: the run stops")
    if done and trainer.weights_are_finite():
        saves.save(folder, done, state)
        report.warn(f"{folder} has the state after step {done}, before it")


def write_result(base: Base, options: Options, out: Path, module: LanguageLoss | PreferenceLoss) -> None:
    """Writes what was learned: a checkpoint, an adapter, or a reward model. All processes call this."""
    model, head_dim = module.model, module.model.args.head_dim
    if options.lora_rank is not None and options.head is None:
        adapter = gather_adapter(model, base.digests)
        with parallel.fail_together():
            if dist.get_rank() == 0:
                write_adapter(out, adapter, options.alpha, head_dim, str(base.path))
        return
    is_meta = isinstance(base.checkpoint, MetaCheckpoint)
    tensors, to, config = weights(model), options.to or ("meta" if is_meta else "hf"), None
    if options.head is not None:
        tensors["score.weight"] = module.score.weight
        pad_id = max(base.tokenizer.pad_id, 0)  # Llama 2 has no token for padding: its unknown one, 0, ends no text
        to, config = "hf", REWARD_CONFIG | {"pad_token_id": pad_id}
    dtype = base.checkpoint.dtype
    save_checkpoint(model, base.tokenizer, out, to, dtype=dtype, tensors=tensors, config=config)
