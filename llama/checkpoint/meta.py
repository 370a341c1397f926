"""Meta's directories to tensors: any number of consolidated.NN.pth, read in slices of the full tensors.

Knows the layout of the files and how a model is split over ranks; nothing of text or of running the model. Files are
memory-mapped: only the slices in use are read, and on the CPU a contiguous slice is the mapped file, not a copy.

Format of a .pth file: a zip archive with a pickle of the tensors' names and shapes, and a record for the numbers of
each (pytorch.org/docs/stable/notes/serialization.html).
"""

import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from llama.model import ModelArgs
from llama.parallel import partition
from llama.parallel.devices import DTYPES

SHARD_NAME = re.compile(r"consolidated\.(\d{1,4})\.pth")

# The dimension along which the model splits a matrix over its ranks; each rank has the norms whole. The shards are cut
# alike, except that Llama 1 and 2 cut tok_embeddings along the embedding dimension; its shape tells.
ROWS, COLUMNS = 0, 1
PARTITION_DIM = dict.fromkeys(("tok_embeddings", "wq", "wk", "wv", "w1", "w3", "output"), ROWS)
PARTITION_DIM |= dict.fromkeys(("wo", "w2"), COLUMNS)

Stored = tuple[tuple[int, ...], torch.dtype | None]  # a tensor in a file: shape, and dtype; None: the checkpoint's
Part = tuple[int, int, int]  # of a full tensor: dim, and [start, stop) along it

# The names that a file's pickle may have. With nothing else to call, it can neither run code nor allocate memory.
TENSORS_ONLY = re.compile(
    r"collections OrderedDict|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|torch \w+Storage"
)


def listing(folder: Path) -> str:
    """The first names in a folder, for messages."""
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def require_directory(name: str, path: Path, expected: str) -> None:
    """Raises FileNotFoundError if there is no such directory. `name` is the caller's name for it."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{name} {path} {what}: expected a directory with {expected}")


def find_shards(ckpt_dir: Path) -> list[Path]:
    """The files consolidated.00.pth, 01, … in order. Raises FileNotFoundError if there are none or one is missing."""
    numbered = {int(match[1]): path for path in ckpt_dir.iterdir() if (match := SHARD_NAME.fullmatch(path.name))}
    if not numbered:
        raise FileNotFoundError(f"no consolidated.NN.pth in {ckpt_dir}, which holds {listing(ckpt_dir)}")
    missing = sorted(set(range(max(numbered) + 1)) - set(numbered))
    if missing:
        names = ", ".join(f"consolidated.{i:02d}.pth" for i in missing[:8])
        raise FileNotFoundError(f"{ckpt_dir} holds shards up to {numbered[max(numbered)].name}, but {names} is missing")
    return [numbered[i] for i in range(len(numbered))]


def open_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file, memory-mapped. Reads only their names and shapes, and runs nothing.

    Raises ValueError if the file is damaged or holds anything but tensors.
    """
    with path.open("rb") as file:
        if file.read(1) == b"\x80":  # a bare pickle; since PyTorch 1.6 the format is a zip archive
            raise ValueError(
                f"{path} is a pickle as torch.save wrote it before PyTorch 1.6, or no checkpoint at all; nothing of it "
                "was run. If you trust it: torch.save(torch.load(path, weights_only=True), path) converts it"
            )
    try:
        _check_pickle(path)
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(shard, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in shard.items()
        ):
            found = f"it holds a {type(shard).__name__}"
            raise pickle.UnpicklingError(f"{found}: expected a dictionary of tensor names to tensors")
    except Exception as error:  # PyTorch and zipfile raise many kinds of exceptions for a damaged file
        reason = str(error).split("\n")[0].split(". ")[0][:200]
        if isinstance(error, pickle.UnpicklingError):
            found = f"{path} holds more than tensors, or is not a checkpoint"
            raise ValueError(f"{found}; refused, nothing was run: {reason}") from error
        found = f"{path} ({path.stat().st_size:,} bytes) is not a whole PyTorch checkpoint"
        advice = "download it again if its size is not the published one"
        raise ValueError(f"{found}: {type(error).__name__}: {reason}; {advice}") from error
    return {name: tensor.detach() for name, tensor in shard.items() if name != "rope.freqs"}  # computed, no weight


