"""Writes checkpoints: the two file formats tensor by tensor, and a directory that appears whole or not at all.

Knows the bytes of the files; nothing of a Llama's tensors.

Formats: github.com/huggingface/safetensors; a .pth file is a zip archive with a pickle of the tensors' shapes and a
record for the bytes of each (pytorch.org/docs/stable/notes/serialization.html).
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

CHECKLIST = "checklist.chk"
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORAGES = {torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage}
STORAGES |= {torch.bfloat16: torch.BFloat16Storage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage}


@contextlib.contextmanager
def appear_whole(dst: Path, n_bytes: int) -> Iterator[Path]:
    """Makes a directory to write into. At the end it is renamed to `dst`; after an error it is removed.

    Raises FileExistsError if `dst` is not empty or another process is writing it, FileNotFoundError if it has no
    parent directory, and OSError if it cannot be written, for example because n_bytes do not fit on the disk.
    """
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise FileExistsError(f"{dst} exists and is not an empty directory: name another, or remove it first")
    if not dst.parent.is_dir():
        raise FileNotFoundError(f"{dst.parent} is not a directory: expected one to make {dst.name} in")
    folder = dst.parent / f".{dst.name}.partial"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, even by a kill
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            for leftover in folder.iterdir():
                leftover.unlink()
            if (free := shutil.disk_usage(folder).free) < n_bytes:
                raise OSError(errno.ENOSPC, f"{free:,} bytes are free")
            yield folder
            os.replace(folder, dst)  # nothing is left to remove
        except BlockingIOError:
            raise FileExistsError(f"another conversion is writing {dst}: wait for it, or name another place") from None
        except OSError as error:
            found = f"{dst} could not be written, and nothing of it is left: {error.strerror or error}"
            raise OSError(error.errno, f"{found} (it needs {n_bytes:,} bytes)") from error


@contextlib.contextmanager
def progress(n_bytes: int, what: str) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr, if that is a terminal."""
    with tqdm(total=n_bytes, desc=what, unit="B", unit_scale=True, disable=None) as bar:
        yield bar.update


def safetensors_header(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, metadata: dict[str, str] | None = None
) -> bytes:
    """The header of a safetensors file. The tensors' bytes follow it in this order, without gaps."""
    dtype_name = next(name for name, each in SAFETENSORS_DTYPES.items() if each == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the numbers
    return struct.pack("<Q", len(text)) + text


class PthFile(contextlib.AbstractContextManager):
    """Writes a dictionary of tensors as `torch.save` does, but tensor by tensor.

    Args:
        path: the file to make.
        shapes: the shape of each tensor, by name. All of them must be written, in any order.
        dtype: of all tensors, or of each by its name.
    """

    ALIGNMENT = 64  # of each record, bytes

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype | dict[str, torch.dtype]):
        dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(shapes, dtype)
        self._archive = zipfile.ZipFile(path, "w")
        self._prefix = path.stem
        self._keys = {name: str(key) for key, name in enumerate(shapes)}
        tensors = OrderedDict((name, _Tensor(self._keys[name], shape, dtypes[name])) for name, shape in shapes.items())
        with self._open_record("data.pkl") as record:
            _TensorPickler(record, protocol=2).dump(tensors)
        for name, content in (("byteorder", b"little"), ("version", b"3\n")):
            with self._open_record(name) as record:
                record.write(content)

    def write(self, name: str, pieces: Iterable[memoryview]) -> None:
        """Writes the bytes of one tensor, row after row."""
        with self._open_record(f"data/{self._keys[name]}") as record:
            for piece in pieces:
                record.write(piece)

    def __exit__(self, *exception: object) -> None:
        self._archive.close()

    def _open_record(self, name: str) -> Any:
        info = zipfile.ZipInfo(f"{self._prefix}/{name}")
        # A record is a header of 30 bytes, the name, the sizes in 20 bytes, and an extra field with a head of 4 bytes
        # ("FB" is PyTorch's mark). The field's length aligns the numbers, so that a tensor can be memory-mapped.
        padding = -(self._archive.fp.tell() + 30 + len(info.filename) + 20 + 4) % self.ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        return self._archive.open(info, "w", force_zip64=True)


class _Tensor:
    """Pickled like a tensor: unpickling it gives a tensor."""

    def __init__(self, key: str, shape: tuple[int, ...], dtype: torch.dtype):
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        storage = _Storage(("storage", STORAGES[dtype], key, "cpu", math.prod(shape)))
        self.parts = storage, 0, shape, strides, False, OrderedDict()

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self.parts


class _Storage(tuple):
    """The pickle's reference to the record with a tensor's numbers."""


class _TensorPickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple | None:
        return tuple(obj) if isinstance(obj, _Storage) else None


def md5_of(path: Path, advance: Callable[[int], object]) -> str:
    """The md5 sum of a file, hexadecimal; calls `advance` with the number of bytes after each read."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def write_checklist(folder: Path) -> None:
    """Writes checklist.chk, the md5 sums of all files, as md5sum does, and forces the files to the disk."""
    paths, lines = sorted(folder.iterdir()), []
    with progress(sum(path.stat().st_size for path in paths), CHECKLIST) as advance:
        for path in paths:
            lines.append(f"{md5_of(path, advance)}  {path.name}\n")
            with path.open("rb") as file:
                os.fsync(file.fileno())
    (folder / CHECKLIST).write_text("".join(lines))
