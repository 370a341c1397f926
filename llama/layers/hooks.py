"""Finds foreign code in a model: hooks, patched methods, and modules of other classes. Knows nothing of Llama.

A fast path that does not call each module must first check here that no foreign code would miss the call.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hook

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Identity)  # they do not change an input


def is_plain(module: nn.Module, forward: Callable[..., torch.Tensor]) -> bool:
    """Whether calling a module runs `forward` of its class and nothing else. Ignores global hooks."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module).forward is forward and "forward" not in module.__dict__ and not hooks


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_ours(function: Callable) -> bool:
    """Whether a function or method is defined in this package. Not misled by names that a decorator has set."""
    module = getattr(function, "__globals__", {}).get("__name__", "")
    return module.partition(".")[0] == __name__.partition(".")[0]


def calls_ours(module: nn.Module) -> bool:
    """Whether calling a module runs a method of this package: it is of one of our classes, and not patched."""
    return is_ours(module.forward) and getattr(module.forward, "__self__", None) is module


def is_observed(model: nn.Module) -> bool:
    """Whether foreign code sees the inputs of a module. It may count positions, or take the last one."""
    for module in model.modules():
        hooks = itertools.chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
        if not all(map(is_ours, hooks)) or not (isinstance(module, CONTAINERS) or calls_ours(module)):
            return True
    return bool(has_global_hook())


class Patches:
    """Detects global hooks and patched classes, which callers can add without a reference to the model."""

    def __init__(self, model: nn.Module):
        self._forwards = {type(module): type(module).forward for module in model.modules()}

    @property
    def found(self) -> bool:
        for cls, forward in self._forwards.items():
            if cls.forward is not forward:
                return True
        return bool(has_global_hook())


def watched(model: nn.Module) -> Iterator[str]:
    """Yields what a recorded or compiled pass would ignore: a line for each module with hooks or a foreign forward."""
    if has_global_hook():
        yield "every module has hooks (torch.nn.modules.module.register_module_forward_hook or the like)"
    for name, module in model.named_modules():
        name = name or "the model"
        if has_hooks(module):
            yield f"{name} has hooks"
        elif not isinstance(module, CONTAINERS) and not calls_ours(module):
            yield f"{name} is a {type(module).__name__}, or its forward was patched"


def check_hooks(model: nn.Module) -> None:
    """Raises ValueError if a module has hooks, a patched forward or a foreign class, which a compiled step ignores."""
    if (first := next(watched(model), None)) is not None:
        raise ValueError(f"{first}, which a compiled step would ignore: remove it, or build without compile")


@dataclass
class Logits:
    """The logits of a pass, [B, T, vocab_size], computed when indexed: all of them cost as much as several layers.

    Attributes:
        hidden: output of the last norm, [B, T, dim].
        make: applies the output matrix, [..., dim] -> float32 [..., vocab_size].
        made: all logits, if a hook on the output matrix must see those of every position.
    """

    hidden: torch.Tensor
    make: Callable[[torch.Tensor], torch.Tensor]
    made: torch.Tensor | None

    def __getitem__(self, index: slice | int | tuple) -> torch.Tensor:
        """Returns the logits at `hidden[index]`, float32 [..., vocab_size]."""
        return self.make(self.hidden[index]) if self.made is None else self.made[index]
