"""Writes a checkpoint again: as Meta's shards, as a Hugging Face directory, or quantised. Takes any kind and size.

It copies weights from the mapped source in pieces of `loading.CHUNK_BYTES`, so any model needs some hundred MB beyond
the libraries. The target appears under its name when it is complete, or not at all.
"""

import base64
import bisect
import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.config import config_json, params_json, read_json
from llama.checkpoint.huggingface import INDEX_NAME, HuggingFaceCheckpoint, file_name, has_rotary_rows, rows_in_halves
from llama.checkpoint.loading import pieces
from llama.checkpoint.meta import COLUMNS, ROWS, MetaCheckpoint, Part, full_shapes, part_of_rank, shape_of_part
from llama.checkpoint.open import Checkpoint, open_checkpoint
from llama.checkpoint.quantized import FORMAT, Stored, is_matrix, stored
from llama.checkpoint.writer import PthFile, appear_whole, progress, safetensors_header, write_checklist
from llama.layers.kernels import in_blocks
from llama.layers.packing import drop_pages
from llama.layers.quantization import KINDS
from llama.parallel import dtype_by_name, partition
from llama.tokenizer import ChatFormat, Tokenizer
from llama.tokenizer.rank_file import LLAMA3_PATTERN, LLAMA3_SPECIAL_TOKENS
from llama.tokenizer.tokenizer_json import tokenizer_json

MAX_FILE_BYTES = 5 * 10**9  # of a safetensors file, as in Transformers

# The files about dialogs, and all files about the tokenizer and the answers, that a Hugging Face directory has.
CHAT_FILES = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
TEXT_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")

# `ChatFormat` for Llama 3, in Transformers' template language.
LLAMA3_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'].replace('tool', 'ipython') + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

Advance = Callable[[int], object]  # called with the number of bytes after each write


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    to: str,
    shards: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> None:
    """Writes the checkpoint of a directory into another, in Meta's format or Hugging Face's.

    Numbers are copied bit for bit, unless `dtype` changes theirs. Writes also the tokenizer, in the target's format,
    and checklist.chk with the md5 sums of all files. It writes into `.NAME.partial` next to `dst`; the next run removes
    what a killed run has left there.

    Args:
        src: Meta's directory or Hugging Face's, as `Llama.build` takes it.
        dst: the directory to make; it may exist if it is empty.
        to: "meta" or "hf". It may be the format of `src`: then the files are cut again.
        shards: the number of consolidated.NN.pth (one when None) or safetensors files (when None, as few as hold at
            most 5 GB each).
        dtype: of the tensors written: bfloat16, float16, float32 or float64, or its name; the source's when None.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `Llama.build`, for `src`.
        FileExistsError: `dst` is not empty, or another conversion is writing it.
        ValueError: `to` or `dtype` has another value; the model cannot be cut into this number of shards; Meta's format
            has no place for the special tokens; a number is too large for float16.
        OSError: it could not be written, for example because the disk is full. Nothing is left then.
    """
    tokenizer, source = open_checkpoint(src)
    write_checkpoint(source, tokenizer, dst, to, shards, dtype)


def quantize(src: str | os.PathLike, dst: str | os.PathLike, to: str) -> None:
    """Writes a checkpoint with its matrices in "int8" or "int4", as `Llama.build(src, quantize=to)` rounds them.

    `Llama.build(dst)` then reads a half or a quarter of the bytes, on any number of processes. Everything else is as in
    `convert`. Raises ValueError also for numbers that are not finite.
    """
    if to not in KINDS:
        raise ValueError(f"to = {to!r}: expected {' or '.join(map(repr, KINDS))}")
    tokenizer, source = open_checkpoint(src)
    write_checkpoint(source, tokenizer, dst, "meta", kind=to)


