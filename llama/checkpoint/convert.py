"""A checkpoint written again: as Meta's shards or as a Hugging Face directory, from either, whatever its size.

Weights pass through in pieces of `PIECE_BYTES`, from the mapped source to the target: a conversion needs some hundred
MB beyond the libraries, for any model. The target appears under its name when it is whole, or not at all.
"""

import base64
import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.huggingface import HuggingFaceCheckpoint, file_name, has_rotary_rows, rows_in_halves
from llama.checkpoint.huggingface_config import config_json, params_json, read_json
from llama.checkpoint.loading import pieces
from llama.checkpoint.meta import COLUMNS, ROWS, MetaCheckpoint, partition_dim, slice_of_rank
from llama.checkpoint.open import find_tokenizer, open_checkpoint
from llama.checkpoint.quantized import is_matrix, packed, scales_of, stored, zeros_of
from llama.checkpoint.writer import (
    SAFETENSORS_DTYPES,
    PthFile,
    appear_whole,
    progress,
    safetensors_header,
    write_checklist,
)
from llama.layers import layouts as products
from llama.layers.packing import drop_pages
from llama.layers.quantization import KINDS
from llama.tokenizer import Tokenizer
from llama.tokenizer.tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIAL_TOKENS
from llama.tokenizer.tokenizer_json import tokenizer_json

PIECE_BYTES = 32 << 20
MAX_FILE_BYTES = 5 * 10**9  # of a safetensors file, as Transformers cuts them

# What a Hugging Face directory says of its tokenizer and its answers, and what is carried over from one to another.
TEXT_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")

# `ChatFormat` for Llama 3, in Transformers' template language.
LLAMA3_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'].replace('tool', 'ipython') + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

Source = MetaCheckpoint | HuggingFaceCheckpoint
Advance = Callable[[int], object]  # told of so many more bytes done


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    to: str,
    shards: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> None:
    """Writes the checkpoint of a directory into another, in Meta's format or Hugging Face's.

    Numbers are copied bit for bit unless `dtype` is another than theirs. The tokenizer comes along, in the form that
    the target's programs read, and checklist.chk with the md5 sums of all files. While it runs, what is done lies in
    `.NAME.partial` next to `dst`; what a killed run leaves there, the next one clears away.

    Args:
        src: Meta's directory or Hugging Face's, as `Llama.build` takes it.
        dst: the directory to make; it may be there if it is empty.
        to: "meta" or "hf". The format that `src` has is allowed: its files are cut anew.
        shards: Meta: how many consolidated.NN.pth, one when None; Hugging Face: how many safetensors files, as few as
            hold at most 5 GB each when None.
        dtype: of the tensors written: bfloat16, float16, float32 or float64, or its name; the source's when None.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `Llama.build`, for `src`.
        FileExistsError: `dst` has something in it, or another conversion is writing it.
        ValueError: `to` or `dtype` is none of these; the model cannot be cut into so many shards; Meta's format has no
            place for the special tokens; a number is beyond float16.
        OSError: it could not be written, as when the disk is full. Nothing is left then.
    """
    tokenizer, source = open_checkpoint(Path(src))
    _refuse_quantised(Path(src), source)
    write_checkpoint(source, tokenizer, src, dst, to, shards, dtype)


