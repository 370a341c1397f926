"""What only scripts written against Meta's code need: its names, and its manners of calling a model.

The names are importable from where those scripts look for them: `llama`, `llama.generation`, `llama.model`. The manners
are `forward(tokens, start_pos)`, blocks called as `block(x, start_pos, freqs_cis, mask)`, complex rotary numbers, and
caches that attention modules own. Interface: github.com/meta-llama/llama3, llama/model.py and llama/generation.py.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn

from llama.kv_cache import KVCache
from llama.layers.attention import CacheView, Place, causal_mask
from llama.layers.hooks import has_global_hook, has_hooks, is_ours
from llama.layers.packable import Packable
from llama.layers.rotary import apply_rotary, rotary_table
from llama.sampling import filtered

# The tags of Llama 2's chat format.
B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"


def sample_top_p(probs: torch.Tensor, p: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws from the nucleus: the smallest set of most likely tokens that holds at least `p` of the probability.

    Tokens of equal probability enter in the order of their ids. (Meta's function of this name also keeps the next
    token when the set holds exactly `p`.) Holtzman et al. 2019, arXiv 1904.09751.

    Args:
        probs: probabilities, [..., vocab_size].
        p: in (0, 1].
        generator: PyTorch's global one when None.

    Returns:
        ids, int64 [..., 1].

    Raises:
        ValueError: `p` outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p = {p}: expected a number in (0, 1]")
    if probs.device.type == "mps":  # which has no float64
        return sample_top_p(probs.cpu(), p, generator).to(probs.device)
    rows = probs.reshape(-1, probs.shape[-1])
    weights, ids = filtered(rows, *torch.tensor([[0.0], [p], [0.0]], dtype=torch.float64, device=probs.device))
    drawn = torch.multinomial(weights, num_samples=1, generator=generator)
    return ids.gather(-1, drawn).reshape(*probs.shape[:-1], 1)


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0, use_scaled: bool = False) -> torch.Tensor:
    """The rotary table of heads of `dim` numbers, as complex numbers: complex64 [end, dim / 2]."""
    return torch.view_as_complex(rotary_table(end, dim, theta, 8.0 if use_scaled else None))


def apply_rotary_emb(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [B, T, n_heads, head_dim], turned by freqs_cis, complex [T, head_dim / 2]."""
    return apply_rotary(xq, freqs_cis), apply_rotary(xk, freqs_cis)


