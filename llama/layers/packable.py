"""Modules whose weight may be away in a packed layout, and comes back when somebody asks for it.

A packed matrix is a copy for speed, and takes the weight's place in memory. Every way to the weight (`weight`,
`parameters`, `state_dict`, `load_state_dict`, `to`, `deepcopy`, pickle, an optimizer) reads the attribute `weight` or
PyTorch's dict `_parameters`. Both unpack first. The parameter is one object before, meanwhile and after.

A weight that anybody else holds is not packed (`packing.pack` counts references). So nobody can look at an emptied
parameter, or write to a weight that the model no longer reads. Knows nothing of Llama.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext

from llama.layers.layouts import Layout

# Held while weights are packed, unpacked or handed out: no thread gets a weight that another is emptying.
LOCK = threading.RLock()


@dataclass(eq=False)
class Pack:
    """One layout, and the modules whose matrices it holds below one another.

    Attributes:
        layout: the packed matrix.
        dtype, device: of the computation.
        quantized: "int8" or "int4"; None where the layout has the weights' own bits.
        rows: which rows of the layout each matrix has.
        modules: those of the matrices, then others that hold the same parameter: the embedding of a tied output.
        emptied: whether the parameters gave up their memory.
        is_inference: whether the parameters were made in inference mode.
        on_unpack: called after unpacking.
    """

    layout: Layout
    dtype: torch.dtype
    device: torch.device
    quantized: str | None
    rows: tuple[slice, ...]
    modules: "tuple[weakref.ref[Packable], ...]" = ()
    emptied: bool = False
    is_inference: bool = False
    on_unpack: Callable[[], None] | None = None

    def __post_init__(self):
        self.widths = [rows.stop - rows.start for rows in self.rows]

    def serves(self, x: torch.Tensor) -> bool:
        """Whether the layout gives what the plain weight would: the same dtype, and no gradient or transform asked."""
        if x.dtype != self.dtype or (torch.is_grad_enabled() and x.requires_grad):
            return False
        if torch.compiler.is_compiling():
            return True
        return not torch._C._is_any_autocast_enabled() and not torch._C._are_functorch_transforms_active()

    def __deepcopy__(self, memo: dict) -> "Pack":
        return self  # copied with its module only if quantised, and codes never change

    def __reduce__(self) -> Any:
        raise TypeError(f"a model quantised to {self.quantized} cannot be pickled: `llama quantize` writes one to disk")


class Packable(nn.Module):
    """A module with a parameter `weight` that may be packed."""

    pack: Pack | None = None
    rows: slice | None = None  # of the pack's layout

    @property
    def layout(self) -> Layout | None:
        return None if self.pack is None else self.pack.layout

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        if TracingContext.try_get() is not None:  # a compiler lists all parameters, of which it reads few
            return vars(self)["_parameters"]
        with LOCK:
            self.unpack()
            return vars(self)["_parameters"]

    @_parameters.setter
    def _parameters(self, parameters: dict[str, nn.Parameter | None]) -> None:
        vars(self)["_parameters"] = parameters

    def __getattr__(self, name: str) -> Any:
        if name != "weight" or (torch.compiler.is_compiling() and self.pack is None):  # a compiler knows no locks
            return super().__getattr__(name)
        with LOCK:
            self.unpack()
            return super().__getattr__(name)

    def unpack(self) -> None:
        """Puts the weights back into the parameters of all modules that share the pack, bit for bit.

        Raises:
            RuntimeError: the matrix is quantised, so there is no weight to put back.
        """
        if self.pack is None:
            return
        with LOCK, torch.no_grad(), torch._C._DisableFuncTorch():
            pack = self.pack
            if pack is None:  # another thread was faster
                return
            if pack.quantized:
                raise RuntimeError(self._refusal("has no weight to read, change, load or train"))
            with torch.inference_mode(pack.is_inference):
                self._fill(pack)
            if pack.on_unpack is not None:
                pack.on_unpack()

    @staticmethod
    def _fill(pack: Pack) -> None:
        dense = pack.layout.to_dense() if pack.emptied else None
        for module in filter(None, (reference() for reference in pack.modules)):
            if dense is not None:
                weight = dense if len(pack.rows) == 1 else dense[module.rows].clone()
                vars(module)["_parameters"]["weight"].data = weight
            vars(module).update(pack=None, rows=None)

    def _refusal(self, what: str) -> str:
        return f"this {type(self).__name__} is {self.pack.quantized} and {what}: build the model without `quantize`"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if self.pack is None or not self.pack.quantized:
            return super()._apply(fn, recurse)
        self.check_cast(fn)
        return self

    def check_cast(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Raises RuntimeError if the matrix is quantised and a cast or a move, such as `half()`, would change it."""
        if self.pack is None or not self.pack.quantized:
            return
        after = fn(torch.empty(0, dtype=self.pack.dtype, device=self.pack.device))
        if (after.dtype, after.device) != (self.pack.dtype, self.pack.device):
            raise RuntimeError(self._refusal(f"cannot become {after.dtype} on {after.device}"))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.pack is not None and self.pack.quantized:  # the values that the codes stand for
            destination[prefix + "weight"] = self.pack.layout.to_dense()[self.rows]
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        if self.pack is None or not self.pack.quantized:
            self.unpack()
        state = vars(self).copy()
        state.pop("_numbered", None)  # `packing` files the layouts of a copy anew
        return state
