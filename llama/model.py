"""The network: token ids to logits. Llama 2, 3, 3.1, 3.2 and 3.3 text models, told apart by `ModelArgs` alone.

Read it upwards from `Transformer.forward` or downwards from `RMSNorm`; each class is one box of the usual drawing.
Knows nothing of text, files, sampling or when an answer ends.

Sources: Touvron et al. 2023, "Llama 2" (arXiv 2307.09288); Grattafiori et al. 2024, "The Llama 3 herd of models"
(arXiv 2407.21783); rotary embedding, Su et al. 2021 (arXiv 2104.09864); grouped-query attention, Ainslie et al. 2023
(arXiv 2305.13245); SwiGLU, Shazeer 2020 (arXiv 2002.05202); RMSNorm, Zhang and Sennrich 2019 (arXiv 1910.07467).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from llama.kv_cache import CacheView, KVCache
from llama.layers.attention import attend
from llama.layers.linear import (
    ColumnParallelLinear,
    Linear,
    RowParallelLinear,
    VocabParallelEmbedding,
    multiply_together,
)
from llama.layers.rotary import apply_rotary, rotary_frequencies, rotary_table


@dataclass
class ModelArgs:
    """The shape of a model: the keys of Meta's params.json, and what that file leaves unsaid."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # -1 in Llama 2's files: the tokenizer's
    multiple_of: int = 256  # the hidden size is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # Llama 2's, whose files do not say; Llama 3's say 500,000
    use_scaled_rope: bool = False  # Llama 3.1 and later
    rope_scale_factor: float = 8.0  # 32 in Llama 3.2 1B and 3B
    tied_embeddings: bool = False  # the output matrix is the embedding table: Llama 3.2 1B and 3B
    max_batch_size: int = 32
    max_seq_len: int = 2048

    def __post_init__(self):
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"dim = {self.dim}, n_heads = {self.n_heads}, n_kv_heads = {self.n_kv_heads}: expected n_heads "
                "to divide dim, and n_kv_heads to divide n_heads"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def model_parallel_sizes(self) -> list[int]:
        """Over how many processes the heads can be shared out: whole heads, and as many of them to each key head."""
        sizes = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
        return [n for n in sizes if self.n_kv_heads % n == 0 or n % self.n_kv_heads == 0]

    @property
    def hidden_dim(self) -> int:
        """The width of the feed-forward layer: two thirds of 4 dim, scaled, rounded up to `multiple_of`."""
        hidden_dim = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden_dim = int(self.ffn_dim_multiplier * hidden_dim)
        return self.multiple_of * math.ceil(hidden_dim / self.multiple_of)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., dim] -> [..., dim]
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class Attention(nn.Module):
    """Causal self-attention; several query heads share one key and value head. This rank's share of the heads."""

    def __init__(self, layer: int, args: ModelArgs, n_ranks: int):
        super().__init__()
        self.layer = layer
        self.head_dim = args.head_dim
        # With more ranks than key and value heads, each of those is on several ranks.
        n_kv_heads = max(args.n_kv_heads, n_ranks)
        self.n_local_heads = args.n_heads // n_ranks
        self.n_local_kv_heads = n_kv_heads // n_ranks
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * args.head_dim)
        self.wk = ColumnParallelLinear(args.dim, n_kv_heads * args.head_dim)
        self.wv = ColumnParallelLinear(args.dim, n_kv_heads * args.head_dim)
        self.wo = RowParallelLinear(args.n_heads * args.head_dim, args.dim)

    def forward(
        self, x: torch.Tensor, rotary: torch.Tensor, mask: torch.Tensor | None, cache: CacheView | None
    ) -> torch.Tensor:
        """[B, T, dim] -> [B, T, dim]. `mask` [B or 1, 1, T, length]: True where a query sees a key; None: causal."""
        q, k, v = multiply_together(x, self.wq, self.wk, self.wv)
        q = q.unflatten(-1, (self.n_local_heads, self.head_dim))
        k = k.unflatten(-1, (self.n_local_kv_heads, self.head_dim))
        v = v.unflatten(-1, (self.n_local_kv_heads, self.head_dim))
        q = apply_rotary(q, rotary).transpose(1, 2)  # [B, n_local_heads, T, head_dim]
        k = apply_rotary(k, rotary).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # [B, n_local_kv_heads, length, head_dim]
        y = attend(q, k, v, mask)  # [B, n_local_heads, T, head_dim]
        return self.wo(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = ColumnParallelLinear(args.dim, args.hidden_dim)
        self.w2 = RowParallelLinear(args.hidden_dim, args.dim)
        self.w3 = ColumnParallelLinear(args.dim, args.hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, dim] -> [B, T, dim]
        gate, up = multiply_together(x, self.w1, self.w3)
        return self.w2(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward; each reads a normed copy of the stream and adds to it."""

    def __init__(self, layer: int, args: ModelArgs, n_ranks: int):
        super().__init__()
        self.attention = Attention(layer, args, n_ranks)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self, x: torch.Tensor, rotary: torch.Tensor, mask: torch.Tensor | None, cache: CacheView | None
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """A Llama, split over the ranks of the model-parallel group (`llama.parallel.initialize` makes it).

    Parameters carry the names of Meta's checkpoints. Without a cache (`allocate_cache`), and where parameters require
    gradients, the model is a plain differentiable function of its tokens.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        if args.vocab_size < 1:
            raise ValueError(f"vocab_size = {args.vocab_size}: expected the size of the tokenizer's vocabulary")
        self.args = args
        self.tok_embeddings = VocabParallelEmbedding(args.vocab_size, args.dim)
        n_ranks = self.tok_embeddings.world_size
        if n_ranks not in args.model_parallel_sizes:
            raise ValueError(
                f"{args.n_heads} heads with {args.n_kv_heads} of keys and values cannot be shared out among {n_ranks} "
                f"processes: expected model_parallel_size to be one of {args.model_parallel_sizes}"
            )
        self.layers = nn.ModuleList(TransformerBlock(i, args, n_ranks) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = ColumnParallelLinear(args.dim, args.vocab_size, gather_output=True)
        if args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight
        scale_factor = args.rope_scale_factor if args.use_scaled_rope else None
        frequencies = rotary_frequencies(args.head_dim, args.rope_theta, scale_factor)
        self.register_buffer("rotary", rotary_table(frequencies, args.max_seq_len), persistent=False)
        self.cache: KVCache | None = None

    @torch.no_grad()
    def init_weights(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Random weights to start training from: N(0, std²); the matrices that add to the stream smaller, by depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                adds_to_stream = name.endswith(("wo.weight", "w2.weight"))
                scale = (2 * self.args.n_layers) ** -0.5 if adds_to_stream else 1.0
                parameter.normal_(std=std * scale, generator=generator)

    def matrices(self) -> Iterator[tuple[Linear, ...]]:
        """All matrices but the embedding, in the order of a pass; those that multiply the same input together."""
        for block in self.layers:
            attention, feed_forward = block.attention, block.feed_forward
            yield from ((attention.wq, attention.wk, attention.wv), (attention.wo,))
            yield from ((feed_forward.w1, feed_forward.w3), (feed_forward.w2,))
        if "output" in self._modules:  # a reward model has none
            yield (self.output,)

    def allocate_cache(self) -> None:
        """Makes room for the keys and values of `max_batch_size` sequences of `max_seq_len` positions."""
        args, weight = self.args, self.norm.weight
        n_kv_heads = self.layers[0].attention.n_local_kv_heads
        shape = (args.max_batch_size, n_kv_heads, args.max_seq_len, args.head_dim)
        self.cache = KVCache(args.n_layers, shape, weight.dtype, weight.device)

    def forward(self, tokens: torch.Tensor, start_pos: "int | list[int] | torch.Tensor" = 0) -> torch.Tensor:
        """Logits of the token that follows each position.

        Args:
            tokens: ids, [B, T]. Row b goes into row b of the cache, if there is one.
            start_pos: the position of the first column, one for all rows or one for each, [B], as a list or a tensor
                (a list saves reading it back from the device). Positions before it are read from the cache. A row
                shorter than T is padded on the right, with any id: its next token overwrites what the padding writes.

        Returns float32 [B, T, vocab_size]. Raises ValueError for more rows or positions than there is room for, or a
        start without a cache.
        """
        return self.logits(self.hidden_states(tokens, start_pos))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output matrix, [..., dim] -> float32 [..., vocab_size]: call it with those positions that are needed."""
        return self.output(hidden).float()

    def hidden_states(
        self, tokens: torch.Tensor, start_pos: "int | list[int] | torch.Tensor" = 0, slots: slice | None = None
    ) -> torch.Tensor:
        """`forward` up to the last norm, [B, T, dim]; `slots` are the rows of the cache, the first B when None."""
        rotary, mask, cache = self._locate(tokens, start_pos, slots)
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            x = block(x, rotary, mask, cache)
        return self.norm(x)

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor, exact: bool = False
    ) -> torch.Tensor:
        """One token of each of the first B rows of the cache, without a decision that depends on what a tensor holds.

        `tokens` are ids [B, 1], `positions` where each goes [B], `key_positions` 0, 1, … up to the last position of the
        longest row at least; `exact`, if they end where every row does. Returns logits, float32 [B, vocab_size].
        """
        positions = positions[:, None]
        mask = None if exact else (key_positions <= positions[:, :, None])[:, None]  # [B, 1, 1, length]
        cache = CacheView(self.cache, slice(0, tokens.shape[0]), positions, key_positions.shape[0])
        x, rotary = self.tok_embeddings(tokens), self.rotary[positions]
        for block in self.layers:
            x = block(x, rotary, mask, cache)
        return self.logits(self.norm(x)[:, -1])

    def _locate(
        self, tokens: torch.Tensor, start_pos: "int | list[int] | torch.Tensor", slots: slice | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, CacheView | None]:
        """Where the tokens are: their rotary angles, what each may see, and their place in the cache."""
        batch_size, n_new = tokens.shape
        starts = start_pos.tolist() if isinstance(start_pos, torch.Tensor) else start_pos
        starts = starts if isinstance(starts, list) else [int(starts)]
        first, last = min(starts), max(starts)
        length = last + n_new  # of the longest row
        if first < 0 or length > self.args.max_seq_len:
            raise ValueError(f"positions {first} to {length - 1} asked for: expected 0 to {self.args.max_seq_len - 1}")
        cache = None if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()) else self.cache
        if cache is None and last > 0:
            raise ValueError(f"start_pos = {last} without a cache: call allocate_cache() first, or pass every token")
        if cache is not None and batch_size > cache.max_batch_size:
            raise ValueError(f"{batch_size} rows: the cache was built for max_batch_size = {cache.max_batch_size}")
        slots = slice(0, batch_size) if slots is None else slots
        positions, mask = slice(first, length), None
        if first != last or (first > 0 and n_new > 1):
            queries = torch.tensor(starts, device=tokens.device)[:, None] + torch.arange(n_new, device=tokens.device)
            mask = (torch.arange(length, device=tokens.device) <= queries[:, :, None])[:, None]  # [.., 1, T, length]
            positions = positions if first == last else queries  # [B, T]
        cache = None if cache is None else CacheView(cache, slots, positions, length)
        return self.rotary[positions], mask, cache
