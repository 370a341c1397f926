"""Hugging Face's config.json to `ModelArgs` and back. What a Llama of ours has no part for is refused by its name.

Knows the keys of Transformers 4 and 5; nothing of weights.
"""

import json
from pathlib import Path
from typing import Any

from llama.model import ModelArgs

# What a directory may be, by Transformers' name of its class.
CAUSAL_LM, REWARD_MODEL = "LlamaForCausalLM", "LlamaForSequenceClassification"
KINDS = {CAUSAL_LM: "a language model", REWARD_MODEL: "a reward model, which scores texts and writes none"}

# How Llama 3.1 and later scale their rotary embedding (`model.rotary_frequencies`), but for the factor.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# (dim, hidden size) to what Meta's params.json of that model says; other values would give the same size.
PUBLISHED_FEED_FORWARDS = {
    (2048, 8192): (256, 1.5),
    (3072, 8192): (256, 1.0),
    (4096, 14336): (1024, 1.3),
    (8192, 28672): (4096, 1.3),
    (16384, 53248): (4096, 1.2),
}


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError when there is none in it."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): expected {expected}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected {expected}")
    return content


def feed_forward_params(dim: int, hidden_dim: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` from which `ModelArgs`, and Meta's code, compute this very hidden size."""
    if (dim, hidden_dim) in PUBLISHED_FEED_FORWARDS:
        return PUBLISHED_FEED_FORWARDS[dim, hidden_dim]
    multiple_of = min(256, hidden_dim & -hidden_dim)  # the largest power of two in it
    middle = (hidden_dim + 1 - multiple_of / 2) / int(2 * (4 * dim) / 3)  # of the multipliers that round to it
    for multiplier in (None, *(round(middle, digits) for digits in range(1, 17)), middle):
        args = ModelArgs(dim=dim, n_heads=1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
        if args.hidden_dim == hidden_dim:
            return multiple_of, multiplier
    raise ValueError(f"no ffn_dim_multiplier gives a hidden size of {hidden_dim} with dim = {dim}")


def model_args(
    config: dict[str, Any],
    ckpt_dir: Path,
    vocab_size: int,
    max_seq_len: int,
    max_batch_size: int,
    architecture: str = CAUSAL_LM,
) -> ModelArgs:
    """The shape of a model from its config.json, of Transformers 4 or 5.

    Args:
        config: the contents of the file.
        ckpt_dir: where it is from, for messages.
        vocab_size: the tokenizer's.
        max_seq_len, max_batch_size: what the cache will have room for; not in the file.
        architecture: what the model must be: CAUSAL_LM or REWARD_MODEL.

    Raises:
        ValueError: the model is not a Llama, or another kind of one, or has parts that this package does not have; a
            value is missing or of the wrong kind; the vocabulary is another than the tokenizer's.
    """
    path = ckpt_dir / "config.json"
    _require(path, "model_type", "llama", config.get("model_type"))
    architectures = config.get("architectures") or [architecture]
    if architectures in ([CAUSAL_LM], [REWARD_MODEL]) and architectures != [architecture]:
        found, use = (KINDS[kind] for kind in (architectures[0], architecture))
        raise ValueError(f"{path.parent} is {found} ({architectures[0]}): expected {use} ({architecture})")
    _require(path, "architectures", [architecture], architectures)
    _require(path, "quantization_config", None, config.get("quantization_config"))
    _require(path, "hidden_act", "silu", config.get("hidden_act", "silu"))
    for key in ("attention_bias", "mlp_bias"):
        _require(path, key, False, config.get(key) or False)
    dim, n_heads = _number(path, config, "hidden_size"), _number(path, config, "num_attention_heads")
    _require(path, "head_dim", dim // n_heads, config.get("head_dim") or dim // n_heads)
    if _number(path, config, "vocab_size") != vocab_size:
        raise ValueError(
            f"{path} says vocab_size {config['vocab_size']}, but the tokenizer has {vocab_size} tokens: "
            "expected the tokenizer.json or tokenizer.model that came with this checkpoint"
        )
    multiple_of, ffn_dim_multiplier = feed_forward_params(dim, _number(path, config, "intermediate_size"))
    args = {
        "dim": dim,
        "n_layers": _number(path, config, "num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": _number(path, config, "num_key_value_heads", default=n_heads),
        "vocab_size": vocab_size,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": ffn_dim_multiplier,
        "norm_eps": _number(path, config, "rms_norm_eps", float, default=1e-6),  # Transformers' default
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        **_rotary_args(path, config),
    }
    try:
        return ModelArgs(max_seq_len=max_seq_len, max_batch_size=max_batch_size, **args)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _rotary_args(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ModelArgs` on the rotary embedding, from where Transformers 4 or 5 keeps them."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling is {rope!r}: expected an object, or null")
    args = {"rope_theta": _number(path, {**config, **rope}, "rope_theta", float, default=10000.0)}
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    _require(path, "partial_rotary_factor", 1, 1 if partial is None else partial)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return args
    _require(path, "the rope_type of the rotary embedding", "llama3", rope_type)
    for key, expected in LLAMA3_SCALING.items():
        _require(path, key, expected, rope.get(key))
    return args | {"use_scaled_rope": True, "rope_scale_factor": _number(path, rope, "factor", float)}


def _number(path: Path, config: dict[str, Any], key: str, kind: type = int, default: float | None = None) -> Any:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, (kind, int)) or not 0 < value < float("inf"):
        found = "is missing" if value is None else f"is {value!r}"
        raise ValueError(f"{path}: {key} {found}: expected a positive {'integer' if kind is int else 'number'}")
    return kind(value)


def _require(path: Path, key: str, supported: object, found: object) -> None:
    if found != supported:
        raise ValueError(f"{path}: {key} is {found!r}: only {supported!r} is supported")


def config_json(args: ModelArgs, bos_id: int, eos_id: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model, with those keys that Transformers 4 and 5 both read.

    Meta's files do not say how long a text the model was trained on: max_position_embeddings is what was published for
    the generation that the rotary embedding gives away (Llama 2: 4,096; 3: 8,192; 3.1 and later: 131,072).
    """
    scaling = None
    if args.use_scaled_rope:
        scaling = {"rope_type": "llama3", "factor": args.rope_scale_factor} | LLAMA3_SCALING
    return {
        "architectures": [CAUSAL_LM],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": 131072 if scaling else 4096 if args.rope_theta == 10000 else 8192,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": args.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }


def params_json(args: ModelArgs) -> dict[str, Any]:
    """Meta's params.json of a model, with no key that Meta's code of its generation trips over."""
    params = {"dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads, "n_kv_heads": args.n_kv_heads}
    params |= {"vocab_size": args.vocab_size, "multiple_of": args.multiple_of}
    if args.ffn_dim_multiplier is not None:
        params["ffn_dim_multiplier"] = args.ffn_dim_multiplier
    params["norm_eps"] = args.norm_eps
    if args.rope_theta != 10000:  # Llama 2's, whose code does not know the key
        params["rope_theta"] = args.rope_theta
    if args.use_scaled_rope:
        params["use_scaled_rope"] = True
        params["rope_scale_factor"] = args.rope_scale_factor  # a key of our own
    return params
