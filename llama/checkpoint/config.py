"""params.json and config.json to `ModelArgs` and back: the shape of a model in Meta's keys and in Hugging Face's.

Checks every number against limits before a loop or an allocation depends on it, and refuses by name what this package
does not have. Knows the keys of Meta's files and of Transformers 4 and 5; nothing of weights.
"""

import json
import reprlib
from pathlib import Path
from typing import Any

from llama.model import ModelArgs

# The kinds of model, by Transformers' names of their classes.
CAUSAL_LM, REWARD_MODEL = "LlamaForCausalLM", "LlamaForSequenceClassification"
KINDS = {CAUSAL_LM: "a language model", REWARD_MODEL: "a reward model, which scores texts and writes none"}

# Limits for a file's numbers, far beyond any published model. A size is a width, or a number of heads or of tokens.
MAX_LAYERS, MAX_SIZE = 10_000, 1 << 20
# Between these, the angles of the rotary embedding are finite in float32.
LEAST_FLOAT, MOST_FLOAT = 1e-12, 1e16
MAX_JSON_BYTES = 16 << 20  # the index of a model of 100,000 tensors fits

# The fields of ModelArgs that params.json has, under the same names; and those of config.json, with their keys there.
PARAMS = dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of"), int)
PARAMS |= dict.fromkeys(("ffn_dim_multiplier", "norm_eps", "rope_theta", "rope_scale_factor"), float)
PARAMS |= dict.fromkeys(("use_scaled_rope", "tied_embeddings"), bool)
CONFIG = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
REQUIRED = ("dim", "n_layers", "n_heads")

