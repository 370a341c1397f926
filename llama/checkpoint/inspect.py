"""What a checkpoint directory holds, and what is wrong with it: the functions behind `llama info` and `llama verify`.

They take Meta's and Hugging Face's directories, print nothing and build no model.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llama.checkpoint.loading import CHUNK_BYTES, pieces
from llama.checkpoint.meta import MetaCheckpoint, full_shapes, open_shard, require_directory
from llama.checkpoint.open import open_checkpoint
from llama.checkpoint.quantized import stored
from llama.checkpoint.writer import CHECKLIST, md5_of
from llama.layers.packing import drop_pages
from llama.layers.quantization import KINDS
from llama.model import ModelArgs
from llama.tokenizer import ChatFormat, Tokenizer

# Published models by (dim, layers), because a params.json does not name its model.
LLAMA_1_AND_2 = {(4096, 32): "7B", (5120, 40): "13B", (6656, 60): "33B", (8192, 80): "65B or 70B"}
LLAMA_3 = {(4096, 32): "8B", (8192, 80): "70B", (16384, 126): "405B", (2048, 16): "1B", (3072, 28): "3B"}


def family(args: ModelArgs) -> tuple[str, int | None]:
    """The published Llama that has this shape, and its context length, tokens; None if unknown."""
    shape = (args.dim, args.n_layers)
    if args.vocab_size == 128256 and args.rope_theta == 500000:
        size = LLAMA_3.get(shape, "of an unpublished size")
        if args.tied_embeddings:
            return f"Llama 3.2 {size}", 131072
        if args.use_scaled_rope:
            return f"Llama 3.1{' or 3.3' if size == '70B' else ''} {size}", 131072
        return f"Llama 3 {size}", 8192
    if args.vocab_size in (32000, 32016):
        size = LLAMA_1_AND_2.get(shape, "of an unpublished size")
        if args.rope_theta == 1000000:
            return f"Code Llama {size}", 16384
        if args.norm_eps == 1e-6:  # the only difference between Llama 1 and 2
            return f"Llama 1 {size}", 2048
        return f"Llama 2 {size}", 4096
    return "a Llama that Meta has not published", None


def memory(args: ModelArgs, n_parameters: int, itemsize: int, n_ranks: int = 1) -> dict[str, int]:
    """Bytes that each of n_ranks processes needs for args.max_batch_size sequences of args.max_seq_len tokens."""
    kv_heads = max(args.n_kv_heads, n_ranks) // n_ranks
    cache = 2 * args.n_layers * args.max_batch_size * kv_heads * args.max_seq_len * args.head_dim
    return {
        "weights": n_parameters * itemsize // n_ranks,
        "cache": cache * itemsize,
        "logits": args.max_batch_size * args.vocab_size * torch.float32.itemsize,  # of the last position
    }


def info(
    ckpt_dir: str | os.PathLike,
    tokenizer_path: str | os.PathLike | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 1,
    quantize: str | None = None,
    gpu_memory: str | None = None,
) -> list[tuple[str, str]]:
    """What a directory holds and needs: (name, value) pairs in the order to show them. Reads headers, not weights.

    Args:
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, quantize: as in `Llama.build`.
        gpu_memory: of each device, such as "16GB"; if set, the values also say whether the model fits.

    Raises FileNotFoundError, ValueError and ImportError as `Llama.build` does; ValueError also for a wrong size.
    """
    room = None if gpu_memory is None else parse_size(gpu_memory)
    if quantize is not None and quantize not in KINDS:
        raise ValueError(f"quantize = {quantize!r}: expected one of {', '.join(KINDS)}")
    tokenizer, checkpoint = open_checkpoint(Path(ckpt_dir), tokenizer_path, max_seq_len, max_batch_size)
    args = checkpoint.args
    n_parameters = sum(map(math.prod, checkpoint.shapes.values()))
    name, context = family(args)
    n_files, kind = len(checkpoint.paths), "Meta" if isinstance(checkpoint, MetaCheckpoint) else "Hugging Face"
    bits = f", matrices {checkpoint.quantization}" if checkpoint.quantization else ""
    if bits and quantize not in (None, checkpoint.quantization):
        raise ValueError(f"quantize = {quantize!r}, but {ckpt_dir} is {checkpoint.quantization} already: leave it out")
    n_shared = "as many" if args.n_kv_heads == args.n_heads else args.n_kv_heads
    lines = [
        ("architecture", f"looks like {name}"),
        ("parameters", f"{n_parameters:,}{', the output matrix is the embedding' if args.tied_embeddings else ''}"),
        ("layers", f"{args.n_layers} of dim {args.dim}, hidden {args.hidden_dim}"),
        ("heads", f"{args.n_heads} of {args.head_dim}, {n_shared} of keys and values"),
        ("vocabulary", f"{args.vocab_size:,}"),
        ("dtype", str(checkpoint.dtype).removeprefix("torch.") + bits),
        ("files", f"{n_files} ({kind}), {_size(sum(path.stat().st_size for path in checkpoint.paths))}"),
        ("context", f"{context:,} tokens" if context else "unknown: the files do not say"),
        ("dialogs", _dialogs(tokenizer)),
        ("stop ids", ", ".join(f"{i} {tokenizer.decode([i]) or '</s>'}" for i in sorted(tokenizer.stop_tokens))),
    ]
    for n_ranks in [n for n in args.model_parallel_sizes if n <= 16]:
        parts = memory(args, n_parameters, checkpoint.dtype.itemsize, n_ranks)
        if bits:
            parts["weights"] = sum(tensor.nbytes for tensor in checkpoint.shards[0].values()) // n_ranks
        elif quantize:
            parts["weights"] = _rounded_bytes(args, quantize, checkpoint.dtype) // n_ranks
        text = _size(sum(parts.values())) + " each" * (n_ranks > 1)
        if n_ranks == 1:
            text += f" = {' + '.join(f'{part} {_size(size)}' for part, size in parts.items())}"
            text += f", at max_batch_size {max_batch_size}, max_seq_len {max_seq_len}"
        if room is not None:
            fits = sum(parts.values()) <= room
            text += f", {'fits' if fits else 'does not fit'} in {gpu_memory}"
        lines.append(("memory", f"on {n_ranks} process{'es' if n_ranks > 1 else ''}: {text}"))
    return [*lines, ("model_parallel_size", "one of " + ", ".join(map(str, args.model_parallel_sizes)))]


def _dialogs(tokenizer: Tokenizer) -> str:
    """The format of dialogs."""
    built_in = "Llama 2's built-in format" if tokenizer.kind == "llama2" else "Llama 3's built-in format"
    if tokenizer.chat_template is None:
        return built_in
    name = tokenizer.chat_template.source.name
    try:
        own = ChatFormat(tokenizer).template is not None
    except (ValueError, ImportError) as error:
        return f"none: {error}"
    return f"the directory's own template, {name}" if own else f"{built_in}, and {name} renders the same"


def _rounded_bytes(args: ModelArgs, kind: str, dtype: torch.dtype) -> int:
    """Bytes of all weights with rounded matrices. A tied output matrix is a rounded copy of the embedding."""
    parts = [stored(name, shape, kind, dtype) for name, shape in full_shapes(args).items()]
    return sum(math.prod(shape) * part_dtype.itemsize for shape, part_dtype in parts)


def parse_size(text: str) -> int:
    """The bytes of a size such as "16GB", "16 GiB" or "8e9". Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", str(text), re.I)
    try:
        return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " "))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"gpu_memory = {text!r}: expected a number of bytes, such as 16GB or 24GiB") from None


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