def repeat_kv(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Each key or value head n_rep times in a row: [B, T, n_kv_heads, head_dim] -> [B, T, n_kv_heads * n_rep, ..]."""
    return x.repeat_interleave(n_rep, dim=2)


def shared_attribute(owner: str, name: str) -> property:
    """An attribute that is its owner's, another attribute of the same object: who sets the one sets the other."""
    return property(lambda o: getattr(getattr(o, owner), name), lambda o, new: setattr(getattr(o, owner), name, new))


class StartPos(int):
    """The position of a pass's first column, an int as Meta's blocks take it; `place` is where it is in the cache."""

    place: CacheView | None = None


def _in_metas_order(name: str) -> property:
    """A tensor of an attention module's cache in Meta's order, [max_batch_size, max_seq_len, n_kv_heads, head_dim]."""

    def read(attention: "OwnCache") -> torch.Tensor:
        if attention.keys is None:
            attention.allocate_cache(attention.wk.weight.dtype, attention.wk.weight.device)
        return getattr(attention, name).transpose(1, 2)  # the same memory

    def write(attention: "OwnCache", tensor: torch.Tensor | None) -> None:
        setattr(attention, name, None if tensor is None else tensor.transpose(1, 2))

    return property(read, write, lambda attention: write(attention, None))


def has_foreign_blocks(layers: Iterable[nn.Module]) -> bool:
    """Whether a block or its attention is of another class than ours, or was patched."""
    return not all(is_ours(block) and is_ours(getattr(block, "attention", block)) for block in layers)


def mask_for_foreign_blocks(starts: list[int], n_new: int, slots: slice, weight: torch.Tensor) -> torch.Tensor | None:
    """What Meta's blocks take: numbers to add to the scores, [n_new, length] in the dtype of the weights.

    Raises:
        ValueError: the rows are at different positions or not the first of the cache, which `start_pos` cannot say.
    """
    if min(starts) < max(starts) or slots.start > 0:
        raise ValueError("a block or attention that is not Llama's own takes all rows at one position, from row 0 on")
    stop = starts[0] + n_new
    visible = causal_mask(torch.arange(starts[0], stop, device=weight.device), stop)
    hidden = torch.zeros(visible.shape, dtype=weight.dtype, device=weight.device)
    return hidden.masked_fill(~visible, -torch.inf) if n_new > 1 else None


class OwnCache(nn.Module):
    """An attention module's keys and values of past positions, [max_batch_size, n_kv_heads, max_seq_len, head_dim].

    `Transformer.allocate_cache` makes those of all layers; a module that is called by itself makes its own. They follow
    the module's dtype and device.
    """

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    cache_shape: tuple[int, int, int, int]
    cache_k = _in_metas_order("keys")
    cache_v = _in_metas_order("values")

    @torch.inference_mode(False)
    def allocate_cache(self, dtype: torch.dtype, device: torch.device) -> None:
        """Makes room, unless there is."""
        if self.keys is None or self.values is None:
            cache = KVCache(1, self.cache_shape, dtype, device)
            self.keys, self.values = cache.keys[0], cache.values[0]

    def remember(
        self, start_pos: Place, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the keys and values of a pass, and returns them with those before, [B, n_kv_heads, length, head_dim].

        Args:
            start_pos: where they belong: from this position on in the first B rows; or where the view says. None keeps
                nothing.
            q: [B, n_heads, T, head_dim].
            k, v: [B, n_kv_heads, T, head_dim]. A gradient flows through these; those before are constants.
        """
        place = start_pos.place if isinstance(start_pos, StartPos) else start_pos
        if place is None:
            return k, v
        if not isinstance(place, CacheView):
            n_new = k.shape[2]
            place = CacheView(0, slice(place, place + n_new), place + n_new)
        if self.keys is None or self.values is None:
            self.allocate_cache(k.dtype, k.device)
        if self.keys.dtype != k.dtype:  # inside torch.autocast
            k, v = k.to(self.keys.dtype), v.to(self.keys.dtype)
        found = place.update(self.keys, self.values, k.detach(), v.detach())
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            found = replace(place, first_slot=0).update(*(past.clone() for past in found), k, v)
        return found if k.dtype == q.dtype else (found[0].to(q.dtype), found[1].to(q.dtype))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.keys, self.values = (None if tensor is None else fn(tensor) for tensor in (self.keys, self.values))
        return self


class RotaryAsComplex(nn.Module):
    """A model's rotary table under Meta's name, and in float32 whatever the weights are cast to."""

    rotary: torch.Tensor  # [max_seq_len, head_dim / 2, 2]

    @property
    def device(self) -> torch.device:
        return self.rotary.device

    @property
    def freqs_cis(self) -> torch.Tensor:
        """complex64 [max_seq_len, head_dim / 2], the memory of the table."""
        return torch.view_as_complex(self.rotary)

    @freqs_cis.setter
    def freqs_cis(self, freqs_cis: torch.Tensor) -> None:
        self.rotary = torch.view_as_real(freqs_cis).contiguous()

    def angles(self, positions: slice | torch.Tensor) -> torch.Tensor:
        """Those of some positions, complex64 [.., head_dim / 2]; on MPS, which hardly knows such, as real numbers."""
        rotary = self.rotary[positions]
        return rotary if rotary.device.type == "mps" else torch.view_as_complex(rotary)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        rotary = self.rotary
        for module in self.modules():
            if isinstance(module, Packable):  # all are asked before the first is cast
                module.check_cast(fn)
        super()._apply(fn, recurse)
        self.rotary = rotary.to(self.rotary.device)
        return self


class ForwardOnly:
    """A module that is only called as Meta's code would, `module(tokens, start_pos)`, in the place of a `Transformer`.

    Such are wrappers, compiled models, and a `Transformer` with hooks of its own or with foreign blocks. They may keep
    their own past, by rows. So one sequence runs at a time, in row 0, from its first position to its last: to the
    engine this is a model whose cache has one slot.

    Raises:
        TypeError: it is no module.
        ValueError: neither the module nor one inside it has `params`, so there is no knowing how much it takes.
    """

    packable = False
    max_batch_size = 1

    def __init__(self, module: nn.Module):
        if not isinstance(module, nn.Module):
            raise TypeError(f"model = {module!r}: expected a torch.nn.Module")
        found = (getattr(inner, "params", None) for inner in module.modules())
        self.args = next((params for params in found if hasattr(params, "max_seq_len")), None)
        if self.args is None:
            raise ValueError(
                f"a {type(module).__name__} has no `params`: expected a module with those of a Transformer"
            )
        self.module, self.max_seq_len = module, self.args.max_seq_len
        self.cache = self  # as far as the engine's `Slots` ask

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ForwardOnly) and other.module is self.module

    @property
    def device(self) -> torch.device:
        return next(tensor for tensor in itertools.chain(self.module.parameters(), self.module.buffers())).device

    def allocate_cache(self) -> None:
        """Nothing: the module keeps its own past."""

    def move(self, *where: object) -> None:
        """Nothing: there is no other slot."""

    def run(self, tokens: torch.Tensor, start_pos: list[int], slots: slice | None = None) -> torch.Tensor:
        """Logits [1, T, vocab_size]; arguments as of `Transformer.run`."""
        logits = self.module(tokens, start_pos[0])
        if logits.shape[:-1] != tokens.shape:
            expected = [*tokens.shape, "vocab_size"]
            raise ValueError(f"{type(self.module).__name__} returned {list(logits.shape)} logits: expected {expected}")
        return logits.float()


def runnable(model: nn.Module) -> "RotaryAsComplex | ForwardOnly":
    """What the engine runs: a `Transformer` as it is, if nobody would notice that not all of it is called."""
    is_llama = isinstance(model, RotaryAsComplex) and is_ours(model) and not has_hooks(model) and not has_global_hook()
    return model if is_llama and not has_foreign_blocks(model.layers) else ForwardOnly(model)
