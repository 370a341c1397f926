"""A CUDA card that is not there: tensors that say they are on it, and are computed on the CPU.

What mixes tensors of the card and of the CPU raises, as on a card. So every function that touches a device can be run,
values and all, where there is no card; what a real one adds is its kernels, graphs and streams. `pytest --device cuda`
runs the same tests on a real one.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before anything is pretended: it looks at functions of torch.cuda
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CARD = torch.device("cuda", 0)
# What PyTorch's own C++ sees: a device that needs no driver, and that nobody else uses.
INSIDE = torch.device("meta", 1)
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class OnCard(torch.Tensor):
    """A tensor of the card; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor, requires_grad: bool = False) -> "OnCard":
        layout = {"strides": real.stride(), "storage_offset": real.storage_offset()}
        with torch.inference_mode(False):  # a view of a tensor made outside it would else be refused
            made = torch.Tensor._make_wrapper_subclass(
                cls, real.size(), **layout, dtype=real.dtype, device=INSIDE, requires_grad=requires_grad
            )
        made.held = real
        return made

    device = property(lambda self: CARD)
    is_cuda, is_cpu, is_meta = True, False, False

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:
        return f"OnCard({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Named(TorchFunctionMode):
    """Calls that say "cuda" mean the first card: PyTorch would else ask its driver which is the current one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def named(x: Any) -> Any:
            is_device = isinstance(x, torch.device) or (isinstance(x, str) and x == "cuda")
            return CARD if is_device and torch.device(x).type == "cuda" else x

        if func is torch.Tensor.tolist:
            return (args[0].held if isinstance(args[0], OnCard) else args[0]).tolist()
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is torch.tensor and named((kwargs or {}).get("device")) == CARD:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(CARD)
        if func is torch.Tensor.new_tensor and isinstance(args[0], OnCard):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **(kwargs or {})}).to(CARD)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], OnCard):
            # A list of indices becomes a tensor of the card.
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(OnCard(torch.tensor(i)) if isinstance(i, list) else i for i in index)
            return func(args[0], index, *args[2:])
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*map(named, args), **{name: named(x) for name, x in kwargs.items()})


class Card(TorchDispatchMode):
    """What tensors of the CPU alone come to, and what makes new ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation, on the side that its tensors are on."""
    flat = pytree.tree_leaves((args, kwargs))
    ours = [x for x in flat if isinstance(x, OnCard)]
    copies = func is aten.copy_.default or func.overloadpacket in (aten.to, aten._to_copy)
    if ours and not copies:
        check_sides(func, args, flat)
    wanted = next((x for x in flat if isinstance(x, torch.device)), None)
    is_on_card = bool(ours) if wanted is None else wanted in (CARD, INSIDE)
    if func is aten.copy_.default:
        is_on_card = isinstance(args[0], OnCard)
    if Graph.recording is not None:
        Graph.recording.check(func, flat)
    to_cpu = torch.device("cpu")
    held_args, held_kwargs = pytree.tree_map_only(OnCard, lambda x: x.held, (args, kwargs))
    if is_on_card:
        held_args, held_kwargs = pytree.tree_map_only(torch.device, lambda x: to_cpu, (held_args, held_kwargs))
    kernel = KERNELS.get(func, func)
    out = kernel(*held_args, **held_kwargs)
    if Graph.recording is not None:
        Graph.recording.calls.append((kernel, held_args, held_kwargs, out))
    if func is aten.copy_.default:
        return args[0]
    if copies:
        stays = is_on_card == bool(ours)
        if out is held_args[0]:
            if stays:
                return args[0]
            out = out.clone()
        return OnCard(out) if is_on_card else out
    if not is_on_card:
        return out
    returned = func._schema.returns[0].alias_info if func._schema.returns else None
    if returned is not None and returned.is_write:  # in place
        return args[0]
    return pytree.tree_map_only(torch.Tensor, OnCard, out)


def check_sides(func: Any, args: tuple, flat: list) -> None:
    strangers = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, OnCard) and x.dim() > 0]
    if func in INDEXING and isinstance(args[0], OnCard):
        values = args[2:3]  # indices may come from the CPU
        strangers = [x for x in values if isinstance(x, torch.Tensor) and not isinstance(x, OnCard) and x.dim() > 0]
    if strangers:
        raise RuntimeError(
            f"{func}: expected all tensors on the card, found {[tuple(x.shape) for x in strangers]} on the CPU"
        )


def pack_int4(codes: torch.Tensor, inner_tiles: int) -> torch.Tensor:
    """As `_convert_weight_to_int4pack` on a card, but for the order of the codes: uint8 [n, k / 2] -> int32."""
    n, k = codes.shape[0], 2 * codes.shape[1]
    if codes.dtype != torch.uint8 or n % 8 or k % (16 * inner_tiles) or inner_tiles not in (2, 4, 8):
        raise RuntimeError(f"int4 codes {codes.dtype} {tuple(codes.shape)}, {inner_tiles} inner tiles")
    return codes.contiguous().view(torch.int32).view(n // 8, k // (inner_tiles * 16), 32, inner_tiles // 2)


def multiply_int4(x: torch.Tensor, packed: torch.Tensor, group: int, scales_zeros: torch.Tensor) -> torch.Tensor:
    n, k = packed.shape[0] * 8, x.shape[1]
    if x.dtype != torch.bfloat16 or scales_zeros.dtype != torch.bfloat16 or scales_zeros.shape != (k // group, n, 2):
        raise RuntimeError(f"x {x.dtype} {tuple(x.shape)}, scales and zeros {tuple(scales_zeros.shape)}")
    codes = packed.contiguous().view(torch.uint8).view(n, k // 2)
    codes = torch.stack([codes >> 4, codes & 15], dim=-1).view(n, k // group, group).float() - 8
    scales, zeros = scales_zeros.float().permute(1, 0, 2).unbind(-1)
    return (x.float() @ (codes * scales[:, :, None] + zeros[:, :, None]).view(n, k).T).bfloat16()


KERNELS = {
    aten._convert_weight_to_int4pack.default: pack_int4,
    aten._weight_int4pack_mm.default: multiply_int4,
}


class Graph:
    """A CUDA graph: the operations of a recording, done again on the same memory."""

    recording: "Graph | None" = None

    def __init__(self):
        self.calls: list[tuple] = []

    def check(self, func: Any, flat: list) -> None:
        """Raises for what a card does not record: reading a number back, and tensors of the CPU."""
        if func is aten._local_scalar_dense.default or any(isinstance(x, torch.Tensor) and x.is_cpu for x in flat):
            raise RuntimeError(f"{func} in a recording: a graph has no part of the CPU")

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            held = {
                x.untyped_storage()._cdata for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
            }
            again = pytree.tree_leaves(func(*args, **kwargs))
            for old, new in zip(pytree.tree_leaves(out), again, strict=True):
                if (
                    isinstance(old, torch.Tensor) and old.untyped_storage()._cdata not in held
                ):  # neither a view nor in place
                    old.copy_(new)

    @staticmethod
    @contextlib.contextmanager
    def record(graph: "Graph", **options: Any) -> Iterator[None]:
        Graph.recording = graph
        try:
            yield
        finally:
            Graph.recording = None


@contextlib.contextmanager
def pretended_card() -> Iterator[torch.device]:
    """In it, `device="cuda"` is a card."""
    nothing = lambda *args, **kwargs: None  # noqa: E731
    with (
        mock.patch.multiple(
            torch.cuda,
            _lazy_init=nothing,
            is_available=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            set_device=nothing,
            synchronize=nothing,
            Stream=torch.cpu.Stream,
            Event=torch.cpu.Event,
            stream=torch.cpu.stream,
            current_stream=torch.cpu.current_stream,
            CUDAGraph=Graph,
            graph=Graph.record,
            graph_pool_handle=nothing,
            is_bf16_supported=lambda *args, **kwargs: True,
            mem_get_info=lambda *args: (80 << 30, 80 << 30),
        ),
        Named(),
        Card(),
    ):
        yield CARD