@dataclass
class Verification:
    """What `verify` found."""

    problems: list[str] = field(default_factory=list)  # a message for each thing that is wrong
    notes: list[str] = field(default_factory=list)  # what was not checked, and why
    n_tensors: int = 0  # tensors read
    n_bytes: int = 0  # and their bytes


def bytes_to_verify(ckpt_dir: str | os.PathLike) -> int:
    """About how much `verify` will read, for a progress bar."""
    files = [path for path in Path(ckpt_dir).glob("*") if path.suffix in (".pth", ".safetensors")]
    return sum(path.stat().st_size for path in files) * (2 if (Path(ckpt_dir) / CHECKLIST).is_file() else 1)


def verify(
    ckpt_dir: str | os.PathLike,
    tokenizer_path: str | os.PathLike | None = None,
    advance: Callable[[int], object] = lambda n_bytes: None,
) -> Verification:
    """Reads a whole directory: is every tensor there, of the right shape, finite? Are the sums of checklist.chk right?

    It goes on after a problem, to find them all, and needs memory for a few chunks of CHUNK_BYTES. After each read it
    calls `advance` with the number of bytes. Raises FileNotFoundError if there is no such directory.
    """
    folder, found = Path(ckpt_dir), Verification()
    require_directory("ckpt_dir", folder, "a checkpoint")
    _verify_checklist(folder, found, advance)
    for label, parts in _open_all(folder, tokenizer_path, found):
        n_bad = 0
        for part in parts:
            # A sum is finite only if all its terms are; it takes one pass and no memory.
            if not part.sum(dtype=torch.float64 if part.dtype == torch.float64 else torch.float32).isfinite():
                n_bad += part.numel() - int(part.isfinite().sum())
            found.n_bytes += part.nbytes
            drop_pages(part)
            advance(part.nbytes)
        found.n_tensors += 1
        if n_bad:
            found.problems.append(f"{folder / label}: {n_bad:,} numbers are not finite (NaN or infinite)")
    return found