def write_checkpoint(
    source: Checkpoint,
    tokenizer: Tokenizer,
    dst: str | os.PathLike,
    to: str,
    shards: int | None = None,
    dtype: torch.dtype | str | None = None,
    config: dict[str, Any] | None = None,
    kind: str | None = None,
) -> None:
    """Writes weights into a directory; other arguments and errors as in `convert`.

    Args:
        source: anything that reads slices of full tensors, as a checkpoint does.
        tokenizer: the model's; its files are copied.
        config: further keys of Hugging Face's config.json.
        kind: "int8" or "int4" rounds the matrices.
    """
    if to not in ("meta", "hf"):
        raise ValueError(f"to = {to!r}: expected 'meta' or 'hf'")
    if shards is not None and (isinstance(shards, bool) or not isinstance(shards, int) or shards < 1):
        raise ValueError(f"shards = {shards!r}: expected an integer of at least 1, or None")
    dst, dtype = Path(dst), dtype_by_name(dtype) or source.dtype
    if source.quantization is not None:
        found = f"{source.paths[0].parent} is quantised to {source.quantization}"
        raise ValueError(f"{found}: expected the checkpoint that it was made from")
    shapes = full_shapes(source.args) if kind else source.shapes  # a tied output matrix is rounded on its own
    tensors = {name: stored(name, shape, kind, dtype) if kind else (shape, dtype) for name, shape in shapes.items()}
    n_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    with appear_whole(dst, n_bytes) as folder:
        with progress(n_bytes, f"{dst.name} ({kind or to})") as advance:
            if to == "hf":
                _write_hugging_face_texts(folder, tokenizer, source, dtype, config or {})
                _write_safetensors_files(folder, source, shards, dtype, advance)
            else:
                _write_meta_tokenizer(folder, tokenizer)
            if kind:
                changes = {"quantization": {"kind": kind, "format": FORMAT}}
                if source.args.tied_embeddings:  # the tensors in the file no longer tell
                    changes["tied_embeddings"] = True
                _write_json(folder / "params.json", params_json(source.args) | changes)
                _write_quantised_file(folder, source, kind, tensors, advance)
            elif to == "meta":
                if isinstance(source, MetaCheckpoint):
                    shutil.copyfile(source.paths[0].with_name("params.json"), folder / "params.json")
                else:
                    _write_json(folder / "params.json", params_json(source.args))
                _write_pth_files(folder, source, tokenizer.kind, shards or 1, dtype, advance)
        write_checklist(folder)


def _bytes(tensor: torch.Tensor, advance: Advance) -> Iterator[memoryview]:
    yield memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
    advance(tensor.nbytes)


def _part_bytes(
    source: Checkpoint, name: str, part: Part, dtype: torch.dtype, advance: Advance, in_halves: bool = False
) -> Iterator[memoryview]:
    """The bytes of a part of a tensor, some rows at a time; with `in_halves`, in Hugging Face's rotary order."""
    dim, start, stop = part
    first, last = (start, stop) if dim == ROWS else (0, source.shapes[name][0])
    for *_, rows in pieces(source, name, ROWS, first, last):
        if dim == COLUMNS:
            rows = rows[:, start:stop]
        if in_halves and has_rotary_rows(name):
            rows = rows_in_halves(rows, source.args.head_dim)
        if dtype == torch.float16 != rows.dtype and not rows.to(dtype).isfinite().all():
            raise ValueError(f"{name} has numbers beyond float16, which ends at 65,504: convert to bfloat16 or float32")
        yield from _bytes(rows.to(dtype), advance)


def _write_safetensors_files(
    folder: Path, source: Checkpoint, n_files: int | None, dtype: torch.dtype, advance: Advance
) -> None:
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in source.shapes.items()}
    files, weight_map = _share_out(sizes, n_files), {}
    for number, names in enumerate(files, start=1):
        path = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        with (folder / path).open("wb") as file:
            file.write(safetensors_header({file_name(name): source.shapes[name] for name in names}, dtype))
            for name in names:
                whole = ROWS, 0, source.shapes[name][0]
                file.writelines(_part_bytes(source, name, whole, dtype, advance, in_halves=True))
                weight_map[file_name(name)] = path
    if len(files) > 1:
        metadata = {"total_size": sum(sizes.values())}
        _write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})


def _share_out(sizes: dict[str, int], n_files: int | None) -> list[list[str]]:
    """The names of each file, in order: n files of about the same size, or files of at most `MAX_FILE_BYTES`."""
    names = list(sizes)
    if n_files is not None:
        if n_files > len(names):
            raise ValueError(f"shards = {n_files}: expected at most {len(names)}, one for each tensor")
        ends, cuts = list(itertools.accumulate(sizes.values())), [0]
        for i in range(1, n_files):  # cuts after i shares, but leaves at least one tensor for each file
            at = bisect.bisect(ends, ends[-1] * i / n_files)
            cuts.append(min(max(at, cuts[-1] + 1), len(names) - n_files + i))
        return [names[start:stop] for start, stop in itertools.pairwise([*cuts, len(names)])]
    files, room = [], 0
    for name in names:
        if not files or sizes[name] > room:
            files.append([])
            room = MAX_FILE_BYTES
        files[-1].append(name)
        room -= sizes[name]
    return files


