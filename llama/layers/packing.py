"""Packs the matrices of a model for fast decoding. They unpack when they are touched (`llama.layers.packable`).

Knows nothing of files, or of what the matrices are for.
"""

import ctypes
import itertools
import mmap
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from llama.layers.hooks import is_plain
from llama.layers.layouts import Layout, lay_out
from llama.layers.linear import COLUMN_FORWARD, Linear
from llama.layers.packable import LOCK, Pack, Packable
from llama.layers.quantization import Blocks, Quantized

# Packing takes about as long as four decode steps, and saves about half the time of each later step. In decode steps:
FIRST_WAIT = 4  # from the first touch to packing again
LONGEST_WAIT = 1024  # the most; each touch that comes too soon after packing doubles the wait
WORTH_IT = 16  # a touch after fewer steps than this comes too soon
RETRY_AFTER = 64  # if a weight could not be packed because it has other references


def pack(model: nn.Module) -> bool:
    """Packs the matrices that are not packed yet, one after the other. Call it before every decode step.

    A weight stays plain while there are other references to it (to the parameter, to its memory, from autograd), and
    while it requires a gradient. It also stays plain for some steps after a touch, because packing takes time. With
    `model.packable = False` all weights stay plain. The model is never in memory twice, except that packing a tied
    output matrix copies the embedding.

    Returns:
        Whether all matrices are packed that this machine has a layout for.
    """
    if not getattr(model, "packable", True):
        return False
    state = vars(model).get("_packing")
    if state is None:
        state = vars(model)["_packing"] = PackingState()
    state.age += 1
    state.wait -= not state.complete
    if state.complete or state.wait >= 0:
        return state.complete
    with LOCK, torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
        holders = _Holders(model)
        held = [_pack_group(group, holders, state) for group in groups(model)]
    state.tried(complete=not any(held))
    return state.complete


def unpack(model: nn.Module) -> None:
    """Unpacks all weights except quantised ones."""
    for module in model.modules():
        if isinstance(module, Packable) and module.pack is not None and not module.pack.quantized:
            module.unpack()


def groups(model: nn.Module) -> Iterator[tuple[Linear, ...]]:
    """Yields all matrices of a model in the order of a pass, grouped by input.

    A module's attribute `same_input` names those of its matrices that multiply the same input.
    """
    together: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, Linear) and module not in together:
            yield (module,)
        matrices = tuple(module._modules.get(name) for name in getattr(module, "same_input", ()))
        if matrices and all(isinstance(matrix, Linear) for matrix in matrices):
            together.update(matrices)
            yield matrices


def signature(model: nn.Module) -> tuple:
    """Returns what a compiled or recorded step depends on besides its inputs. If it changes, the step is stale.

    These are the modules, the shapes and dtypes of their tensors, their packed matrices, and addresses on CUDA.
    """
    found: list = []
    for module in model.modules():
        found.append((id(module), type(module)))
        tensors = [*vars(module)["_parameters"].values(), *vars(module)["_buffers"].values()]
        if isinstance(module, Packable) and (pack := module.pack) is not None:
            found.append((pack.dtype, pack.rows, getattr(pack.layout, "number", None)))
            tensors = [value for value in vars(pack.layout).values() if isinstance(value, torch.Tensor)]
        found += [(t.dtype, t.shape, t.device, t.data_ptr() if t.is_cuda else 0) for t in tensors if t is not None]
    return tuple(found)


def lay_out_together(
    parts: "dict[Linear, torch.Tensor | Quantized | Blocks]", quantize: str, dtype: torch.dtype
) -> Layout:
    """Quantises matrices with the same input and packs them together, permanently."""
    layout = lay_out(list(parts.values()), quantize, dtype)
    sizes = [len(part) if isinstance(part, torch.Tensor) else part.out_features for part in parts.values()]
    device = next(iter(parts.values())).device
    for linear in parts:
        linear.weight = None
    _join(list(parts), Pack(layout, dtype, device, quantize, _rows(sizes)))
    for part in parts.values():
        if isinstance(part, torch.Tensor):
            drop_pages(part)
    return layout


