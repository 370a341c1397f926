"""Compiles the C++ files of this folder for this processor, and calls the products with tensors.

A file is compiled when it is first needed, and kept in the user's cache folder. If it cannot be compiled, or the
processor lacks its instructions, `layouts` uses PyTorch's kernels; for 8 and 4 bits `missing` returns the reason. Knows
nothing of layouts, models or checkpoints.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from llama.layers.quantization import BLOCK_ROWS, Blocks, Quantized, block_bytes, group_size, kind_of_rows, quantize

FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-w"]
USE_TILES = True  # AMX, if the processor has it
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_PARTS = "Tensor x, Tensor[] blocks, int[] sizes, int bits"
_library = torch.library.Library("llama", "FRAGMENT")
_library.define(f"product_of_integers({_PARTS}) -> Tensor")


@functools.cache
def missing() -> str | None:
    """Returns why this machine has no compiled kernels, None if it has them. Prints the reason once, on stderr."""
    try:
        _functions()
    except (OSError, RuntimeError) as error:
        print(f"Matrices of 8 and 4 bits use PyTorch's kernels, which are slower: {error}", file=sys.stderr)
        return str(error)
    return None


@functools.cache
def _functions() -> ctypes.CDLL:
    """Returns the compiled kernels. Raises OSError or RuntimeError if there are none."""
    if sys.platform != "linux" or not torch.cpu._is_vnni_supported():
        raise RuntimeError("ours need Linux and a processor with AVX-512 VNNI")
    # Without fused multiply-add, rounding gives the same bits as PyTorch's operations.
    return _declared(compiled("integer_products", "-ffp-contract=off"))


def compiled(name: str, *flags: str) -> ctypes.CDLL:
    """Compiles a C++ file of this folder and loads it. Raises OSError or RuntimeError if that fails."""
    source = Path(__file__).with_name(f"{name}.cpp")
    cpu = next((line for line in open("/proc/cpuinfo") if line.startswith(("flags", "Features"))), "")
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, *FLAGS, *flags, str(source)]
    inputs = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    inputs += [*command[:-1], cpu, *platform.libc_ver()]
    key = hashlib.sha256("\n".join(inputs).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-textbook"
    path = folder / f"{name}-{key[:16]}.so"
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _compile(command, path)
        except OSError:  # the folder cannot be written: compile for this process only
            with tempfile.TemporaryDirectory() as own:
                _compile(command, Path(own) / path.name)
                return ctypes.CDLL(str(Path(own) / path.name))
    return ctypes.CDLL(str(path))


def _compile(command: list[str], path: Path) -> None:
    compiler, *_, source = command
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"no C++ compiler {compiler} was found (on Debian, `sudo apt install g++`; CXX names another)"
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # several processes may compile at the same time
        made = os.path.join(folder, path.name)
        result = subprocess.run([*command, "-o", made], capture_output=True, text=True)
        if result.returncode != 0:
            first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[:200])
            raise RuntimeError(f"{compiler} does not compile {source}: {first}")
        os.replace(made, path)


def _declared(functions: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    functions.product.argtypes = [pointer, number, number, flag, flag, number, number, *[pointer] * 3, flag, flag]
    functions.product.restype = None
    functions.round_matrix.argtypes = [pointer, number, number, flag, flag, number, pointer, flag]
    return functions


# Up to this many rows of x, `bfloat16_products.cpp` is faster than oneDNN on the same packed matrix.
FEW_ROWS = 32
BLOCK_HEIGHT = 32  # rows of the matrix in each of oneDNN's blocks


@functools.cache
def product_of_few_rows() -> Callable[..., None] | None:
    """The product of `bfloat16_products.cpp`, for x [1 to FEW_ROWS, in_features] and an address of `blocks_of`.

    None if the processor has no AMX or there is no compiler. oneDNN's product is as right then.
    """
    try:
        if sys.platform != "linux" or not torch.cpu.get_capabilities().get("amx_bf16"):
            return None
        functions = compiled("bfloat16_products")
    except (OSError, RuntimeError, AttributeError):  # an older PyTorch has no such function
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    functions.product.argtypes = [pointer, number, number, pointer, number, pointer, ctypes.c_int]
    functions.product.restype = None
    return functions.product if functions.has_tiles() else None


def blocks_of(packed: torch.Tensor, weight: torch.Tensor) -> int | None:
    """The address of a matrix that oneDNN has packed, if `product_of_few_rows` can read its blocks; else None.

    No documentation says how oneDNN packs. So a matrix of distinct numbers is packed once and read, and of each weight
    the first and the last block are compared.
    """
    n_rows, n_columns = weight.shape
    if weight.dtype != torch.bfloat16 or n_rows % BLOCK_HEIGHT or n_columns % 32 or not _knows_blocks():
        return None
    return _address(packed, weight, (0, n_rows // BLOCK_HEIGHT - 1))


@functools.cache
def _knows_blocks() -> bool:
    """Whether oneDNN packs as `bfloat16_products.cpp` reads, and that can be compiled."""
    if product_of_few_rows() is None:
        return False
    weight = torch.arange(96 * 128, dtype=torch.int16).view(torch.bfloat16).view(96, 128)
    return _address(torch.ops.mkldnn._reorder_linear_weight(weight, 64), weight, range(3)) is not None


def _address(packed: torch.Tensor, weight: torch.Tensor, blocks: Iterable[int]) -> int | None:
    """Where a packed matrix lies; None if these of its blocks are not the weight's."""
    address, n_bytes = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    if n_bytes != weight.nbytes:
        return None
    memory = torch.frombuffer((ctypes.c_uint8 * n_bytes).from_address(address), dtype=torch.int16)
    found = memory.view(-1, weight.shape[1] // 2, BLOCK_HEIGHT, 2)
    for block in blocks:
        rows = weight.detach()[block * BLOCK_HEIGHT :][:BLOCK_HEIGHT].view(torch.int16)
        if not torch.equal(found[block], rows.unflatten(1, (-1, 2)).transpose(0, 1)):
            return None
    return address


def in_blocks(matrix: "torch.Tensor | Quantized | Blocks", kind: str) -> Blocks:
    """Rounds a matrix as `quantize` does, on all cores. Raises ValueError as `quantize`."""
    if isinstance(matrix, Blocks):
        return matrix
    if isinstance(matrix, Quantized) or matrix.dtype not in TYPES or missing() is not None:
        return Blocks.of(quantize(matrix, kind) if isinstance(matrix, torch.Tensor) else matrix)
    matrix, (n_rows, n_columns) = matrix.detach().contiguous(), matrix.shape
    kind = kind_of_rows(kind, n_columns)
    data = torch.empty(-(-n_rows // BLOCK_ROWS), block_bytes(kind, n_columns), dtype=torch.uint8)
    shape = n_rows, n_columns, TYPES[matrix.dtype], int(kind.removeprefix("int")), group_size(n_columns)
    if not _functions().round_matrix(matrix.data_ptr(), *shape, data.data_ptr(), torch.get_num_threads()):
        raise ValueError("a matrix has NaN or infinite values: look for damaged weights with `llama verify`")
    return Blocks(kind, n_rows, n_columns, data)


class Product:
    """Multiplies x by stacked matrices of the same kind and number of columns: `product(x)`, [..., out_features]."""

    def __init__(self, parts: list[Blocks]):
        self.kind, self.in_features = parts[0].kind, parts[0].in_features
        self.blocks, self.sizes = [part.data for part in parts], [part.out_features for part in parts]
        expected = block_bytes(self.kind, self.in_features)
        if any(not data.is_contiguous() or data.shape[1] != expected for data in self.blocks):
            raise ValueError(f"blocks {[tuple(data.shape) for data in self.blocks]}: expected {expected} bytes in each")
        self.out_features, self.bits = sum(self.sizes), int(self.kind.removeprefix("int"))
        self.arguments = _arguments(self.in_features, self.blocks, self.sizes, self.bits)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # [..., in_features] -> [..., out_features]
        if torch.compiler.is_compiling():
            return torch.ops.llama.product_of_integers(x, self.blocks, self.sizes, self.bits)
        if x.shape[-1] != self.in_features or x.device.type != "cpu":
            raise ValueError(f"x {list(x.shape)} on {x.device}: expected [..., {self.in_features}] on the cpu")
        return _run(x, self.out_features, self.bits, *self.arguments)


def _arguments(in_features: int, blocks: list[torch.Tensor], sizes: list[int], bits: int) -> tuple:
    addresses = (ctypes.c_void_p * len(blocks))(*[data.data_ptr() for data in blocks])
    return group_size(in_features), len(blocks), addresses, (ctypes.c_int64 * len(sizes))(*sizes)


def _run(x: torch.Tensor, out_features: int, bits: int, group: int, n_parts: int, blocks: object, sizes: object):
    if x.dtype not in TYPES:
        return _run(x.float(), out_features, bits, group, n_parts, blocks, sizes).to(x.dtype)
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    n_columns, n_threads = x.shape[-1], torch.get_num_threads()
    shape = x.numel() // n_columns, n_columns, TYPES[x.dtype], bits, group, n_parts
    _functions().product(x.data_ptr(), *shape, blocks, sizes, y.data_ptr(), n_threads, USE_TILES)
    return y


@torch.library.impl(_library, "product_of_integers", "CPU")
def _product(x: torch.Tensor, blocks: list[torch.Tensor], sizes: list[int], bits: int) -> torch.Tensor:
    return _run(x, sum(sizes), bits, *_arguments(x.shape[-1], blocks, sizes, bits))


@torch.library.register_fake("llama::product_of_integers", lib=_library)
def _shape_of_product(x: torch.Tensor, blocks: list[torch.Tensor], sizes: list[int], bits: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], sum(sizes)))
