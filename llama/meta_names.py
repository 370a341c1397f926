"""What only scripts written against Meta's code need: its names, and its way of calling a model.

The names can be imported from `llama`, `llama.generation` and `llama.model`, as in Meta's code. Its way of calling a
model: `forward(tokens, start_pos)`, `block(x, start_pos, freqs_cis, mask)`, complex rotary numbers, and attention
modules that own their caches. Interface: github.com/meta-llama/llama3, llama/model.py and llama/generation.py.
"""

import itertools
import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partialmethod
from typing import Any

import torch
from torch import nn

from llama.kv_cache import KVCache, Slots
from llama.layers.attention import CacheView, Place, causal_mask
from llama.layers.hooks import calls_ours, check_hooks, has_global_hook, has_hooks, is_ours
from llama.layers.packable import Packable
from llama.layers.rotary import apply_rotary_emb, rotary_table  # noqa: F401 # Meta's name
from llama.sampling import filtered

# The tags of Llama 2's chat format.
B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"


def sample_top_p(probs: torch.Tensor, p: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Samples from the smallest set of most likely tokens whose probabilities sum to at least `p`.

    Tokens of equal probability are ordered by id. (Meta's function also keeps the next token if the sum is exactly
    `p`.) Holtzman et al. 2019, arXiv 1904.09751.

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
    if probs.device.type == "mps":  # MPS has no float64
        return sample_top_p(probs.cpu(), p, generator).to(probs.device)
    rows = probs.reshape(-1, probs.shape[-1])
    weights, ids = filtered(rows, *torch.tensor([[0.0], [p], [0.0]], dtype=torch.float64, device=probs.device))
    drawn = torch.multinomial(weights, num_samples=1, generator=generator)
    return ids.gather(-1, drawn).reshape(*probs.shape[:-1], 1)


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0, use_scaled: bool = False) -> torch.Tensor:
    """Returns the rotary table for heads of size `dim` as complex numbers: complex64 [end, dim / 2]."""
    return torch.view_as_complex(rotary_table(end, dim, theta, 8.0 if use_scaled else None))