def _write_pth_files(
    folder: Path, source: Checkpoint, tokenizer_kind: str, n_shards: int, dtype: torch.dtype, advance: Advance
) -> None:
    """Writes all of Meta's shards at once, so that each tensor of the source is read once.

    Llama 2's shards split the columns of the embedding, Llama 3's its rows.
    """
    args, full = source.args, source.shapes
    if n_shards not in args.model_parallel_sizes:
        raise ValueError(
            f"shards = {n_shards}: {args.n_heads} heads with {args.n_kv_heads} of keys and values can be shared out "
            f"among {args.model_parallel_sizes}"
        )
    with contextlib.ExitStack() as stack:
        files: list[tuple[PthFile, dict[str, Part]]] = []
        for i in range(n_shards):
            parts = {name: part_of_rank(name, full[name], args, i, n_shards) for name in full}
            if tokenizer_kind == "llama2":
                parts["tok_embeddings.weight"] = COLUMNS, *partition(args.dim, i, n_shards)
            shapes = {name: shape_of_part(full[name], part) for name, part in parts.items()}
            file = PthFile(folder / f"consolidated.{i:02d}.pth", shapes, dtype)
            files.append((stack.enter_context(file), parts))
        for name in full:
            for file, parts in files:
                file.write(name, _part_bytes(source, name, parts[name], dtype, advance))


def _write_quantised_file(
    folder: Path, source: Checkpoint, kind: str, tensors: dict[str, Stored], advance: Advance
) -> None:
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    dtypes = {name: dtype for name, (_, dtype) in tensors.items()}
    with PthFile(folder / "consolidated.00.pth", shapes, dtypes) as file:
        for name in tensors:
            is_rounded = is_matrix(name)
            file.write(name, _blocks(source, name, kind, advance) if is_rounded else _bytes(source.read(name), advance))


def _blocks(source: Checkpoint, name: str, kind: str, advance: Advance) -> Iterator[memoryview]:
    """The bytes of a matrix in blocks, rounded some rows at a time."""
    if name not in source.shapes:  # a tied output matrix
        name = "tok_embeddings.weight"
    for *_, rows in pieces(source, name, ROWS, 0, source.shapes[name][0]):
        try:
            data = in_blocks(rows, kind).data
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        drop_pages(rows)
        yield from _bytes(data, advance)


def _write_meta_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    path = tokenizer.path
    for text in (path.with_name(name) for name in CHAT_FILES):  # they have the stop ids and the chat template
        if text.is_file():
            shutil.copyfile(text, folder / text.name)
    if path.suffix != ".json":
        shutil.copyfile(path, folder / "tokenizer.model")
        return
    if _has_own_template(tokenizer):  # it needs names of tokens, which tokenizer.model does not have
        shutil.copyfile(path, folder / "tokenizer.json")
        return
    ranks = tokenizer.ranks
    ids = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    # The names of reserved tokens may differ: they are lost. A known name with another id would be another token.
    moved = [name for name, i in tokenizer.special_tokens.items() if ids.get(name, i) != i]
    if len(ids) != len(tokenizer.special_tokens) or moved:
        found = f"{moved[0]} in another place" if moved else f"{len(tokenizer.special_tokens)} of them"
        expected = f"Meta's format has only the {len(ids)} special tokens of Llama 3"
        raise ValueError(f"{path}: {expected}, and this tokenizer has {found}")
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


def _has_own_template(tokenizer: Tokenizer) -> bool:
    """Whether dialogs need the directory's own template; also True if that template fails."""
    try:
        return ChatFormat(tokenizer).template is not None
    except (ValueError, ImportError):
        return True


def _write_hugging_face_texts(
    folder: Path, tokenizer: Tokenizer, source: Checkpoint, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    """Writes config.json and the files of the tokenizer; copies those that the source has."""
    dtype_name = str(dtype).removeprefix("torch.")
    if isinstance(source, HuggingFaceCheckpoint):
        config = read_json(source.paths[0].parent / "config.json", "the config.json of a Llama")
        config["torch_dtype"] = dtype_name
        config.pop("dtype", None)  # Transformers 4 does not read it
    else:
        config = config_json(source.args, tokenizer.bos_id, tokenizer.eos_id, dtype_name)
    _write_json(folder / "config.json", config | changes)
    texts = {name: tokenizer.path.with_name(name) for name in ("tokenizer.model", "tokenizer.json", *TEXT_FILES)}
    texts["tokenizer.json" if tokenizer.path.suffix == ".json" else "tokenizer.model"] = tokenizer.path
    for name, path in texts.items():
        if path.is_file():
            shutil.copyfile(path, folder / name)
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    if tokenizer.kind == "llama3":
        begin, end = "<|begin_of_text|>", "<|end_of_text|>"
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
        settings |= {"model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
        settings |= {"chat_template": LLAMA3_CHAT_TEMPLATE}
        if not (folder / "tokenizer.json").exists():
            text = tokenizer_json(tokenizer.ranks, tokenizer.special_tokens, begin, LLAMA3_PATTERN)
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    answers = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_tokens)}
    for name, content in (("tokenizer_config.json", settings), ("generation_config.json", answers)):
        if not (folder / name).exists():
            _write_json(folder / name, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
