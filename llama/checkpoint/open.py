"""A directory to its tokenizer and its tensors: Meta's, Hugging Face's or a quantised one."""

import os
from pathlib import Path

from llama.checkpoint.huggingface import HuggingFaceCheckpoint
from llama.checkpoint.huggingface_config import model_args, read_json
from llama.checkpoint.meta import SHARD_NAME, MetaCheckpoint, listing, read_params
from llama.checkpoint.meta import model_args as meta_model_args
from llama.checkpoint.quantized import QuantizedCheckpoint
from llama.tokenizer import Tokenizer


def find_tokenizer(ckpt_dir: Path) -> Path:
    """tokenizer.model of a directory; where there is none, tokenizer.json.

    Raises:
        FileNotFoundError: it has neither.
    """
    for name in ("tokenizer.model", "tokenizer.json"):
        if (ckpt_dir / name).is_file():
            return ckpt_dir / name
    raise FileNotFoundError(
        f"there is no tokenizer file {ckpt_dir / 'tokenizer.model'}, nor a tokenizer.json: {ckpt_dir} holds "
        f"{listing(ckpt_dir)}; put it there, or pass its path as tokenizer_path"
    )


def open_checkpoint(
    ckpt_dir: Path,
    tokenizer_path: str | os.PathLike | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 1,
) -> tuple[Tokenizer, MetaCheckpoint | HuggingFaceCheckpoint]:
    """The tokenizer and the weights of a directory, Meta's or Hugging Face's; Meta's come first where both are there.

    Raises:
        FileNotFoundError: it is neither; a file is missing.
        ValueError: a file is broken, or disagrees with another.
        ImportError: a package that reads it is not installed.
    """
    expected = "params.json and consolidated.NN.pth, or config.json and model.safetensors"
    if not ckpt_dir.is_dir():
        what = "is a file" if ckpt_dir.exists() else "does not exist"
        raise FileNotFoundError(f"ckpt_dir {ckpt_dir} {what}: expected a directory with {expected}")
    has_params, has_config = ((ckpt_dir / name).is_file() for name in ("params.json", "config.json"))
    if not has_params and not has_config:
        found = f"no params.json in {ckpt_dir}, and no config.json: it holds {listing(ckpt_dir)}"
        raise FileNotFoundError(f"{found}; expected {expected}")
    has_shards = any(SHARD_NAME.fullmatch(entry.name) for entry in ckpt_dir.iterdir())
    is_meta = has_params and (has_shards or not has_config)
    config = read_params(ckpt_dir) if is_meta else read_json(ckpt_dir / "config.json", "the config.json of a Llama")
    tokenizer = Tokenizer(find_tokenizer(ckpt_dir) if tokenizer_path is None else tokenizer_path)
    read_args = meta_model_args if is_meta else model_args
    args = read_args(config, ckpt_dir, tokenizer.n_words, max_seq_len, max_batch_size)
    if is_meta and "quantization" in config:
        return tokenizer, QuantizedCheckpoint(ckpt_dir, args, config)
    return tokenizer, (MetaCheckpoint if is_meta else HuggingFaceCheckpoint)(ckpt_dir, args)