# Keys of config.json that must have these values, if they are there.
SUPPORTED = {"quantization_config": None, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

# How Llama 3.1 and later scale their rotary embedding (`model.rotary_frequencies`), apart from the factor.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# (dim, hidden size) to `multiple_of` and `ffn_dim_multiplier` as in Meta's params.json of that model. Other values give
# the same size too.
PUBLISHED_FEED_FORWARDS = {
    (2048, 8192): (256, 1.5),
    (3072, 8192): (256, 1.0),
    (4096, 14336): (1024, 1.3),
    (8192, 28672): (4096, 1.3),
    (16384, 53248): (4096, 1.2),
}


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if it holds anything else; the message says what was expected."""
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"{size:,} bytes are too many")
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): expected {expected}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected {expected}")
    return content


def args_from_params(
    params: dict[str, Any], ckpt_dir: Path, vocab_size: int, max_seq_len: int, max_batch_size: int
) -> ModelArgs:
    """The shape of a model from the contents of Meta's params.json.

    `vocab_size` is the tokenizer's; Llama 2's files do not have it. max_seq_len and max_batch_size set the size of the
    cache. Raises ValueError if a key is missing, of the wrong type or out of range, or if the vocabulary is not the
    tokenizer's.
    """
    path = ckpt_dir / "params.json"
    args = _fields(path, params, {name: name for name in PARAMS})
    if params.get("vocab_size") not in (None, -1):
        _check_vocabulary(path, params, vocab_size)
    # Llama 3.2 1B and 3B scale by 32, not by 8. Their params.json does not say so, but their shapes tell.
    if "rope_scale_factor" not in args and (args["dim"], args["n_layers"]) in {(2048, 16), (3072, 28)}:
        args["rope_scale_factor"] = 32.0
    return _model_args(path, args, vocab_size, max_seq_len, max_batch_size)


def args_from_config(
    config: dict[str, Any],
    ckpt_dir: Path,
    vocab_size: int,
    max_seq_len: int,
    max_batch_size: int,
    architecture: str = CAUSAL_LM,
) -> ModelArgs:
    """The shape of a model from Hugging Face's config.json, of Transformers 4 or 5.

    Arguments and errors as in `args_from_params`. Raises ValueError also if the model is not a Llama, has parts that
    this package does not have, or is not of this `architecture` (CAUSAL_LM or REWARD_MODEL).
    """
    path = ckpt_dir / "config.json"
    _require(path, "model_type", "llama", config.get("model_type"))
    architectures = config.get("architectures") or [architecture]
    if architectures in ([CAUSAL_LM], [REWARD_MODEL]) and architectures != [architecture]:
        found, use = (KINDS[kind] for kind in (architectures[0], architecture))
        raise ValueError(f"{path.parent} is {found} ({architectures[0]}): expected {use} ({architecture})")
    _require(path, "architectures", [architecture], architectures)
    for key, supported in SUPPORTED.items():
        _require(path, key, supported, supported if config.get(key) is None else config[key])
    args = {"norm_eps": 1e-6} | _fields(path, config, CONFIG) | _rotary_args(path, config)  # 1e-6 is their default
    head_dim = args["dim"] // args["n_heads"]
    _require(path, "head_dim", head_dim, config.get("head_dim") or head_dim)
    _check_vocabulary(path, config, vocab_size)
    hidden_dim = _value(path, config, "intermediate_size")
    args["multiple_of"], args["ffn_dim_multiplier"] = feed_forward_params(args["dim"], hidden_dim)
    return _model_args(path, args, vocab_size, max_seq_len, max_batch_size)


def _rotary_args(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The rotary fields of `ModelArgs`. Transformers 4 and 5 keep them under different keys."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling is {reprlib.repr(rope)}: expected an object, or null")
    args = {"rope_theta": _value(path, {**config, **rope}, "rope_theta", float, default=10000.0)}
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    _require(path, "partial_rotary_factor", 1, 1 if partial is None else partial)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return args
    _require(path, "the rope_type of the rotary embedding", "llama3", rope_type)
    for key, expected in LLAMA3_SCALING.items():
        _require(path, key, expected, rope.get(key))
    return args | {"use_scaled_rope": True, "rope_scale_factor": _value(path, rope, "factor", float)}


def context_length(config: dict[str, Any], ckpt_dir: Path) -> int:
    """The context length in a config.json, tokens; 4,096 if it has none."""
    return _value(ckpt_dir / "config.json", config, "max_position_embeddings", default=4096)


def feed_forward_params(dim: int, hidden_dim: int) -> tuple[int, float | None]:
    """The `multiple_of` and `ffn_dim_multiplier` from which `ModelArgs` and Meta's code compute this hidden size.

    Raises ValueError if no values do.
    """
    if (dim, hidden_dim) in PUBLISHED_FEED_FORWARDS:
        return PUBLISHED_FEED_FORWARDS[dim, hidden_dim]
    multiple_of = min(256, hidden_dim & -hidden_dim)  # the largest power of two in it
    # The middle of the multipliers that round to this size.
    middle = (hidden_dim + 1 - multiple_of / 2) / int(2 * (4 * dim) / 3)
    for multiplier in (None, *(round(middle, digits) for digits in range(1, 17)), middle):
        args = ModelArgs(dim=dim, n_heads=1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
        if args.hidden_dim == hidden_dim:
            return multiple_of, multiplier
    raise ValueError(f"no ffn_dim_multiplier gives a hidden size of {hidden_dim} with dim = {dim}")


def _fields(path: Path, content: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """The fields of `ModelArgs` that a file has; `keys` are their names there."""
    present = {name: key for name, key in keys.items() if name in REQUIRED or content.get(key) is not None}
    return {name: _value(path, content, key, PARAMS[name]) for name, key in present.items()}


def _value(path: Path, content: dict[str, Any], key: str, kind: type = int, default: Any = None) -> Any:
    """The checked value of a key: a bool, or a number within the limits. null counts as missing."""
    value = default if content.get(key) is None else content[key]
    if kind is bool:
        is_right, expected = isinstance(value, bool), "true or false"
    else:
        most = MAX_LAYERS if key.endswith("layers") else MAX_SIZE
        least, most = (LEAST_FLOAT, MOST_FLOAT) if kind is float else (1, most)
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        is_right = is_number and least <= value <= most
        expected = f"a positive {'number' if kind is float else 'integer'}, from {least} to {most}"
    if not is_right:
        found = "is missing" if value is None else f"is {reprlib.repr(value)}"
        raise ValueError(f"{path}: {key} {found}: expected {expected}")
    return kind(value)


def _require(path: Path, key: str, supported: object, found: object) -> None:
    if found != supported:
        raise ValueError(f"{path}: {key} is {reprlib.repr(found)}: only {supported!r} is supported")


def _check_vocabulary(path: Path, content: dict[str, Any], vocab_size: int) -> None:
    if (found := _value(path, content, "vocab_size")) != vocab_size:
        raise ValueError(
            f"{path} says vocab_size {found}, but the tokenizer has {vocab_size} tokens: "
            "expected the tokenizer file that came with this checkpoint"
        )


def _model_args(path: Path, args: dict[str, Any], vocab_size: int, max_seq_len: int, max_batch_size: int) -> ModelArgs:
    try:
        made = ModelArgs(**args, vocab_size=vocab_size, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if made.head_dim % 2 or made.hidden_dim < 1:
        raise ValueError(
            f"{path}: head_dim = {made.head_dim}, hidden size {made.hidden_dim}: expected an even head_dim (the rotary "
            "embedding turns pairs), and a hidden size of at least 1"
        )
    return made


def config_json(args: ModelArgs, bos_id: int, eos_id: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model, in keys that Transformers 4 and 5 both read.

    Meta's files do not have the context length. max_position_embeddings is the published one of the Llama generation,
    which the rotary embedding tells (Llama 2: 4,096; 3: 8,192; 3.1 and later: 131,072).
    """
    scaling = None
    if args.use_scaled_rope:
        scaling = {"rope_type": "llama3", "factor": args.rope_scale_factor} | LLAMA3_SCALING
    return {key: getattr(args, name) for name, key in CONFIG.items()} | {
        "architectures": [CAUSAL_LM],
        "model_type": "llama",
        "intermediate_size": args.hidden_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": 131072 if scaling else 4096 if args.rope_theta == 10000 else 8192,
        "hidden_act": "silu",
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }


def params_json(args: ModelArgs) -> dict[str, Any]:
    """Meta's params.json of a model, without keys that Meta's code for that generation of Llama rejects."""
    names = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps"]
    if args.ffn_dim_multiplier is not None:
        names.append("ffn_dim_multiplier")
    if args.rope_theta != 10000:  # 10,000 is Llama 2's, whose code does not know the key
        names.append("rope_theta")
    if args.use_scaled_rope:
        names += ["use_scaled_rope", "rope_scale_factor"]  # Meta's files do not have the second
    return {name: getattr(args, name) for name in names}