def _check_pickle(path: Path) -> None:
    """Raises, before anything is unpickled, if a file's pickle is damaged or names anything but tensors."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    pickles = [record for record in records if record.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("it is not an archive of torch.save's, which has one data.pkl and compresses nothing")
    with path.open("rb") as file:
        file.seek(pickles[0].header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)  # skips the record's name and its extra field
        content = file.read(pickles[0].file_size)
    if pickles[0].CRC not in (0, zlib.crc32(content)):  # torch.save writes 0 where check sums are switched off
        raise ValueError("the check sum of its data.pkl is wrong")
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and not TENSORS_ONLY.fullmatch(argument):
            raise pickle.UnpicklingError(f"it names {argument[:100]!r}")


def partition_dim(name: str) -> int | None:
    """The dimension along which the model splits a parameter over its ranks; None for a norm, whole on each."""
    return PARTITION_DIM.get(name.split(".")[-2])


def full_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the whole model, by name."""
    dim, hidden_dim, kv_dim, vocab_size = args.dim, args.hidden_dim, args.n_kv_heads * args.head_dim, args.vocab_size
    shapes = {"tok_embeddings.weight": (vocab_size, dim), "norm.weight": (dim,), "output.weight": (vocab_size, dim)}
    block = {
        "attention.wq": (dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, dim),
        "feed_forward.w1": (hidden_dim, dim),
        "feed_forward.w2": (dim, hidden_dim),
        "feed_forward.w3": (hidden_dim, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
    }
    return shapes | {f"layers.{i}.{n}.weight": shape for i in range(args.n_layers) for n, shape in block.items()}


def slice_of_rank(name: str, size: int, args: ModelArgs, rank: int, n_ranks: int) -> tuple[int, int]:
    """A rank's [start, stop) of the split dimension; with fewer KV heads than ranks, one whole head."""
    if name.endswith((".wk.weight", ".wv.weight")) and n_ranks > args.n_kv_heads:
        start = (rank * args.n_kv_heads // n_ranks) * args.head_dim
        return start, start + args.head_dim
    return partition(size, rank, n_ranks)


def part_of_rank(name: str, full: tuple[int, ...], args: ModelArgs, rank: int, n_ranks: int) -> Part:
    """A rank's part of a full tensor; of a norm, all of it."""
    dim = partition_dim(name)
    return (ROWS, 0, full[0]) if dim is None else (dim, *slice_of_rank(name, full[dim], args, rank, n_ranks))


def shape_of_part(full: tuple[int, ...], part: Part) -> tuple[int, ...]:
    dim, start, stop = part
    return (*full[:dim], stop - start, *full[dim + 1 :])


def name_problems(where: Path, expected: Collection[str], found: Collection[str], model: str) -> Iterator[str]:
    """Messages about missing and unexpected tensors."""
    for what, some, others in (("lacks", expected, set(found)), ("has unexpected", found, set(expected))):
        if names := [name for name in some if name not in others]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield f"{where} {what} {names[0][:100]}{more}: expected the {len(expected)} tensors of a model with {model}"


def dtype_problems(folder: Path, found: dict[torch.dtype | str, str]) -> Iterator[str]:
    """A message if a checkpoint has several dtypes, or an unsupported one. `found` has the first tensor of each."""
    if len(found) > 1 or not found.keys() <= set(DTYPES):
        where = " and ".join(f"{dtype} ({first})" for dtype, first in found.items())
        yield f"{folder} holds tensors of {where}: expected one of {', '.join(map(str, DTYPES))} for all of them"


def _is_tied(shard: dict[str, torch.Tensor]) -> bool:
    output, table = shard.get("output.weight"), shard.get("tok_embeddings.weight")
    return output is None or (table is not None and output.data_ptr() == table.data_ptr())


class MetaCheckpoint:
    """Meta's directory. `read` reads its full tensors in slices.

    Opening it checks the names, shapes, dtypes and norms of all shards against `args` and against each other. With
    `check=False` the caller has to go through `problems`, and may read only if there are none.

    Attributes:
        args: the shape of the model; `tied_embeddings` is set if the files have no output matrix of their own.
        dtype: of all its tensors.
        shapes: the full shape of each tensor, by name.
        paths: the files.
        quantization: "int8" or "int4" in directories that `llama quantize` has written.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a shard is damaged, or the first of the problems.
    """

    quantization: str | None = None

    def __init__(self, ckpt_dir: Path, args: ModelArgs, check: bool = True):
        self.args = args
        self.paths = find_shards(ckpt_dir)
        self.shards = [open_shard(path) for path in self.paths]
        # Llama 3.2 1B and 3B leave the output matrix out, or store the embedding table under both names.
        args.tied_embeddings = args.tied_embeddings or all(map(_is_tied, self.shards))
        self.shapes = full_shapes(args)
        if args.tied_embeddings:
            del self.shapes["output.weight"]
        self.stored: dict[str, Stored] = self.tensors_of_files()
        self.cuts: dict[str, tuple[int, list[int]] | None] = {}
        if check and (problem := next(self.problems(), None)) is not None:
            raise ValueError(problem)

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0]["norm.weight"].dtype

    def tensors_of_files(self) -> dict[str, Stored]:
        """The tensors that the files should hold."""
        return {name: (shape, None) for name, shape in self.shapes.items()}

    def problems(self) -> Iterator[str]:
        """Messages about wrong names, shapes, dtypes and norms. Also finds the `cuts` that `read` needs."""
        for path, shard in zip(self.paths, self.shards):
            # A tied embedding may be stored as the output matrix too.
            found = [name for name in shard if name in self.stored or name != "output.weight"]
            model = f"n_layers = {self.args.n_layers}, as its params.json says"
            yield from name_problems(path, self.stored, found, model)
        everywhere = [name for name in self.stored if all(name in shard for shard in self.shards)]
        dtypes: dict[torch.dtype, str] = {}
        for path, shard in zip(self.paths, self.shards):
            for name in everywhere:
                expected, found = self.stored[name][1], shard[name].dtype
                if expected is None:
                    dtypes.setdefault(found, f"{path.name} {name}")
                elif found != expected:
                    yield f"{path}: {name} is {found}: expected {expected}"
        yield from dtype_problems(self.paths[0].parent, dtypes)
        for name in everywhere:
            try:
                self.cuts[name] = self._find_cut(name)
                if partition_dim(name) is None:
                    yield from self._norm_problems(name)
            except ValueError as error:
                yield str(error)

    def _norm_problems(self, name: str) -> Iterator[str]:
        """Messages about a norm. Each shard has it whole: if the copies differ, the shards are not of one model."""
        first = self.shards[0][name]
        for path, shard in zip(self.paths, self.shards):
            if not shard[name].isfinite().all():
                yield f"{path}: {name} has numbers that are not finite: the file is damaged, download it again"
            elif not torch.equal(shard[name], first) and first.isfinite().all():
                found = f"{path} and {self.paths[0].name} are not shards of one model: each has {name} whole"
                yield f"{found}, and theirs differ; download the directory again"

    def _find_cut(self, name: str) -> tuple[int, list[int]] | None:
        """The dimension along which the shards cut a tensor, and where each part starts; None if it is not cut."""
        full, n_shards = self.stored[name][0], len(self.shards)
        shapes = [tuple(shard[name].shape) for shard in self.shards]
        if partition_dim(name) is None or n_shards == 1:
            wrong, expected = [i for i, shape in enumerate(shapes) if shape != full], f"{list(full)}"
            if not wrong:
                return None
        else:
            for dim in (ROWS, COLUMNS) if name == "tok_embeddings.weight" else (partition_dim(name),):
                wrong = [i for i, shape in enumerate(shapes) if len(shape) != 2 or shape[1 - dim] != full[1 - dim]]
                if wrong:
                    continue
                sizes = [shape[dim] for shape in shapes]
                starts = [slice_of_rank(name, full[dim], self.args, i, n_shards)[0] for i in range(n_shards)]
                if len(set(starts)) < n_shards:  # a KV head in several shards
                    is_right = set(sizes) == {self.args.head_dim}
                else:  # the sizes in the files tell where; they may be uneven
                    starts = [sum(sizes[:i]) for i in range(n_shards)]
                    is_right = sum(sizes) == full[dim] and max(sizes) - min(sizes) <= n_shards
                if is_right:
                    return dim, starts
            wrong, expected = wrong or [n_shards - 1], f"one of {n_shards} equal parts of {list(full)}"
        found = list(shapes[wrong[0]])[:8]
        raise ValueError(f"{self.paths[wrong[0]]}: {name} has shape {found}: expected {expected}")

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """[start, stop) along `dim` of a full tensor, or all of it; a view of the mapped file if one shard has it."""
        if (cut := self.cuts.get(name)) is None:
            whole = self.shards[0][name]
            return whole if dim is None else whole.narrow(dim, start, stop - start)
        cut_dim, starts = cut
        first, last = (start, stop) if dim == cut_dim else (0, self.shapes[name][cut_dim])
        pieces = []
        for shard, shard_start in zip(self.shards, starts):
            shard_stop = shard_start + shard[name].shape[cut_dim]
            if shard_start <= first < min(shard_stop, last):  # skips further copies of a KV head
                piece = shard[name].narrow(cut_dim, first - shard_start, min(shard_stop, last) - first)
                pieces.append(piece if dim in (None, cut_dim) else piece.narrow(dim, start, stop - start))
                first = min(shard_stop, last)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=cut_dim)