def repeat_kv(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Repeats each key or value head: [B, T, n_kv_heads, head_dim] -> [B, T, n_kv_heads * n_rep, head_dim]."""
    return x.repeat_interleave(n_rep, dim=2)


def shared_attribute(owner: str, name: str) -> property:
    """A property that reads and sets `self.<owner>.<name>`."""
    return property(lambda o: getattr(getattr(o, owner), name), lambda o, new: setattr(getattr(o, owner), name, new))


def parts_of_a_copy(llama: Any) -> tuple:
    """`Llama.__reduce__`. A copy has the model, the tokenizer and attributes that callers added, but no draft.

    It has its own engine, which is empty.
    """
    arguments = llama.model, llama.tokenizer, llama.answerer.seed, None, llama._engine.decode_step.compiled
    own = {name: value for name, value in vars(llama).items() if name not in ("_engine", "answerer")}
    return _make, (type(llama), arguments), own


def _make(cls: type, arguments: tuple) -> Any:
    made = cls.__new__(cls)
    init = next(each.__init__ for each in cls.__mro__ if is_ours(each.__init__))  # a subclass may take other arguments
    init(made, *arguments)
    return made


class StartPos(int):
    """The position of the first column of a pass, as the int that Meta's blocks expect. `place`: its `CacheView`."""

    place: CacheView | None

    def __new__(cls, position: int, place: CacheView | None) -> "StartPos":
        start_pos = super().__new__(cls, position)
        start_pos.place = place
        return start_pos


class UnevenStartPos:
    """The `start_pos` that hooks get when rows start at different positions, for which there is no single int.

    Comparisons with a number work if the result is the same for all rows. Any other use raises ValueError.
    """

    __hash__ = None

    def __init__(self, starts: list[int], place: CacheView):
        self.starts, self.place = starts, place

    def _refuse(self, *_: object) -> int:
        raise ValueError(
            f"start_pos of rows at the positions {self.starts}: expected a hook that takes no position, prompts of one "
            "length that end together, or one prompt at a time"
        )

    def _compare(self, compare: Callable[[int, object], bool], other: object) -> bool:
        answers = {compare(start, other) for start in self.starts}
        return answers.pop() if len(answers) == 1 else bool(self._refuse())

    def __bool__(self) -> bool:
        return self._compare(operator.ne, 0)

    __index__ = __int__ = __float__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse


for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(UnevenStartPos, _name, partialmethod(UnevenStartPos._compare, getattr(operator, _name)))


def _in_metas_order(name: str) -> property:
    """A property: a module's cache in Meta's layout, [max_batch_size, max_seq_len, n_kv_heads, head_dim]."""

    def read(attention: "OwnCache") -> torch.Tensor:
        if attention.keys is None:
            attention.allocate_cache(attention.wk.weight.dtype, attention.wk.weight.device)
        return getattr(attention, name).transpose(1, 2)  # the same memory

    def write(attention: "OwnCache", tensor: torch.Tensor | None) -> None:
        setattr(attention, name, None if tensor is None else tensor.transpose(1, 2))

    return property(read, write, lambda attention: write(attention, None))


def has_foreign_blocks(layers: Iterable[nn.Module]) -> bool:
    """Whether a block or its attention is of a foreign class, is patched, or has a hook that may change its mask."""
    parts = (part for block in layers for part in (block, getattr(block, "attention", block)))
    return any(not calls_ours(part) or part._forward_pre_hooks for part in parts)


def mask_for_foreign_blocks(
    starts: list[int], n_new: int, slots: slice, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """Returns the mask that Meta's blocks expect, which is added to the scores: [n_new, length] of the given dtype.

    Raises:
        ValueError: rows start at different positions or not at row 0 of the cache, which `start_pos` cannot express.
    """
    if min(starts) < max(starts) or slots.start > 0:
        raise ValueError("a block or attention that is not Llama's own takes all rows at one position, from row 0 on")
    stop = starts[0] + n_new
    visible = causal_mask(torch.arange(starts[0], stop, device=device), stop)
    hidden = torch.zeros(visible.shape, dtype=dtype, device=device)
    return hidden.masked_fill(~visible, -torch.inf) if n_new > 1 else None


class OwnCache(nn.Module):
    """An attention module's keys and values of past positions, [max_batch_size, n_kv_heads, max_seq_len, head_dim].

    `Transformer.allocate_cache` allocates those of all layers. A module that is called on its own allocates its own.
    Casting or moving the module casts or moves them too.
    """

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    cache_shape: tuple[int, int, int, int]
    cache_k = _in_metas_order("keys")
    cache_v = _in_metas_order("values")

    @torch.inference_mode(False)
    def allocate_cache(self, dtype: torch.dtype, device: torch.device, as_built: bool = False) -> None:
        """Allocates the cache if there is none; with `as_built`, also if it has another shape than `cache_shape`."""
        pair = self.keys, self.values
        if any(tensor is None or (as_built and tensor.shape != self.cache_shape) for tensor in pair):
            cache = KVCache(1, self.cache_shape, dtype, device)
            self.keys, self.values = cache.keys[0], cache.values[0]

    def update_cache(
        self, start_pos: Place, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the keys and values of a pass. Returns them with all earlier ones, [B, n_kv_heads, length, head_dim].

        Args:
            start_pos: where they belong: at this position of the first B rows, or in this `CacheView`. None: nowhere.
            q: [B, n_heads, T, head_dim].
            k, v: [B, n_kv_heads, T, head_dim]. Gradients flow through these, not through earlier keys and values.
        """
        place = getattr(start_pos, "place", start_pos)
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


def n_rows(model: nn.Module) -> int:
    """The number of rows in the caches of a model, which callers may have replaced."""
    caches = (module.keys for module in model.modules() if isinstance(module, OwnCache))
    return min((len(keys) for keys in caches if keys is not None), default=0)


def cache_state(model: "RotaryAsComplex | ForwardOnly") -> tuple[int, ...]:
    """Changes when anybody writes to the first layer's keys or replaces the keys of a layer."""
    keys = model.cache.keys
    n_written = keys[0]._version if keys and not keys[0].is_inference() else 0  # inference mode does not count
    return (*map(id, keys), n_written)


class RotaryAsComplex(nn.Module):
    """A model's rotary table under Meta's name. It stays float32 when the weights are cast."""

    rotary: torch.Tensor  # [max_seq_len, head_dim / 2, 2]

    @property
    def device(self) -> torch.device:
        return self.rotary.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter, because callers may have replaced any given module. Unpacks nothing."""
        found = (p for module in self.modules() for p in vars(module)["_parameters"].values() if p is not None)
        return next(found).dtype

    @property
    def freqs_cis(self) -> torch.Tensor:
        """complex64 [max_seq_len, head_dim / 2], a view of the table."""
        return torch.view_as_complex(self.rotary)

    @freqs_cis.setter
    def freqs_cis(self, freqs_cis: torch.Tensor) -> None:
        self.rotary = torch.view_as_real(freqs_cis).contiguous()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        rotary = self.rotary
        for module in self.modules():
            if isinstance(module, Packable):  # check all before casting the first
                module.check_cast(fn)
        super()._apply(fn, recurse)
        self.rotary = rotary.to(self.rotary.device)
        return self


class ForwardOnly:
    """Lets the engine run a module that must be called as `module(tokens, start_pos)`.

    These are wrappers, compiled models, and a `Transformer` with hooks of its own or foreign blocks. They may keep a
    cache of their own, by row. So they run one sequence at a time, in row 0: for the engine, the cache has one slot.

    Raises:
        TypeError: it is not a module.
        ValueError: neither the module nor one inside it has `params`, so its max_seq_len is unknown.
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
        self.cache = self  # has all that the engine and its `Slots` use of a `KVCache`

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ForwardOnly) and other.module is self.module

    @property
    def device(self) -> torch.device:
        return next(tensor for tensor in itertools.chain(self.module.parameters(), self.module.buffers())).device

    @property
    def keys(self) -> list[torch.Tensor]:
        """The keys of the attention modules that are ours."""
        return [m.keys for m in self.module.modules() if isinstance(m, OwnCache) and m.keys is not None]

    def allocate_cache(self) -> None:
        """Does nothing: the module has its own cache."""

    def move(self, *where: object) -> None:
        """Does nothing: there is only one slot."""

    def run(self, tokens: torch.Tensor, start_pos: list[int], slots: slice | None = None) -> torch.Tensor:
        """Logits [1, T, vocab_size]; arguments as of `Transformer.run`."""
        logits = self.module(tokens, start_pos[0])
        if logits.shape[:-1] != tokens.shape:
            expected = [*tokens.shape, "vocab_size"]
            raise ValueError(f"{type(self.module).__name__} returned {list(logits.shape)} logits: expected {expected}")
        return logits.float()


@torch.inference_mode()
def recompute_keys(
    model: "RotaryAsComplex | ForwardOnly", slots: Slots, prompt_lengths: dict[int, int], token_by_token: bool
) -> None:
    """Recomputes the keys and values of some slots after a caller has overwritten the cache. Empties all other slots.

    Args:
        prompt_lengths: for each slot to recompute, the length of its prompt.
        token_by_token: whether to run the prompt and then each later token on its own, as hooks saw it the first time.
    """
    for slot, ids in enumerate(slots.tokens):
        if slot not in prompt_lengths:
            slots.tokens[slot] = []
            continue
        start = 0
        for stop in range(prompt_lengths[slot] if token_by_token else len(ids), len(ids) + 1):
            if stop > start:
                tokens = torch.tensor([ids[start:stop]], device=model.device)
                model.run(tokens, [start], slice(slot, slot + 1))
            start = stop


def runnable(model: nn.Module, compiled: bool = False) -> "RotaryAsComplex | ForwardOnly":
    """Returns what the engine runs: a plain `Transformer` itself, anything else in a `ForwardOnly`.

    Raises:
        TypeError, ValueError: as `ForwardOnly`; with `compiled`, also as `check_hooks`.
    """
    if compiled:
        check_hooks(model)
    is_llama = (
        isinstance(model, RotaryAsComplex) and calls_ours(model) and not has_hooks(model) and not has_global_hook()
    )
    return model if is_llama and not has_foreign_blocks(model.layers) else ForwardOnly(model)
