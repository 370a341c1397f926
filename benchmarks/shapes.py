"""The shapes of published models, and checkpoints of random numbers in those shapes, to measure with."""

import base64
import hashlib
import json
import math
import os
from pathlib import Path

import torch

from llama import Transformer, parallel
from llama.checkpoint.meta import full_shapes, partition_dim, slice_of_rank
from llama.checkpoint.writer import PthFile
from llama.model import ModelArgs

LLAMA_3 = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True}
# From Meta's params.json of each.
PARAMS = {
    "llama-3.2-1b": {"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5, "multiple_of": 256},
    "llama-3.2-3b": {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0, "multiple_of": 256},
    "llama-3.1-8b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024},
    "llama-3.1-70b": {"dim": 8192, "n_layers": 80, "n_heads": 64, "ffn_dim_multiplier": 1.3, "multiple_of": 4096},
    "llama-3.1-405b": {"dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2, "multiple_of": 4096},
}
# As many bytes, in matrices as wide, as one of eight processes has with the 70B.
PARAMS["llama-3.1-70b-eighth"] = PARAMS["llama-3.1-70b"] | {"n_layers": 10}
# For trying a program of this folder in seconds; its figures mean nothing.
PARAMS["tiny"] = {"dim": 256, "n_layers": 2, "n_heads": 8, "multiple_of": 256}
PARAMS = {name: params | LLAMA_3 for name, params in PARAMS.items()}
TIED = ("llama-3.2-1b", "llama-3.2-3b")  # their files have no output.weight
# For programs that compare answers, and not speeds.
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 16, "vocab_size": 512}
N_RANKS = 128000  # of the tokenizer, before its 256 special tokens


def write_small_checkpoint(folder: Path, shape: dict[str, int] = SMALL, std: float = 0.02) -> None:
    """Writes a Meta directory with random float32 weights and a made-up tokenizer."""
    parallel.initialize(device=torch.device("cpu"))
    model = Transformer(ModelArgs(**shape))
    model.init_weights(std, torch.Generator().manual_seed(0))
    torch.save(dict(model.state_dict()), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(shape))
    write_tokenizer(folder / "tokenizer.model", shape["vocab_size"] - 256)


def write_random_checkpoint(folder: Path, shape: str, dtype: torch.dtype = torch.bfloat16, n_shards: int = 1) -> int:
    """Writes a Meta directory with random weights and a made-up tokenizer, unless it exists.

    The matrices repeat one block of N(0, 0.02²) numbers; norms are 1.

    Args:
        folder: the directory to make; one that an interrupted run has left is replaced.
        shape: a name of PARAMS.
        dtype, n_shards: of the files.

    Returns:
        How many bytes of weights there are.
    """
    params = PARAMS[shape]
    args = ModelArgs(**params, tied_embeddings=shape in TIED)
    shapes = full_shapes(args)
    if args.tied_embeddings:
        del shapes["output.weight"]
    n_bytes = sum(map(math.prod, shapes.values())) * dtype.itemsize
    if (folder / "params.json").is_file():  # written last
        return n_bytes
    folder.mkdir(parents=True, exist_ok=True)
    block = (0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))).to(dtype)
    ones = torch.ones(args.dim, dtype=dtype)
    for i in range(n_shards):
        local = {}
        for name, full in shapes.items():
            dim = partition_dim(name)
            start, stop = (0, 0) if dim is None else slice_of_rank(name, full[dim], args, i, n_shards)
            local[name] = tuple(stop - start if d == dim else size for d, size in enumerate(full))
        with PthFile(folder / f"consolidated.{i:02d}.pth", local, dtype) as file:
            for name, shape_of_part in local.items():
                file.write(name, _repeat(ones if partition_dim(name) is None else block, math.prod(shape_of_part)))
    write_tokenizer(folder / "tokenizer.model", N_RANKS)
    (folder / "params.json").write_text(json.dumps(params))
    return n_bytes


def _repeat(block: torch.Tensor, n_numbers: int):
    """The bytes of n_numbers numbers, piece by piece."""
    for start in range(0, n_numbers, len(block)):
        yield memoryview(block[: n_numbers - start].view(torch.uint8).numpy())


def write_tokenizer(path: Path, n_ranks: int) -> None:
    """Writes a tiktoken file: all bytes, then made-up words of 2 to 8 bytes, about as long as Llama 3's."""
    words = {bytes([i]): None for i in range(256)}
    i = 0
    while len(words) < n_ranks:
        digest = hashlib.blake2b(i.to_bytes(4, "little"), digest_size=8).digest()
        words[b" " * (digest[0] % 2) + bytes(97 + byte % 26 for byte in digest[1 : 3 + digest[0] % 6])] = None
        i += 1
    path.write_text("".join(f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words)))


def default_folder(shape: str) -> Path:
    """Where a benchmark keeps its checkpoint from one run to the next."""
    return Path(os.environ.get("LLAMA_BENCHMARKS", "/tmp/llama-benchmarks")) / shape