def write_checkpoint(
    source: Source,
    tokenizer: Tokenizer,
    texts: str | os.PathLike,
    dst: str | os.PathLike,
    to: str,
    shards: int | None = None,
    dtype: torch.dtype | str | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Writes weights into a directory, in Meta's format or Hugging Face's. Errors and other arguments as `convert`'s.

    Args:
        source: anything that reads slices of full tensors, as a checkpoint does.
        tokenizer: of the model.
        texts: the directory whose tokenizer files are copied.
        config: further keys of Hugging Face's config.json.
    """
    texts, dst = Path(texts), Path(dst)
    if to not in ("meta", "hf"):
        raise ValueError(f"to = {to!r}: expected 'meta' or 'hf'")
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and dtype not in SAFETENSORS_DTYPES.values():
        raise ValueError(f"dtype = {dtype!r}: expected bfloat16, float16, float32 or float64")
    if shards is not None and (isinstance(shards, bool) or not isinstance(shards, int) or shards < 1):
        raise ValueError(f"shards = {shards!r}: expected an integer of at least 1, or None")
    dtype = dtype or source.dtype
    n_bytes = dtype.itemsize * sum(math.prod(shape) for shape in source.shapes.values())
    with appear_whole(dst, n_bytes) as folder:
        with progress(n_bytes, f"{dst.name} ({to})") as advance:
            if to == "meta":
                _write_meta_tokenizer(texts, folder, tokenizer)
                _write_params(texts, folder, source)
                _write_pth_files(folder, source, shards or 1, dtype, advance)
            else:
                _write_hugging_face_texts(texts, folder, tokenizer, source, dtype, config or {})
                _write_safetensors_files(folder, source, shards, dtype, advance)
        write_checklist(folder)


def quantize(src: str | os.PathLike, dst: str | os.PathLike, to: str) -> None:
    """Writes a checkpoint with its matrices in 8 or 4 bits, as `Llama.build(src, quantize=to)` would round them.

    `Llama.build(dst)` then reads a half or a quarter of the bytes, on any number of processes. Everything else is as in
    `convert`.

    Args:
        src: Meta's directory or Hugging Face's.
        dst: the directory to make; it may be there if it is empty.
        to: "int8" or "int4".

    Raises:
        As `convert`; ValueError also for numbers that are not finite.
    """
    src, dst = Path(src), Path(dst)
    if to not in KINDS:
        raise ValueError(f"to = {to!r}: expected {' or '.join(map(repr, KINDS))}")
    tokenizer, source = open_checkpoint(src)
    _refuse_quantised(src, source)
    tensors: dict[str, Any] = {}
    for name, shape in source.shapes.items():
        tensors |= stored(name, shape, to, source.dtype)
    n_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    with appear_whole(dst, n_bytes) as folder:
        _write_meta_tokenizer(src, folder, tokenizer)
        _write_json(folder / "params.json", params_json(source.args) | {"quantization": {"kind": to}})
        shapes = {name: shape for name, (shape, _) in tensors.items()}
        dtypes = {name: dtype for name, (_, dtype) in tensors.items()}
        path = folder / "consolidated.00.pth"
        with progress(n_bytes, f"{dst.name} ({to})") as advance, PthFile(path, shapes, dtypes) as file:
            for name, (n_rows, *_) in source.shapes.items():
                if not is_matrix(name):
                    file.write(name, _bytes(source.read(name), advance))
                    continue
                rounded: dict[str, list[torch.Tensor]] = {scales_of(name): [], zeros_of(name): []}
                # Rows are rounded by themselves, so that a matrix can be in pieces.
                file.write(name, _rounded(pieces(source, name, 0, 0, n_rows), to, rounded, name, advance))
                for other, parts in rounded.items():
                    if other in tensors:
                        file.write(other, _bytes(torch.cat(parts).bfloat16(), advance))
        write_checklist(folder)


def _rounded(pieces: Iterator[tuple], kind: str, rounded: dict, name: str, advance: Advance) -> Iterator[memoryview]:
    """The codes of a matrix, piece by piece; their scales and zeros go into `rounded`."""
    for *_, piece in pieces:
        try:
            matrix = products.quantize(piece, kind)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        drop_pages(piece)
        rounded[scales_of(name)].append(matrix.scales)
        if matrix.zeros is not None:
            rounded[zeros_of(name)].append(matrix.zeros)
        yield from _bytes(packed(matrix), advance)


def _bytes(tensor: torch.Tensor, advance: Advance) -> Iterator[memoryview]:
    yield memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")
    advance(tensor.nbytes)


def _refuse_quantised(src: Path, source: Source) -> None:
    if source.quantization is not None:
        raise ValueError(f"{src} is quantised to {source.quantization}: expected the checkpoint that it was made of")


def _pieces(
    source: Source, name: str, dtype: torch.dtype, dim: int | None, start: int, stop: int, in_halves: bool = False
) -> Iterator[memoryview]:
    """The bytes of [start, stop) along `dim` of a tensor, or of all of it, some whole heads' rows at a time.

    `in_halves`: queries and keys in Hugging Face's order of rows.
    """
    shape, head_dim = source.shapes[name], source.args.head_dim
    first, last = (start, stop) if dim == ROWS else (0, shape[0])
    step = max(1, PIECE_BYTES // (math.prod(shape[1:]) * dtype.itemsize * head_dim)) * head_dim
    for row in range(first, last, step):
        piece = source.read(name, ROWS, row, min(row + step, last))
        if dim == COLUMNS:
            piece = piece[:, start:stop]
        if in_halves and has_rotary_rows(name):
            piece = rows_in_halves(piece, head_dim)
        if dtype == torch.float16 != piece.dtype and not piece.to(dtype).isfinite().all():
            raise ValueError(f"{name} has numbers beyond float16, which ends at 65,504: convert to bfloat16 or float32")
        yield memoryview(piece.to(dtype).contiguous().flatten().view(torch.uint8).numpy())


def _write_safetensors_files(
    folder: Path, source: Source, n_files: int | None, dtype: torch.dtype, advance: Advance
) -> None:
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in source.shapes.items()}
    files = _share_out(sizes, n_files)
    weight_map = {}
    for number, names in enumerate(files, start=1):
        only_one = len(files) == 1
        path = folder / ("model.safetensors" if only_one else f"model-{number:05d}-of-{len(files):05d}.safetensors")
        with path.open("wb") as file:
            file.write(safetensors_header({file_name(name): source.shapes[name] for name in names}, dtype))
            for name in names:
                for piece in _pieces(source, name, dtype, None, 0, 0, in_halves=True):
                    advance(file.write(piece))
                weight_map[file_name(name)] = path.name
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _share_out(sizes: dict[str, int], n_files: int | None) -> list[list[str]]:
    """The names in order, cut into so many files of about the same size, or into files of at most `MAX_FILE_BYTES`."""
    names, files = list(sizes), []
    if n_files is None:
        room = 0
        for name in names:
            if not files or sizes[name] > room:
                files.append([])
                room = MAX_FILE_BYTES
            files[-1].append(name)
            room -= sizes[name]
        return files
    if n_files > len(names):
        raise ValueError(f"shards = {n_files}: expected at most {len(names)}, one for each tensor")
    rest = sum(sizes.values())
    for files_left in range(n_files, 0, -1):  # each takes at least one tensor and leaves one for each that follows
        files.append([names.pop(0)])
        filled, share = sizes[files[-1][0]], rest / files_left
        while len(names) >= files_left and (files_left == 1 or filled + sizes[names[0]] / 2 <= share):
            filled += sizes[names[0]]
            files[-1].append(names.pop(0))
        rest -= filled
    return files


def _write_pth_files(folder: Path, source: Source, n_shards: int, dtype: torch.dtype, advance: Advance) -> None:
    """Meta's shards, all at once, so that each tensor of the source is read once."""
    args = source.args
    if n_shards not in args.model_parallel_sizes:
        raise ValueError(
            f"shards = {n_shards}: {args.n_heads} heads with {args.n_kv_heads} of keys and values can be shared out "
            f"among {args.model_parallel_sizes}"
        )
    slices: list[dict[str, tuple[int | None, int, int]]] = []
    for i in range(n_shards):
        slices.append({})
        for name, shape in source.shapes.items():
            dim = partition_dim(name)
            start, stop = (0, 0) if dim is None else slice_of_rank(name, shape[dim], args, i, n_shards)
            slices[i][name] = dim, start, stop
    with contextlib.ExitStack() as stack:
        files = []
        for i in range(n_shards):
            shapes = {}
            for name, (dim, start, stop) in slices[i].items():
                full = source.shapes[name]
                shapes[name] = tuple(stop - start if d == dim else size for d, size in enumerate(full))
            files.append(stack.enter_context(PthFile(folder / f"consolidated.{i:02d}.pth", shapes, dtype)))
        for name, shape in source.shapes.items():
            for i in range(n_shards):
                files[i].write(name, _pieces(source, name, dtype, *slices[i][name]))
            advance(math.prod(shape) * dtype.itemsize)


def _write_params(src: Path, folder: Path, source: Source) -> None:
    if isinstance(source, MetaCheckpoint):
        shutil.copyfile(src / "params.json", folder / "params.json")
    else:
        _write_json(folder / "params.json", params_json(source.args))


def _write_meta_tokenizer(src: Path, folder: Path, tokenizer: Tokenizer) -> None:
    path = find_tokenizer(src)
    if path.name == "tokenizer.model":
        shutil.copyfile(path, folder / path.name)
        return
    ranks = tokenizer.ranks
    ids = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    # Names that a model has given to reserved ones are lost; a token in another place would be another token.
    moved = [name for name, i in tokenizer.special_tokens.items() if ids.get(name, i) != i]
    if len(ids) != len(tokenizer.special_tokens) or moved:
        found = f"{moved[0]} in another place" if moved else f"{len(tokenizer.special_tokens)} of them"
        raise ValueError(f"{path}: Meta's format has the {len(ids)} special tokens of Llama 3 alone, here is {found}")
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


def _write_hugging_face_texts(
    src: Path, folder: Path, tokenizer: Tokenizer, source: Source, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    """config.json and the files of the tokenizer: the source's own where it has them."""
    dtype_name = str(dtype).removeprefix("torch.")
    if isinstance(source, HuggingFaceCheckpoint):
        config = read_json(src / "config.json", "the config.json of a Llama")
        config.pop("dtype", None)
        config["torch_dtype"] = dtype_name  # the name that Transformers 4 and 5 both read
    else:
        config = config_json(source.args, tokenizer.bos_id, tokenizer.eos_id, dtype_name)
    _write_json(folder / "config.json", config | changes)
    copied = [name for name in ("tokenizer.model", "tokenizer.json", *TEXT_FILES) if (src / name).is_file()]
    for name in copied:
        shutil.copyfile(src / name, folder / name)
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    if tokenizer.kind == "llama3":
        begin, end = "<|begin_of_text|>", "<|end_of_text|>"
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
        settings |= {"model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
        settings |= {"chat_template": LLAMA3_CHAT_TEMPLATE}
        if "tokenizer.json" not in copied:
            text = tokenizer_json(tokenizer.ranks, tokenizer.special_tokens, begin, LLAMA3_PATTERN)
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if "tokenizer_config.json" not in copied:
        _write_json(folder / "tokenizer_config.json", settings)
    if "generation_config.json" not in copied:
        ends = sorted(tokenizer.stop_tokens)
        _write_json(folder / "generation_config.json", {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
