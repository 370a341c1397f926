"""The commands for fine-tuning: finetune and merge. Turns arguments into calls, nothing else."""

import sys
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from llama import adapters, parallel, training


@dataclass(frozen=True)
class Learning(training.Options):
    """What is learned, and how."""

    def __post_init__(self):
        """Checks nothing: `finetune` does, and its errors are one line instead of tyro's box."""


def finetune(
    data: Positional[str],
    out: Positional[str],
    learning: Learning,
    *,
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    device: str | None = None,
    model_parallel_size: int = 1,
    force: bool = False,
) -> None:
    """Fine-tunes a checkpoint on a file of texts or dialogs. Killed and started again, it goes on.

    Under torchrun, each group of --model_parallel_size processes is a replica. docs/training.md describes the rows.

    Args:
        data: JSON lines, CSV or Parquet with `messages`, `prompt` and `completion`, or `text`; or the output of `llama
            sample`; with --head scalar, `chosen` and `rejected`.
        out: the directory to make. OUT.training beside it has the log, the curves and, during the run, the saves.
        ckpt_dir: the checkpoint to start from, Meta's or Hugging Face's; a quantised one with --lora_rank.
        tokenizer_path: the tokenizer's file; the directory's own when left out.
        device: "cuda", "mps" or "cpu"; the first of these that is there when left out.
        model_parallel_size: over how many processes the model is split.
        force: forgets an earlier run with other arguments, and starts over.
    """
    where = {"tokenizer_path": tokenizer_path, "device": device, "model_parallel_size": model_parallel_size}
    try:
        training.finetune(data, out, ckpt_dir, training.Options(**vars(learning)), **where, force=force)
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on from the last save in {out}.training", file=sys.stderr)
        raise
    parallel.silence_other_ranks()
    print(f"wrote {out}; {out}.training has the log and the curves")


def merge(
    src: Positional[str],
    adapter: Positional[str],
    dst: Positional[str],
    *,
    to: Literal["meta", "hf"] = "meta",
    shards: int | None = None,
    dtype: str | None = None,
) -> None:
    """Writes a checkpoint directory again, with an adapter folded into its weights.

    Args:
        src: the directory that the adapter was trained on, of either format; not quantised.
        adapter: the adapter's directory, as `llama finetune` and PEFT write it.
        dst: the directory to make.
        to: the format to write.
        shards: the number of files.
        dtype: of the weights written; the source's when left out.
    """
    adapters.merge(src, adapter, dst, to, shards, dtype)
    print(f"wrote {dst}")