class PackingState:
    """When the next packing of a model is due, in decode steps."""

    def __init__(self):
        self.complete = False  # whether everything is packed
        self.is_touched = False  # whether there was a touch since the last packing
        self.age = 0  # steps since the last packing
        self.wait = 0  # steps until the next packing
        self.after_touch = FIRST_WAIT  # how long to wait after a touch

    def tried(self, complete: bool) -> None:
        self.complete = complete
        self.wait = 0 if complete else RETRY_AFTER
        self.age, self.is_touched = 0, False

    def touched(self) -> None:
        """Notes that a weight was read and unpacked."""
        if not self.is_touched:  # reading further weights counts as the same touch
            soon = self.age < WORTH_IT
            self.after_touch = min(2 * self.after_touch, LONGEST_WAIT) if soon else FIRST_WAIT
            self.wait = self.after_touch
        self.complete, self.is_touched = False, True

    def __reduce__(self) -> tuple:
        return PackingState, ()  # a copy of a model is not packed


class _Holders:
    """Which modules of a model have each parameter, and how many parameters share each piece of memory."""

    def __init__(self, model: nn.Module):
        self.modules: defaultdict[int, list[nn.Module]] = defaultdict(list)  # by the parameter's id
        self.n_sharing: Counter[int] = Counter()  # by the memory's address
        self.buffer: list[torch.Tensor] = []  # for `lay_out`
        for module in model.modules():
            for parameter in vars(module)["_parameters"].values():
                if parameter is not None:
                    self.modules[id(parameter)].append(module)
                    if len(self.modules[id(parameter)]) == 1:
                        self.n_sharing[_memory(parameter)] += 1

    def may_pack(self, linear: Linear) -> bool:
        """Whether nothing outside the model refers to the weight of a matrix."""
        found = _references(linear)  # first, because a local variable is one more reference
        weight = vars(linear)["_parameters"]["weight"]
        modules = self.modules[id(weight)]
        n_more = 0, len(modules) - 1, 0, 0, self.n_sharing[_memory(weight)] - 1, 0  # references of the model itself
        return (
            all(n == own + more for n, own, more in zip(found, _UNHELD, n_more))
            and not weight.requires_grad
            # An embedding may share the weight, because it is packable and unpacks too.
            and all(m is linear or (isinstance(m, Packable) and not isinstance(m, Linear)) for m in modules)
        )


def _pack_group(group: tuple[Linear, ...], holders: _Holders, state: PackingState) -> bool:
    """Packs matrices with the same input, together if possible. Returns whether any of them has other references."""
    plain = [linear for linear in group if linear.pack is None and _is_matrix(linear)]
    free = [linear for linear in plain if holders.may_pack(linear)]
    weights = (vars(linear)["_parameters"]["weight"] for linear in free)
    kinds = {(weight.dtype, weight.device, weight.shape[1], weight.is_inference()) for weight in weights}
    # Matrices with hooks must be called one by one.
    together = len(free) == len(group) and len(kinds) == 1 and all(is_plain(m, COLUMN_FORWARD) for m in group)
    for linears in [free] if together else [[linear] for linear in free]:
        _pack_together(linears, holders, state)
    return len(free) < len(plain)


def _is_matrix(linear: Linear) -> bool:
    """Whether `weight` is its only parameter: pruned or parametrised matrices compute theirs from other tensors."""
    parameters = vars(linear)["_parameters"]
    weight, others = parameters.get("weight"), [p for name, p in parameters.items() if name != "weight"]
    return type(weight) is nn.Parameter and weight.dim() == 2 and not any(p is not None for p in others)


