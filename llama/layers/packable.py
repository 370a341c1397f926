"""Modules whose weight may be packed into a layout, and is unpacked when somebody reads it. Knows nothing of Llama.

A packed matrix is a fast copy of the weight, whose own memory is freed. Every access to the weight (`weight`,
`parameters`, `state_dict`, `load_state_dict`, `to`, `deepcopy`, pickle, an optimizer) reads the attribute `weight` or
PyTorch's dict `_parameters`, and both unpack first. The parameter stays the same object throughout.

A weight with references from outside the model is not packed (`packing.pack` counts references). So nobody can read an
emptied parameter, or write to a weight that the model no longer uses.
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

# Held while weights are packed, unpacked or returned, so that no thread gets a weight that another thread empties.
LOCK = threading.RLock()


@dataclass(eq=False)
class Pack:
    """One layout of stacked matrices, and the modules that they belong to.

    Attributes:
        layout: the packed matrix.
        dtype, device: of the computation.
        quantized: "int8" or "int4"; None if the layout has the exact bits of the weights.
        rows: the rows of the layout that belong to each matrix.
        modules: the modules of the matrices, then others with the same parameter (the embedding of a tied output).
        emptied: whether the memory of the parameters was freed.
        is_inference: whether the parameters were created in inference mode.
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

    def supports(self, x: torch.Tensor) -> bool:
        """Whether the layout can replace the plain weight: x has its dtype and needs no gradient or transform."""
        if x.dtype != self.dtype or (torch.is_grad_enabled() and x.requires_grad):
            return False
        if torch.compiler.is_compiling():
            return True
        return not torch._C._is_any_autocast_enabled() and not torch._C._are_functorch_transforms_active()

    def __deepcopy__(self, memo: dict) -> "Pack":
        return self  # only quantised packs are copied with their modules, and codes never change

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
        if TracingContext.try_get() is not None:  # a compiler lists all parameters but reads few of them
            return vars(self)["_parameters"]
        with LOCK:
            self.unpack()
            return vars(self)["_parameters"]

    @_parameters.setter
    def _parameters(self, parameters: dict[str, nn.Parameter | None]) -> None:
        vars(self)["_parameters"] = parameters

    def __getattr__(self, name: str) -> Any:
        if name != "weight" or (torch.compiler.is_compiling() and self.pack is None):  # a compiler cannot trace locks
            return super().__getattr__(name)
        with LOCK:
            self.unpack()
            return super().__getattr__(name)

    def unpack(self) -> None:
        """Restores the exact weights in the parameters of all modules that share the pack.

        Raises:
            RuntimeError: the matrix is quantised, so it has no exact weight.
        """
        if self.pack is None:
            return
        with LOCK, torch.no_grad(), torch._C._DisableFuncTorch():
            pack = self.pack
            if pack is None:  # another thread has unpacked it
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
        if self.pack is not None and self.pack.quantized:  # save the rounded values
            destination[prefix + "weight"] = self.pack.layout.to_dense()[self.rows]
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        if self.pack is None or not self.pack.quantized:
            self.unpack()
        state = vars(self).copy()
        state.pop("_numbered", None)  # the layouts of a copy get numbers of their own
        return state
