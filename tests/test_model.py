"""The network against Transformers' on the same weights, and against itself in other pieces. All float32."""

import pytest
import torch
from conftest import random_model

from llama import ModelArgs, Transformer
from llama.layers.rotary import rotary_frequencies

transformers = pytest.importorskip("transformers", reason="pip install transformers to compare with it")

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "vocab_size": 200, "max_seq_len": 128}
VARIANTS = {
    "llama 2: every head its own key": {},
    "grouped keys": {"n_kv_heads": 2},
    "one key head": {"n_kv_heads": 1},
    "llama 3 base": {"n_kv_heads": 2, "rope_theta": 500000.0},
    "tied output": {"n_kv_heads": 2, "tied_embeddings": True},
    "odd ffn_dim_multiplier": {"ffn_dim_multiplier": 1.37, "multiple_of": 20},
    "scaled rope by 8": {
        "n_kv_heads": 2,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "max_seq_len": 9000,
        "dim": 256,
    },
    "scaled rope by 32": {
        "n_kv_heads": 2,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "rope_scale_factor": 32.0,
        "max_seq_len": 9000,
        "dim": 256,
    },
}


def in_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k in the order of Transformers, whose rotary pairs are (i, i + head_dim / 2)."""
    order = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    return weight.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)


def transformers_model(model: Transformer) -> "transformers.LlamaForCausalLM":
    """The same weights in Transformers' model."""
    args = model.args
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        rope |= {"rope_type": "llama3", "factor": args.rope_scale_factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=args.max_seq_len,
        rope_parameters=rope,
        tie_word_embeddings=args.tied_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    ours = model.state_dict()
    state = {"model.embed_tokens.weight": ours["tok_embeddings.weight"], "model.norm.weight": ours["norm.weight"]}
    state["lm_head.weight"] = ours["output.weight"]
    parts = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for i in range(args.n_layers):
        for our_part, their_part in parts.items():
            weight = ours[f"layers.{i}.{our_part}.weight"]
            if our_part in ("attention.wq", "attention.wk"):
                weight = in_halves(weight, args.head_dim)
            state[f"model.layers.{i}.{their_part}.weight"] = weight
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(state, strict=True)
    return theirs


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers(variant):
    model = random_model(**SHAPE | VARIANTS[variant])
    theirs = transformers_model(model)
    length = model.args.max_seq_len
    tokens = torch.randint(0, 200, (1 if length > 1000 else 3, length), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert expected.std() > 0.3  # not all the same
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["grouped keys", "llama 2: every head its own key"])
@torch.no_grad()
def test_prefill_then_decode_equals_one_forward(variant):
    model = random_model(**SHAPE | VARIANTS[variant], max_batch_size=3)
    tokens = torch.randint(0, 200, (3, 60), generator=torch.Generator().manual_seed(1))
    expected = model(tokens)
    model.allocate_cache()
    cuts = [(0, 17), (17, 30), (30, 31), *((i, i + 1) for i in range(31, 60))]  # prompt, a further chunk, then steps
    pieces = [model(tokens[:, start:stop], start) for start, stop in cuts]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_rows_at_different_positions_equal_each_row_alone():
    model = random_model(**SHAPE, n_kv_heads=2, max_batch_size=4)
    tokens = torch.randint(0, 200, (4, 64), generator=torch.Generator().manual_seed(2))
    expected = model(tokens)
    model.allocate_cache()
    starts = torch.tensor([5, 40, 1, 17])
    model(tokens[:, :40], 0)  # the rows' keys, with positions past each start that must not be seen
    tokens_there = torch.stack([row[start : start + 6] for row, start in zip(tokens, starts)])
    logits = model(tokens_there, starts)
    for row, start in enumerate(starts):
        torch.testing.assert_close(logits[row], expected[row, start : start + 6], atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_padding_wrote_is_never_seen():
    model = random_model(**SHAPE, n_kv_heads=2, max_batch_size=2)
    tokens = torch.randint(0, 200, (1, 20), generator=torch.Generator().manual_seed(3))
    expected = model(tokens)
    model.allocate_cache()
    padded = torch.full((2, 18), 199)
    padded[0, :7] = tokens[0, :7]
    first = model(padded, 0)[0, :7]
    rest = [model(tokens[:, i : i + 1], i)[0] for i in range(7, 20)]
    torch.testing.assert_close(torch.cat([first, *rest]), expected[0], atol=1e-4, rtol=0)


def test_gradients_equal_transformers():
    model = random_model(**SHAPE | VARIANTS["grouped keys"]).requires_grad_(True)
    theirs = transformers_model(model)
    tokens = torch.randint(0, 200, (2, 30), generator=torch.Generator().manual_seed(1))
    model(tokens).logsumexp(-1).mean().backward()
    theirs(tokens).logits.logsumexp(-1).mean().backward()
    ours, expected = model.layers[0].feed_forward.w2.weight.grad, theirs.model.layers[0].mlp.down_proj.weight.grad
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-3)


def test_scaled_rope_leaves_fast_pairs_and_slows_slow_ones_by_the_factor():
    plain = rotary_frequencies(128, 500000.0)
    scaled = rotary_frequencies(128, 500000.0, 8.0)
    wavelength = 2 * torch.pi / plain
    assert torch.equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    assert torch.equal(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)


@pytest.mark.parametrize(
    ("shape", "hidden_dim"),
    [
        ({"dim": 4096, "multiple_of": 256}, 11008),  # Llama 2 7B
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64}, 28672),  # Llama 2, 3 70B
        ({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),  # Llama 3 8B
        ({"dim": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5}, 8192),  # Llama 3.2 1B
        ({"dim": 3072, "multiple_of": 256, "ffn_dim_multiplier": 1.0, "n_heads": 24}, 8192),  # Llama 3.2 3B
        ({"dim": 16384, "multiple_of": 4096, "ffn_dim_multiplier": 1.2, "n_heads": 128}, 53248),  # Llama 3.1 405B
    ],
)
def test_hidden_size_is_the_published_one(shape, hidden_dim):
    assert ModelArgs(**shape).hidden_dim == hidden_dim


def test_positions_out_of_room_are_refused():
    model = random_model(**SHAPE, max_batch_size=2)
    with pytest.raises(ValueError, match=r"positions 0 to 128: expected 0 to 127"):
        model(torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(ValueError, match="start_pos = 3, but nothing was run"):
        model(torch.zeros(1, 1, dtype=torch.long), 3)
    model.allocate_cache()
    with pytest.raises(ValueError, match="3 rows: the cache was built for max_batch_size = 2"):
        model(torch.zeros(3, 1, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="positions 127 to 128"):
        model(torch.zeros(1, 2, dtype=torch.long), 127)


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="dim = 64, n_heads = 5"):
        ModelArgs(dim=64, n_heads=5)
    with pytest.raises(ValueError, match="vocab_size = -1"):
        Transformer(ModelArgs(dim=64, n_heads=4))
