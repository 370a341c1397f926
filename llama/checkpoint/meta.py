"""Files to this rank's tensors: a directory of Meta's (params.json and consolidated.NN.pth), on any number of ranks.

Knows the layout of the files and the partitioning of the model; nothing of text or of running the model. Tensors are
read through a memory map: what a rank does not need of a file is never read, and on the CPU a slice that lies in one
piece *is* the file.
"""

import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch

from llama.model import ModelArgs
from llama.parallel import partition

SHARD_NAME = re.compile(r"consolidated\.(\d+)\.pth")

# Along which dimension a full matrix is cut into shards. Norms are whole in every shard; tok_embeddings is cut along
# the embedding dimension in Llama 1 and 2 and along the vocabulary in Llama 3, which its shape tells.
ROWS, COLUMNS = 0, 1
PARTITION_DIM = {
    "wq": ROWS,
    "wk": ROWS,
    "wv": ROWS,
    "w1": ROWS,
    "w3": ROWS,
    "output": ROWS,
    "wo": COLUMNS,
    "w2": COLUMNS,
}

# What the numbers of a checkpoint may be.
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# In a file but not weights: the rotary angles, which are computed.
IGNORED = {"rope.freqs"}


def read_params(ckpt_dir: Path) -> dict:
    """The contents of params.json.

    Raises:
        FileNotFoundError: no such directory, or no params.json in it.
        ValueError: not a JSON object.
    """
    if not ckpt_dir.is_dir():
        what = "is a file" if ckpt_dir.exists() else "does not exist"
        raise FileNotFoundError(
            f"ckpt_dir {ckpt_dir} {what}: expected a directory with params.json and consolidated.NN.pth"
        )
    path = ckpt_dir / "params.json"
    if not path.is_file():
        raise FileNotFoundError(f"no params.json in {ckpt_dir}, which holds {listing(ckpt_dir)}")
    try:
        params = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): expected the params.json of a Llama") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds a {type(params).__name__}: expected an object with dim, n_layers, n_heads, …")
    return params


def model_args(params: dict, ckpt_dir: Path, vocab_size: int, max_seq_len: int, max_batch_size: int) -> ModelArgs:
    """The shape of a model from its params.json.

    Args:
        params: the contents of the file.
        ckpt_dir: where it is from, for messages.
        vocab_size: the tokenizer's, which Llama 2's files leave to it.
        max_seq_len, max_batch_size: what the cache will have room for; not in the file.

    Raises:
        ValueError: a key is missing or of the wrong kind, or the vocabulary is another than the tokenizer's.
    """
    path = ckpt_dir / "params.json"
    for key in ("dim", "n_layers", "n_heads"):
        if key not in params:
            raise ValueError(f"{path} has no {key!r}: expected the params.json of a Llama")
    known = {field.name for field in fields(ModelArgs)} - {"max_seq_len", "max_batch_size"}
    kinds = dict.fromkeys(("norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scale_factor"), float)
    kinds |= dict.fromkeys(("use_scaled_rope", "tied_embeddings"), bool)
    args = {}
    for key, value in params.items():
        if key not in known or value is None:  # files carry other keys too
            continue
        kind = kinds.get(key, int)
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (kind, int)):
            raise ValueError(f"{path}: {key} is {value!r}: expected {'a number' if kind is float else kind.__name__}")
        if kind is not bool and value <= 0 and (key, value) != ("vocab_size", -1):
            raise ValueError(f"{path}: {key} is {value}: expected a positive number")
        args[key] = kind(value)
    if args.get("vocab_size", -1) == -1:
        args["vocab_size"] = vocab_size
    elif args["vocab_size"] != vocab_size:
        raise ValueError(
            f"{path} says vocab_size {args['vocab_size']}, but the tokenizer has {vocab_size} tokens: "
            "expected the tokenizer.model that came with this checkpoint"
        )
    # Llama 3.2 1B and 3B scale by 32 and not by 8; their params.json does not say so, their shapes do.
    if "rope_scale_factor" not in args and (args["dim"], args["n_layers"]) in {(2048, 16), (3072, 28)}:
        args["rope_scale_factor"] = 32.0
    try:
        return ModelArgs(max_seq_len=max_seq_len, max_batch_size=max_batch_size, **args)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def find_shards(ckpt_dir: Path) -> list[Path]:
    """The files consolidated.00.pth, 01, … in order.

    Raises:
        FileNotFoundError: there are none, or one in the middle is missing.
    """
    numbered = {int(m[1]): path for path in ckpt_dir.iterdir() if (m := SHARD_NAME.fullmatch(path.name))}
    if not numbered:
        raise FileNotFoundError(f"no consolidated.NN.pth in {ckpt_dir}, which holds {listing(ckpt_dir)}")
    missing = sorted(set(range(max(numbered) + 1)) - set(numbered))
    if missing:
        names = ", ".join(f"consolidated.{i:02d}.pth" for i in missing)
        raise FileNotFoundError(f"{ckpt_dir} holds shards up to {numbered[max(numbered)].name}, but {names} is missing")
    return [numbered[i] for i in range(len(numbered))]


