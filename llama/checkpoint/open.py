"""A directory to its tokenizer, its tensors and its model: Meta's, Hugging Face's or a quantised one.

Knows which files each kind of directory has; nothing of their contents, or of how the model is used.
"""

import os
from pathlib import Path

import torch

from llama.checkpoint.config import args_from_config, args_from_params, read_json
from llama.checkpoint.huggingface import HuggingFaceCheckpoint
from llama.checkpoint.loading import Loaded, load_weights, make_trainable
from llama.checkpoint.meta import SHARD_NAME, MetaCheckpoint, listing, require_directory
from llama.checkpoint.quantized import QuantizedCheckpoint
from llama.layers.quantization import KINDS
from llama.model import Transformer
from llama.parallel import dtype_by_name, pick_dtype
from llama.tokenizer import Tokenizer
from llama.tokenizer.chat_template import read_chat_files

Checkpoint = MetaCheckpoint | HuggingFaceCheckpoint

MAX_ROOM = 1 << 40  # of max_seq_len and max_batch_size: a larger number is a mistake, not a lack of memory


def find_tokenizer(ckpt_dir: Path) -> Path:
    """A directory's tokenizer.model, or else its tokenizer.json. Raises FileNotFoundError if it has neither."""
    for name in ("tokenizer.model", "tokenizer.json"):
        if (ckpt_dir / name).is_file():
            return ckpt_dir / name
    raise FileNotFoundError(
        f"there is no tokenizer file {ckpt_dir / 'tokenizer.model'}, nor a tokenizer.json: {ckpt_dir} holds "
        f"{listing(ckpt_dir)}; put it there, or pass its path as tokenizer_path"
    )


def open_checkpoint(
    ckpt_dir: str | os.PathLike,
    tokenizer_path: str | os.PathLike | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 1,
    check: bool = True,
) -> tuple[Tokenizer, Checkpoint]:
    """The tokenizer and the weights of a directory. If it has Meta's files and Hugging Face's, Meta's are read.

    The tokenizer's file is the directory's own unless `tokenizer_path` names another. max_seq_len and max_batch_size
    set the size of the model's cache. With `check=False` the tensors are not checked: see `MetaCheckpoint`.

    Raises:
        FileNotFoundError: the directory or a file is missing.
        ValueError: a file is damaged or contradicts another, or a number is out of range.
        ImportError: a package that reads the files is not installed.
    """
    for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r}: expected an integer of at least 1")
        if value > MAX_ROOM:
            raise ValueError(f"{name} has {value.bit_length()} bits: expected an integer of at most {MAX_ROOM:,}")
    ckpt_dir = Path(ckpt_dir)
    expected = "params.json and consolidated.NN.pth, or config.json and model.safetensors"
    require_directory("ckpt_dir", ckpt_dir, expected)
    has_params, has_config = ((ckpt_dir / name).is_file() for name in ("params.json", "config.json"))
    if not has_params and not has_config:
        found = f"no params.json in {ckpt_dir}, and no config.json: it holds {listing(ckpt_dir)}"
        raise FileNotFoundError(f"{found}; expected {expected}")
    has_shards = any(SHARD_NAME.fullmatch(entry.name) for entry in ckpt_dir.iterdir())
    is_meta = has_params and (has_shards or not has_config)
    file = "params.json" if is_meta else "config.json"
    config = read_json(ckpt_dir / file, f"the {file} of a Llama")
    tokenizer = Tokenizer(find_tokenizer(ckpt_dir) if tokenizer_path is None else tokenizer_path)
    sizes = tokenizer.n_words, max_seq_len, max_batch_size
    read_chat_files(tokenizer, ckpt_dir)  # `llama convert` and `quantize` write them beside Meta's files too
    if not is_meta:
        return tokenizer, HuggingFaceCheckpoint(ckpt_dir, args_from_config(config, ckpt_dir, *sizes), check)
    args = args_from_params(config, ckpt_dir, *sizes)
    if "quantization" in config:
        return tokenizer, QuantizedCheckpoint(ckpt_dir, args, config, check)
    return tokenizer, MetaCheckpoint(ckpt_dir, args, check)


def build_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | str | None,
    device: torch.device,
    quantize: str | None = None,
    train: bool = False,
    alone: bool = False,
) -> tuple[Transformer, Loaded]:
    """The model of an open checkpoint, with its weights and an empty cache.

    Args:
        dtype: of the weights and the computation; when None, the checkpoint's or the nearest that the device has.
        quantize: "int8", "int4" or None.
        train: whether all weights require gradients.
        alone: whether each quantised matrix has a layout of its own.

    Raises:
        ValueError: an argument has another value; the checkpoint is quantised to another kind, or cannot be trained.
        MemoryError: the device has no room for the weights and the cache.
    """
    args, dtype = checkpoint.args, dtype_by_name(dtype)
    if quantize not in (None, *KINDS):
        raise ValueError(f"quantize = {quantize!r}: expected {' or '.join(map(repr, KINDS))}, or None")
    if checkpoint.quantization and quantize not in (None, checkpoint.quantization):
        raise ValueError(
            f"quantize = {quantize!r}, but {checkpoint.paths[0].parent} is quantised to {checkpoint.quantization} "
            "already: pass None, or the checkpoint that it was made from"
        )
    rounded = quantize or checkpoint.quantization
    if train and rounded:
        found = f"{checkpoint.paths[0].parent} is quantised to {rounded}" if checkpoint.quantization else "train = True"
        raise ValueError(
            f"{found}, and rounded matrices cannot learn: expected plain weights, or an adapter beside the rounded "
            "ones (`llama finetune --lora_rank`)"
        )
    # The fast kernels for rounded matrices compute in bfloat16.
    dtype = dtype or pick_dtype(torch.bfloat16 if rounded else checkpoint.dtype, device)
    try:
        with torch.device("meta"):
            model = Transformer(args)
        loaded = load_weights(model, checkpoint, dtype, device, quantize, alone)
        if train:
            make_trainable(model)
        model.quantization = rounded
        model.allocate_cache()
    except (RuntimeError, OSError, OverflowError) as error:  # a lack of CPU memory has no exception class of its own
        too_large = isinstance(error, (torch.OutOfMemoryError, OverflowError))
        if too_large or "alloc" in str(error) or "overflow" in str(error):
            raise MemoryError(
                f"not enough memory on {device} for this checkpoint with max_seq_len = {args.max_seq_len} and "
                f"max_batch_size = {args.max_batch_size}: `python -m llama info` says what it takes; lower them"
            ) from error
        raise
    return model, loaded
