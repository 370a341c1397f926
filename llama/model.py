"""The network: token ids to logits. Llama 2, 3, 3.1, 3.2 and 3.3 text models differ only in their `ModelArgs`.

Start reading at `RMSNorm` and go down, or at `Transformer.forward` and go up. Each class is one box of the usual
diagram. Knows nothing of text, files, sampling or when an answer ends.

Sources: Touvron et al. 2023, "Llama 2" (arXiv 2307.09288); Grattafiori et al. 2024, "The Llama 3 herd of models"
(arXiv 2407.21783); grouped-query attention, Ainslie et al. 2023 (arXiv 2305.13245); SwiGLU, Shazeer 2020 (arXiv
2002.05202); RMSNorm, Zhang and Sennrich 2019 (arXiv 1910.07467).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import llama.meta_names as meta
from llama.kv_cache import KVCache
from llama.layers.attention import CacheView, Mask, Place, Starts, as_list, attend, positions_and_mask
from llama.layers.hooks import Logits, has_global_hook, is_plain
from llama.layers.linear import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, multiply_together
from llama.layers.rotary import rotary_table
from llama.meta_names import apply_rotary_emb, precompute_freqs_cis, repeat_kv  # noqa: F401 # importable from here


@dataclass
class ModelArgs:
    """The shape of a model: the keys of Meta's params.json, and what that file does not contain."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: the same as n_heads
    vocab_size: int = -1  # -1 in Llama 2's files, where the tokenizer determines it
    multiple_of: int = 256  # the hidden size is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # Llama 2, whose files do not contain it; 500,000 in Llama 3's files
    use_scaled_rope: bool = False  # Llama 3.1 and later
    rope_scale_factor: float = 8.0  # 32 in Llama 3.2 1B and 3B
    tied_embeddings: bool = False  # whether the output matrix is the embedding table: Llama 3.2 1B and 3B
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
        """The numbers of processes that can share the heads: each gets whole query heads and whole key heads."""
        sizes = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
        return [n for n in sizes if self.n_kv_heads % n == 0 or n % self.n_kv_heads == 0]

    @property
    def hidden_dim(self) -> int:
        return feed_forward_width(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)