def open_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file, memory-mapped: nothing but their names and shapes is read yet.

    Raises:
        ValueError: not a checkpoint, cut short, or holding anything but tensors. Nothing in it is run.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(1) == b"\x80":  # a bare pickle; the format of today is a zip archive
            raise ValueError(
                f"{path} is a pickle as torch.save wrote it before PyTorch 1.6, or no checkpoint at all; nothing of it "
                "was run. If you trust it: torch.save(torch.load(path, weights_only=True), path) writes it anew"
            )
    try:
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path} holds more than tensors, or is not a checkpoint; refused, nothing was run: {reason}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{path} ({size:,} bytes) is not a whole PyTorch checkpoint: {reason}. "
            "Expected a complete consolidated.NN.pth; download it again if its size is not the published one"
        ) from error
    if not isinstance(shard, dict) or not all(isinstance(t, torch.Tensor) for t in shard.values()):
        raise ValueError(f"{path} holds a {type(shard).__name__}: expected a dictionary of tensor names to tensors")
    return {name: tensor for name, tensor in shard.items() if name not in IGNORED}


def partition_dim(name: str) -> int | None:
    """The dimension along which the model cuts a parameter over its ranks; None for a norm, which each holds whole."""
    if name == "tok_embeddings.weight":
        return ROWS
    return PARTITION_DIM.get(name.split(".")[-2])