def _pack_together(linears: list[Linear], holders: _Holders, state: PackingState) -> None:
    weights = [vars(linear)["_parameters"]["weight"] for linear in linears]
    n_before, number = vars(linears[0]).get("_numbered", (0, None))
    dtype, device = weights[0].dtype, weights[0].device
    number = number if n_before == len(linears) else None
    layout = lay_out([w.detach() for w in weights], None, dtype, number, holders.buffer)
    if layout is None:
        return
    vars(linears[0])["_numbered"] = len(linears), getattr(layout, "number", None)
    modules = dict.fromkeys([*linears, *(module for w in weights for module in holders.modules[id(w)])])
    pack = Pack(layout, dtype, device, None, _rows([len(w) for w in weights]))
    pack.modules, pack.on_unpack = tuple(map(weakref.ref, modules)), state.touched
    pack.emptied, pack.is_inference = len(modules) == len(linears), weights[0].is_inference()
    for module in modules:
        vars(module).update(pack=pack)
    _join(linears, pack)
    for weight in weights:
        if pack.emptied or not _is_edited(weight):
            drop_pages(weight)
        if pack.emptied:
            holders.n_sharing[_memory(weight)] -= 1
            with torch.inference_mode(pack.is_inference):
                weight.data = torch.empty(0, dtype=dtype, device=device)


def _join(linears: list[Linear], pack: Pack) -> None:
    for linear, rows in zip(linears, pack.rows):
        vars(linear).update(pack=pack, rows=rows)


def _rows(sizes: list[int]) -> tuple[slice, ...]:
    """The rows of each of several stacked matrices."""
    stops = list(itertools.accumulate(sizes))
    return tuple(slice(stop - size, stop) for size, stop in zip(sizes, stops))


def _memory(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage, which all its views share."""
    return tensor.untyped_storage()._cdata


def _references(module: nn.Module) -> tuple[int, ...]:
    """Counts the references to a module's dict of parameters, to its weight, and to the weight's storage.

    From Python to the dict and the weight; from C++ (autograd) and weak ones to the weight; from tensors and Python to
    the storage.
    """
    parameters = vars(module)["_parameters"]
    weight = parameters["weight"]
    from_python = sys.getrefcount(parameters), sys.getrefcount(weight)
    to_weight = weight._use_count(), weakref.getweakrefcount(weight)
    to_storage = torch._C._storage_Use_Count(_memory(weight)), sys.getrefcount(weight.untyped_storage())
    return *from_python, *to_weight, *to_storage


def _probe() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(0))
    return module


_UNHELD = _references(_probe())  # the counts without references from elsewhere


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor that a checkpoint has read is the mapped file: PyTorch cannot resize such memory."""
    return not tensor.untyped_storage().resizable()


def drop_pages(tensor: torch.Tensor) -> None:
    """Frees the memory of a mapped tensor. The system reads the file again when the tensor is used."""
    if (pages := _pages(tensor)) is not None:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(pages.start), ctypes.c_size_t(len(pages)), mmap.MADV_DONTNEED)


def _is_edited(tensor: torch.Tensor) -> bool:
    """Whether a mapped tensor was written to. Such pages differ from the file, so they must not be dropped."""
    if (pages := _pages(tensor)) is None:
        return False
    try:
        with open("/proc/self/pagemap", "rb") as file:  # one number per page: docs.kernel.org/admin-guide/mm/pagemap
            file.seek(8 * (pages.start // mmap.PAGESIZE))
            entries = torch.frombuffer(bytearray(file.read(8 * len(pages) // mmap.PAGESIZE)), dtype=torch.int64)
    except OSError:
        return True
    in_memory, of_file = (entries >> 62 & 3) != 0, (entries >> 61 & 1) != 0
    return bool((in_memory & ~of_file).any())


def _pages(tensor: torch.Tensor) -> range | None:
    """The addresses of the pages that a mapped tensor fills completely; None if there are none."""
    if sys.platform != "linux" or not is_mapped(tensor) or tensor.numel() == 0:
        return None
    n_elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + n_elements * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    return range(start, stop) if stop > start else None
