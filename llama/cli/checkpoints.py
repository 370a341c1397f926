"""The commands for checkpoint directories: info, verify, convert, quantize. They load no model."""

import sys
from typing import Literal

from tyro.conf import Positional

from llama.checkpoint import convert as conversion
from llama.checkpoint import inspect as inspection
from llama.checkpoint.writer import progress


def info(
    ckpt_dir: Positional[str],
    *,
    tokenizer_path: str | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 1,
    quantize: Literal["int8", "int4"] | None = None,
    gpu_memory: str | None = None,
) -> None:
    """Shows what a checkpoint directory holds, and the memory it needs at a given batch and length.

    Args:
        ckpt_dir: Meta's directory or Hugging Face's.
        tokenizer_path: the tokenizer's file; the directory's own when left out.
        max_seq_len: tokens of a prompt and its answer.
        max_batch_size: how many sequences run at a time.
        quantize: the type that the matrices are rounded to while they are loaded.
        gpu_memory: of each device, such as 16GB: shows whether the model fits.
    """
    sizes = (max_seq_len, max_batch_size, quantize, gpu_memory)
    for name, value in inspection.info(ckpt_dir, tokenizer_path, *sizes):
        print(f"{name:20} {value}")


def verify(ckpt_dir: Positional[str], *, tokenizer_path: str | None = None) -> None:
    """Reads a whole checkpoint directory and lists what is wrong with it. The exit code is 1 if anything is.

    Args:
        ckpt_dir: Meta's directory or Hugging Face's.
        tokenizer_path: the tokenizer's file; the directory's own when left out.
    """
    with progress(inspection.bytes_to_verify(ckpt_dir), "verify") as advance:
        found = inspection.verify(ckpt_dir, tokenizer_path, advance)
    for note in found.notes:
        print(f"note: {note}")
    for problem in found.problems:
        print(f"problem: {problem}")
    tensors = "1 tensor" if found.n_tensors == 1 else f"{found.n_tensors} tensors"
    problems = "1 problem" if len(found.problems) == 1 else f"{len(found.problems) or 'no'} problems"
    print(f"{tensors}, {found.n_bytes / 1e9:.2f} GB read: {problems}")
    if found.problems:
        sys.exit(1)


def convert(
    src: Positional[str],
    dst: Positional[str],
    *,
    to: Literal["meta", "hf"],
    shards: int | None = None,
    dtype: str | None = None,
) -> None:
    """Writes a checkpoint directory again, in Meta's format or Hugging Face's.

    Args:
        src: the directory to read, of either format.
        dst: the directory to make.
        to: the format to write.
        shards: the number of files.
        dtype: of the weights written; the source's when left out.
    """
    conversion.convert(src, dst, to, shards, dtype)
    print(f"wrote {dst}")


def quantize(src: Positional[str], dst: Positional[str], *, to: Literal["int8", "int4"]) -> None:
    """Writes a checkpoint directory again with its matrices in 8 or 4 bits, for `--ckpt_dir`.

    Args:
        src: the directory to read, Meta's or Hugging Face's.
        dst: the directory to make.
        to: the type of the matrices.
    """
    conversion.quantize(src, dst, to)
    print(f"wrote {dst}")
