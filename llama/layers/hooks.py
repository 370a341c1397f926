"""Who looks at a module: hooks, patched methods, classes put in place of ours. Knows nothing of Llama.

A fast path that does not call a module asks here first whether anybody would notice.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hook

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Identity)  # that do nothing to an input


def is_plain(module: nn.Module, forward: Callable[..., torch.Tensor]) -> bool:
    """Whether calling a module runs `forward` of its class and nothing else; global hooks apart (`has_global_hook`)."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module).forward is forward and "forward" not in module.__dict__ and not hooks


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_ours(function: Callable) -> bool:
    """Whether a function or method is written in this package, whatever names a decorator has given it."""
    module = getattr(function, "__globals__", {}).get("__name__", "")
    return module.partition(".")[0] == __name__.partition(".")[0]


def calls_ours(module: nn.Module) -> bool:
    """Whether calling a module runs a method of this package: no patched method, and no other class in its place."""
    return is_ours(module.forward) and getattr(module.forward, "__self__", None) is module


def is_looked_at(model: nn.Module) -> bool:
    """Whether somebody else's code sees what runs through a module: it may count positions, or take the last one."""
    for module in model.modules():
        hooks = itertools.chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
        if not all(map(is_ours, hooks)) or not (isinstance(module, CONTAINERS) or calls_ours(module)):
            return True
    return bool(has_global_hook())


class Patches:
    """Notices hooks on all modules, and another `forward` in a class of a model's: for neither takes the model."""

    def __init__(self, model: nn.Module):
        self._forwards = {type(module): type(module).forward for module in model.modules()}

    @property
    def found(self) -> bool:
        for cls, forward in self._forwards.items():
            if cls.forward is not forward:
                return True
        return bool(has_global_hook())


def watched(model: nn.Module) -> Iterator[str]:
    """What a recorded or compiled pass would miss: a line for each module with hooks, or whose forward is not ours."""
    if has_global_hook():
        yield "every module has hooks (torch.nn.modules.module.register_module_forward_hook or the like)"
    for name, module in model.named_modules():
        name = name or "the model"
        if has_hooks(module):
            yield f"{name} has hooks"
        elif not isinstance(module, CONTAINERS) and not calls_ours(module):
            yield f"{name} is a {type(module).__name__}, or its forward was patched"


def check_hooks(model: nn.Module) -> None:
    """Refuses what a compiled step cannot honour.

    Raises:
        ValueError: a module has hooks, a patched forward or a foreign class; it says which.
    """
    if (first := next(watched(model), None)) is not None:
        raise ValueError(f"{first}, which a compiled step would ignore: take it off again, or build without compile")


@dataclass
class Logits:
    """The logits of a pass, [B, T, vocab_size], made where they are indexed: all would cost as much as several layers.

    Attributes:
        hidden: what the last norm left, [B, T, dim].
        make: the output matrix, [..., dim] -> float32 [..., vocab_size].
        made: all of them, where somebody looks at the output matrix and is to see those of every position.
    """

    hidden: torch.Tensor
    make: Callable[[torch.Tensor], torch.Tensor]
    made: torch.Tensor | None

    def __getitem__(self, index: slice | int | tuple) -> torch.Tensor:
        """float32 [..., vocab_size], of the positions that `hidden[index]` has."""
        return self.make(self.hidden[index]) if self.made is None else self.made[index]