def feed_forward_width(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The width of SwiGLU: two thirds of `hidden_dim`, times the multiplier, rounded up to `multiple_of`."""
    hidden_dim = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        hidden_dim = int(ffn_dim_multiplier * hidden_dim)
    return multiple_of * math.ceil(hidden_dim / multiple_of)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., dim] -> [..., dim]
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class Attention(meta.OwnCache):
    """Causal self-attention over this rank's heads. Several query heads share one key and value head."""

    same_input = ("wq", "wk", "wv")

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_kv_heads, self.head_dim = args.n_kv_heads, args.head_dim
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * args.head_dim)
        n_ranks = self.wq.world_size
        # With more ranks than key and value heads, several ranks hold a copy of the same head.
        n_kv_heads = max(args.n_kv_heads, n_ranks)
        self.wk = ColumnParallelLinear(args.dim, n_kv_heads * args.head_dim)
        self.wv = ColumnParallelLinear(args.dim, n_kv_heads * args.head_dim)
        self.wo = RowParallelLinear(args.n_heads * args.head_dim, args.dim)
        self.n_local_heads, self.n_local_kv_heads = args.n_heads // n_ranks, n_kv_heads // n_ranks
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.cache_shape = (args.max_batch_size, self.n_local_kv_heads, args.max_seq_len, args.head_dim)

    def forward(self, x: torch.Tensor, start_pos: Place, freqs_cis: torch.Tensor, mask: Mask) -> torch.Tensor:
        """[B, T, dim] -> [B, T, dim].

        `start_pos`: where in the cache the new keys and values go. `freqs_cis`: the rotary angles of the positions.
        `mask`: which keys each token sees (`attend`).
        """
        q, k, v = multiply_together(x, self.wq, self.wk, self.wv)
        q = q.unflatten(-1, (self.n_local_heads, self.head_dim))
        k = k.unflatten(-1, (self.n_local_kv_heads, self.head_dim))
        v = v.unflatten(-1, (self.n_local_kv_heads, self.head_dim))
        q, k = apply_rotary_emb(q, k, freqs_cis)
        q = q.transpose(1, 2)  # [B, n_local_heads, T, head_dim]
        k, v = self.update_cache(start_pos, q, k.transpose(1, 2), v.transpose(1, 2))  # [B, local_kv_heads, length, ..]
        y = attend(q, k, v, mask)
        return self.wo(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    same_input = ("w1", "w3")

    def __init__(self, dim: int, hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None):
        super().__init__()
        width = feed_forward_width(hidden_dim, multiple_of, ffn_dim_multiplier)
        self.w1 = ColumnParallelLinear(dim, width)
        self.w2 = RowParallelLinear(width, dim)
        self.w3 = ColumnParallelLinear(dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, dim] -> [B, T, dim]
        gate, up = multiply_together(x, self.w1, self.w3)
        return self.w2(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward. Each reads the normalised residual stream and adds its result to the stream."""

    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.layer_id = layer_id
        self.n_heads, self.dim, self.head_dim = args.n_heads, args.dim, args.head_dim
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, 4 * args.dim, args.multiple_of, args.ffn_dim_multiplier)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: torch.Tensor, start_pos: Place, freqs_cis: torch.Tensor, mask: Mask) -> torch.Tensor:
        """[B, T, dim] -> [B, T, dim]; arguments as of `Attention`."""
        x = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(meta.RotaryAsComplex):
    """A Llama, split over the ranks of the model-parallel group (see `llama.parallel.initialize`).

    With a cache, `forward` runs new tokens and reads the keys and values of earlier tokens. Without a cache, for
    training, its result depends on its arguments only.
    """

    packable = True  # whether `layers.packing.pack` may pack the matrices for decoding

    def __init__(self, params: ModelArgs):
        super().__init__()
        if params.vocab_size < 1:
            raise ValueError(f"vocab_size = {params.vocab_size}: expected the size of the tokenizer's vocabulary")
        self.args = self.params = params
        self.vocab_size, self.n_layers = params.vocab_size, params.n_layers
        self.tok_embeddings = VocabParallelEmbedding(params.vocab_size, params.dim)
        n_ranks = self.tok_embeddings.world_size
        if n_ranks not in params.model_parallel_sizes:
            raise ValueError(
                f"{params.n_heads} heads with {params.n_kv_heads} of keys and values cannot be shared out among "
                f"{n_ranks} processes: expected model_parallel_size to be one of {params.model_parallel_sizes}"
            )
        self.layers = nn.ModuleList(TransformerBlock(layer_id, params) for layer_id in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, gather_output=True)
        if params.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight
        scale = params.rope_scale_factor if params.use_scaled_rope else None
        rotary = rotary_table(params.max_seq_len, params.head_dim, params.rope_theta, scale)
        self.register_buffer("rotary", rotary, persistent=False)
        self.cache: KVCache | None = None

    @torch.no_grad()
    def init_weights(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Sets random weights for training: N(0, std²), smaller by depth in matrices that add to the stream."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                scale = (2 * self.args.n_layers) ** -0.5 if name.endswith(("wo.weight", "w2.weight")) else 1.0
                parameter.normal_(std=std * scale, generator=generator)

    def allocate_cache(self, as_built: bool = True) -> None:
        """Allocates the keys and values of `max_batch_size` sequences of `max_seq_len` positions.

        Call it again after replacing modules. A layer keeps a cache that it has; with `as_built`, only if the size is
        the one that the layer was built with.
        """
        attentions = [module for module in self.modules() if isinstance(module, Attention)]
        for attention in attentions:
            attention.allocate_cache(self.dtype, self.device, as_built)
        if self.cache is None:
            self.cache = KVCache(0, (), self.dtype, self.device)
        self.cache.keys = [attention.keys for attention in attentions]
        self.cache.values = [attention.values for attention in attentions]

    def forward(self, tokens: torch.Tensor, start_pos: Starts = None) -> torch.Tensor:
        """Returns the logits of the token that follows each position, float32 [B, T, vocab_size].

        Args:
            tokens: ids, [B, T]. Row b uses row b of the cache.
            start_pos: the position of the first column: one for all rows, or one for each row [B] as a list or tensor
                (a tensor must be copied from the device). Earlier positions are read from the cache, which the first
                call with a `start_pos` creates. Pad rows shorter than T on the right with any id: the row's next token
                overwrites what the padding wrote. None: start at position 0 and use no cache.

        Raises:
            ValueError: too many rows or positions for the cache, or nothing was run before `start_pos`.
        """
        return self.run(tokens, start_pos)[:]

    def run(self, tokens: torch.Tensor, start_pos: Starts = None, slots: slice | None = None) -> Logits:
        """`forward`, but computes logits only for the positions that are indexed; `slots` as in `hidden_states`."""
        hidden = self.hidden_states(tokens, start_pos, slots)
        is_observed = has_global_hook() or not is_plain(self.output, ColumnParallelLinear.forward)
        return Logits(hidden, self.logits, self.logits(hidden) if is_observed else None)

    def hidden_states(self, tokens: torch.Tensor, start_pos: Starts = None, slots: slice | None = None) -> torch.Tensor:
        """`forward` up to the last norm, [B, T, dim]. `slots`: the rows of the cache to use; None: the first B."""
        place, freqs_cis, mask = self._locate(tokens, start_pos, slots)
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            x = block(x, place, freqs_cis, mask)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Applies the output matrix: [..., dim] -> float32 [..., vocab_size]."""
        return self.output(hidden).float()

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor, exact: bool = False
    ) -> torch.Tensor:
        """Runs one more token in each of the first B rows of the cache. Returns logits, float32 [B, vocab_size].

        Its control flow does not depend on values in tensors, so it can be compiled or recorded as a graph.

        `tokens`: ids [B, 1]. `positions`: where each belongs [B]. `key_positions`: 0, 1, … at least to the last
        position of the longest row. `exact`: whether all rows end at the last key position, so no mask is needed.
        """
        positions = positions[:, None]
        mask = None if exact else (key_positions <= positions[:, :, None])[:, None]  # [B, 1, 1, length]
        place, freqs_cis = CacheView(0, positions, key_positions.shape[0]), self.rotary[positions]
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            x = block(x, place, freqs_cis, mask)
        return self.logits(self.norm(x)[:, -1])

    def _locate(
        self, tokens: torch.Tensor, start_pos: Starts, slots: slice | None
    ) -> tuple[meta.StartPos | meta.UnevenStartPos, torch.Tensor, Mask]:
        """Returns where the tokens belong in the cache, their rotary angles, and their attention mask."""
        starts = start_pos if isinstance(start_pos, list) else as_list(start_pos)
        batch_size, n_new = tokens.shape
        first, last = min(starts), max(starts)
        length = last + n_new  # of the longest row
        if first < 0 or length > self.args.max_seq_len:
            raise ValueError(f"positions {first} to {length - 1}: expected 0 to {self.args.max_seq_len - 1}")
        if start_pos is not None and batch_size > self.args.max_batch_size and batch_size > meta.n_rows(self):
            raise ValueError(f"{batch_size} rows: the cache was built for max_batch_size = {self.args.max_batch_size}")
        if self.cache is None and last > 0:
            raise ValueError(f"start_pos = {last}, but nothing was run at the positions before it")
        if self.cache is None and start_pos is not None:
            self.allocate_cache(as_built=False)
        slots = slice(0, batch_size) if slots is None else slots
        positions, mask = positions_and_mask(starts, n_new, tokens.device)
        if (mask is not None or slots.start > 0) and meta.has_foreign_blocks(self.layers):
            mask = meta.mask_for_foreign_blocks(starts, n_new, slots, self.dtype, self.device)
        place = None if start_pos is None else CacheView(slots.start, positions, length)
        at = meta.StartPos(first, place) if first == last else meta.UnevenStartPos(starts, place)
        rotary = self.rotary[positions]  # MPS does not support most complex operations
        return at, rotary if rotary.device.type == "mps" else torch.view_as_complex(rotary), mask