def full_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the whole model, by name."""
    dim, hidden_dim, kv_dim = args.dim, args.hidden_dim, args.n_kv_heads * args.head_dim
    shapes = {
        "tok_embeddings.weight": (args.vocab_size, dim),
        "norm.weight": (dim,),
        "output.weight": (args.vocab_size, dim),
    }
    for i in range(args.n_layers):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (dim, dim),
            f"layers.{i}.attention.wk.weight": (kv_dim, dim),
            f"layers.{i}.attention.wv.weight": (kv_dim, dim),
            f"layers.{i}.attention.wo.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (hidden_dim, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, hidden_dim),
            f"layers.{i}.feed_forward.w3.weight": (hidden_dim, dim),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    return shapes


def slice_of_rank(name: str, size: int, args: ModelArgs, rank: int, n_ranks: int) -> tuple[int, int]:
    """[start, stop) of the partitioned dimension that a rank holds; with fewer KV heads than ranks, one whole head."""
    if name.endswith((".wk.weight", ".wv.weight")) and n_ranks > args.n_kv_heads:
        start = (rank * args.n_kv_heads // n_ranks) * args.head_dim
        return start, start + args.head_dim
    return partition(size, rank, n_ranks)


def _is_tied(shard: dict[str, torch.Tensor]) -> bool:
    output, table = shard.get("output.weight"), shard.get("tok_embeddings.weight")
    return output is None or (table is not None and output.data_ptr() == table.data_ptr())


class MetaCheckpoint:
    """A directory of Meta's, whose full tensors can be read in slices.

    Every shard's names, shapes, dtypes and norms are checked when it is opened, against `args` and each other;
    with `check=False` that is left to `problems`, which must then be empty before anything is read.

    Raises:
        FileNotFoundError: no shards, or one is missing in the middle.
        ValueError: a shard is broken, lacks a tensor, has one too many, or one of another shape or dtype; norms differ
            between shards or are not finite.
    """

    quantization: str | None = None  # "int8" or "int4" in directories that `llama quantize` has written

    def __init__(self, ckpt_dir: Path, args: ModelArgs, check: bool = True):
        self.args = args
        self.paths = find_shards(ckpt_dir)
        self.shards = [open_shard(path) for path in self.paths]
        # Llama 3.2 1B and 3B leave the output matrix out, or name the embedding table twice.
        args.tied_embeddings = args.tied_embeddings or all(map(_is_tied, self.shards))
        self.shapes = full_shapes(args)
        if args.tied_embeddings:
            del self.shapes["output.weight"]
        self.cuts: dict[str, tuple[int, list[int]] | None] = {}
        if check and (problem := next(self.problems(), None)) is not None:
            raise ValueError(problem)

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0]["norm.weight"].dtype

    def problems(self) -> Iterator[str]:
        """What is wrong with the files, as far as names, shapes, dtypes and norms tell; finds where tensors are cut."""
        for path, shard in zip(self.paths, self.shards):
            missing = [name for name in self.shapes if name not in shard]
            unexpected = [name for name in shard if name not in self.shapes]
            if self.args.tied_embeddings:  # a copy of the table may be there
                unexpected = [name for name in unexpected if name != "output.weight"]
            for what, names in (("lacks", missing), ("has unexpected", unexpected)):
                if names:
                    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
                    yield (
                        f"{path} {what} {names[0]}{others}: expected the {len(self.shapes)} tensors of a model with "
                        f"n_layers = {self.args.n_layers}, as its params.json says"
                    )
        everywhere = [name for name in self.shapes if all(name in shard for shard in self.shards)]
        yield from self._dtype_problems(everywhere)
        for name in everywhere:
            try:
                self.cuts[name] = self._find_cut(name)
            except ValueError as error:
                yield str(error)
            else:
                if partition_dim(name) is None:
                    yield from self._norm_problems(name)

    def _dtype_problems(self, names: list[str]) -> Iterator[str]:
        found: dict[torch.dtype, str] = {}
        for path, shard in zip(self.paths, self.shards):
            for name in names:
                found.setdefault(shard[name].dtype, f"{path.name} {name}")
        if len(found) > 1 or not found.keys() <= set(DTYPES):
            where = " and ".join(f"{dtype} ({first})" for dtype, first in found.items())
            yield (
                f"{self.paths[0].parent} holds tensors of {where}: "
                f"expected one of {', '.join(map(str, DTYPES))} for all of them"
            )

    def _norm_problems(self, name: str) -> Iterator[str]:
        """Each shard has the norms whole: where they differ, the shards are not of one model."""
        first = self.shards[0][name]
        for path, shard in zip(self.paths, self.shards):
            if not shard[name].isfinite().all():
                yield f"{path}: {name} has numbers that are not finite: the file is damaged, download it again"
            elif not torch.equal(shard[name], first) and first.isfinite().all():
                yield (
                    f"{path} and {self.paths[0].name} are not shards of one model: each has {name} whole, "
                    "and theirs differ; download the directory again"
                )

    def _find_cut(self, name: str) -> "tuple[int, list[int]] | None":
        """Along which dimension the files are cut, and where each shard's part starts; None if each has the whole."""
        full, n_shards = self.shapes[name], len(self.shards)
        found = [tuple(shard[name].shape) for shard in self.shards]
        if partition_dim(name) is None or n_shards == 1:
            for path, shape in zip(self.paths, found):
                if shape != full:
                    raise ValueError(f"{path}: {name} has shape {list(shape)}: expected {list(full)}")
            return None
        for dim in (ROWS, COLUMNS) if name == "tok_embeddings.weight" else (partition_dim(name),):
            sizes = [shape[dim] if len(shape) == 2 else -1 for shape in found]
            starts = [slice_of_rank(name, full[dim], self.args, i, n_shards)[0] for i in range(n_shards)]
            if any(starts[i] == starts[i - 1] for i in range(1, n_shards)):  # a KV head in several shards
                right_sizes = set(sizes) == {self.args.head_dim}
            else:  # the files say where they are cut, should it be unevenly
                starts = [sum(sizes[:i]) for i in range(n_shards)]
                right_sizes = sum(sizes) == full[dim] and max(sizes) - min(sizes) <= n_shards
            if right_sizes and all(len(shape) == 2 and shape[1 - dim] == full[1 - dim] for shape in found):
                return dim, starts
        dim = partition_dim(name)
        expected = [list(full) for _ in found]
        for i in range(n_shards):
            start, stop = slice_of_rank(name, full[dim], self.args, i, n_shards)
            expected[i][dim] = stop - start
        bad = next((i for i in range(n_shards) if list(found[i]) != expected[i]), 0)
        raise ValueError(
            f"{self.paths[bad]}: {name} has shape {list(found[bad])}: "
            f"expected one of {n_shards} equal parts of {list(full)}"
        )

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """[start, stop) along `dim` of a full tensor, or all of it; a view of the mapped file if it lies in one."""
        if self.cuts[name] is None:
            whole = self.shards[0][name]
            return whole if dim is None else whole.narrow(dim, start, stop - start)
        cut_dim, starts = self.cuts[name]
        first, last = (start, stop) if dim == cut_dim else (0, self.shapes[name][cut_dim])
        pieces = []
        for shard, shard_start in zip(self.shards, starts):
            shard_stop = shard_start + shard[name].shape[cut_dim]
            if shard_start <= first < min(shard_stop, last):  # copies of a KV head are passed over
                piece = shard[name].narrow(cut_dim, first - shard_start, min(shard_stop, last) - first)
                pieces.append(piece if dim in (None, cut_dim) else piece.narrow(dim, start, stop - start))
                first = min(shard_stop, last)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=cut_dim)