def _open_all(
    folder: Path, tokenizer_path: str | os.PathLike | None, found: Verification
) -> Iterator[tuple[str, Iterable[torch.Tensor]]]:
    """Adds the problems of the headers to `found`. Yields the readable tensors: a label, and the numbers in parts."""
    shards: dict[Path, dict[str, torch.Tensor]] = {}
    try:
        _, checkpoint = open_checkpoint(folder, tokenizer_path, check=False)
    except (OSError, ValueError, ImportError) as error:
        problems = [str(error)]
        for path in sorted(folder.glob("consolidated.*.pth")):
            try:
                shards[path] = open_shard(path)
            except (OSError, ValueError) as damage:
                problems.append(str(damage))
        found.problems += dict.fromkeys(problems)  # each once
    else:
        problems = list(checkpoint.problems())
        found.problems += problems
        if isinstance(checkpoint, MetaCheckpoint):
            shards = dict(zip(checkpoint.paths, checkpoint.shards))
        elif not problems:
            for name, shape in checkpoint.shapes.items():
                yield name, (piece for *_, piece in pieces(checkpoint, name, 0, 0, shape[0]))
    for path, shard in shards.items():
        for name, tensor in shard.items():
            rows = max(1, CHUNK_BYTES // max(1, tensor[:1].nbytes)) if tensor.dim() else 1
            parts = list(tensor.split(rows)) if tensor.dim() else [tensor]
            if tensor.dtype == torch.uint8 and not problems:
                parts += [part for part in checkpoint.blocks(name).scales_and_zeros() if part is not None]
            yield f"{path.name}: {name}", parts


def _verify_checklist(folder: Path, found: Verification, advance: Callable[[int], object]) -> None:
    """Checks the md5 sums of checklist.chk, as md5sum writes it: a sum, two spaces (or one and a star), a name."""
    path = folder / CHECKLIST
    if not path.is_file():
        found.notes.append(f"there is no {CHECKLIST}: md5 sums were not checked")
        return
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        expected, _, name = line.strip().partition(" ")
        file = folder / name.strip().removeprefix("*")
        if len(expected) != 32 or not name.strip():
            found.problems.append(f"{path} line {number} is {line[:80]!r}: expected an md5 sum and the name of a file")
        elif not os.path.isfile(file):  # unlike Path.is_file, it raises for no name
            found.problems.append(f"{file} is missing: {CHECKLIST} names it")
        elif (md5 := md5_of(file, advance)) != expected.lower():
            found.problems.append(f"{file} has md5 {md5}: {CHECKLIST} says {expected}")
