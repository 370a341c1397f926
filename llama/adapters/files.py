"""An adapter's directory, as PEFT writes and reads it: adapter_config.json and adapter_model.safetensors.

For queries and keys, the rows of B are in Hugging Face's order in the files, and in Meta's in memory. The files of
`llama finetune` also have digests of the base, which PEFT ignores. Knows nothing of running a model.

Format: huggingface.co/docs/peft/main/en/developer_guides/checkpoint.
"""

import hashlib
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import Checkpoint
from llama.checkpoint.config import read_json
from llama.checkpoint.huggingface import file_name, has_rotary_rows, open_safetensors, rows_in_pairs
from llama.checkpoint.meta import ROWS, require_directory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# The matrices of a layer that an adapter can change, by Meta's names.
MATRICES = tuple(f"attention.{name}" for name in ("wq", "wk", "wv", "wo"))
MATRICES += tuple(f"feed_forward.{name}" for name in ("w1", "w2", "w3"))
TARGETS = tuple(name.rpartition(".")[2] for name in MATRICES)

# The options of PEFT beyond plain LoRA on matrices, each with the value that means "not used".
UNUSED = {"bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "use_qalora": False}
UNUSED |= {"modules_to_save": None, "layer_replication": None, "trainable_token_indices": None}
UNUSED |= {"target_parameters": None, "alora_invocation_tokens": None, "use_bdlora": None}
UNUSED |= {"arrow_config": None, "kasa_config": None, "monteclora_config": None}
# Initialisations that do not change the base. With others (PiSSA, OLoRA, CorDA, LoftQ) PEFT changes the base's weights
# whenever it loads the adapter.
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass
class Adapter:
    """An adapter in memory.

    Attributes:
        path: its directory, for messages.
        pairs: A [rank, in_features] and B [out_features, rank] of each matrix that it changes, by Meta's name; the rows
            of queries and keys are in Meta's order.
        scales: the factor of B A, by the same names.
        digests: of the base it was trained on (`base_digests`); empty if PEFT wrote it.
    """

    path: Path
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scales: dict[str, float]
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The adapter's fingerprint, 16 hexadecimal digits."""
        content = hashlib.sha256(repr(sorted(self.scales.items())).encode())
        for _, pair in sorted(self.pairs.items()):
            for part in pair:
                content.update(part.float().contiguous().numpy().tobytes())
        return content.hexdigest()[:16]

    def check_base(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError if the adapter is for another base than the checkpoint: other shapes or other weights."""
        for name, (a, b) in self.pairs.items():
            if (found := [b.shape[0], a.shape[1]]) != (expected := list(checkpoint.shapes[name])):
                raise ValueError(
                    f"{self.path} is an adapter for another base: it changes {name} of {found}, and this has one of "
                    f"{expected}"
                )
        for what, digest in (base_digests(checkpoint) if self.digests else {}).items():
            if digest and self.digests.get(what) and digest != self.digests[what]:
                raise ValueError(
                    f"{self.path} is an adapter for another base: its {what} had the digest "
                    f"{self.digests[what][:16]}, this one's have {digest}; expected the checkpoint it was trained on"
                )


def base_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """The fingerprint of a base: digests of its norms and first embeddings, and of some rows of its matrices.

    Numbers are rounded to bfloat16 first, so that the same weights in another dtype or format have the same digests. A
    quantised checkpoint keeps its source's norms and embeddings; the digest of its matrices is "".
    """
    args = checkpoint.args
    layers = [f"layers.{i}." for i in sorted({0, args.n_layers - 1})]
    norms = ["norm.weight", *(f"{layer}{norm}.weight" for layer in layers for norm in ("attention_norm", "ffn_norm"))]
    matrices = [] if checkpoint.quantization else [f"{layer}{name}.weight" for layer in layers for name in MATRICES]
    whole = [checkpoint.read(name) for name in norms]
    whole.append(checkpoint.read("tok_embeddings.weight", ROWS, 0, min(args.head_dim, args.vocab_size)))
    first_rows = [checkpoint.read(name, ROWS, 0, args.head_dim) for name in matrices]
    return {"norms": _digest(whole), "matrices": _digest(first_rows) if matrices else ""}


def _digest(tensors: list[torch.Tensor]) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]


def read_adapter(path: str | os.PathLike, checkpoint: Checkpoint) -> Adapter:
    """Reads PEFT's directory of an adapter, and checks that the adapter is for this checkpoint.

    Args:
        path: the directory.
        checkpoint: the base, as `open_checkpoint` returns it.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: it is no LoRA, or uses an option that this package does not support; a tensor is missing or
            unexpected; its shapes or digests are another base's.
        ImportError: safetensors is not installed.
    """
    path = Path(path)
    require_directory("adapter", path, f"{CONFIG} and {WEIGHTS}")
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"adapter {path} has no {name}: expected a directory with {CONFIG} and {WEIGHTS}")
    config = _read_config(path / CONFIG)
    with open_safetensors(path / WEIGHTS) as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    pairs, scales = {}, {}
    for name in [name for name in checkpoint.shapes if name.split(".")[-2] in TARGETS]:
        module = file_name(name).removesuffix(".weight")
        a, b = (tensors.pop(f"{PREFIX}{module}.lora_{part}.weight", None) for part in "AB")
        if a is None and b is None:
            continue
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not len(a):
            raise ValueError(f"{path / WEIGHTS}: {module} has no lora_A and lora_B that fit each other")
        if has_rotary_rows(name) and b.shape[0] % checkpoint.args.head_dim == 0:
            b = rows_in_pairs(b, checkpoint.args.head_dim)
        pairs[name], scales[name] = (a, b), _scale(config, module, len(a))
    if tensors or not pairs:
        found = f"{len(tensors)} unexpected tensors, such as {min(tensors)[:100]}" if tensors else "no tensors"
        raise ValueError(
            f"{path / WEIGHTS} has {found}: expected lora_A and lora_B of some of {', '.join(TARGETS)} in the "
            f"{checkpoint.args.n_layers} layers of the base"
        )
    digests = {what: metadata[f"base_{what}"] for what in ("norms", "matrices") if f"base_{what}" in metadata}
    adapter = Adapter(path, pairs, scales, digests)
    adapter.check_base(checkpoint)
    return adapter


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, "PEFT's configuration of a LoRA")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}: expected 'LORA'")
    for key, unused in UNUSED.items():
        if config.get(key) not in (unused, None, [], {}):
            raise ValueError(f"{path}: {key} is {config[key]!r}: only {unused!r} is supported")
    if (init := config.get("init_lora_weights")) not in PLAIN_INITS:
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which changes the base's own weights: expected an adapter "
            "that PEFT has converted to a plain one (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    patterns = config.get("alpha_pattern") or {}
    alphas = [config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas):
        raise ValueError(f"{path}: lora_alpha is {alphas[0]!r}, alpha_pattern {patterns!r}: expected finite numbers")
    if special := [key for key in patterns if not re.fullmatch(r"[\w.]+", key)]:
        raise ValueError(f"{path}: alpha_pattern has {special[0]!r}: only names of modules are supported, no patterns")
    return config


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank of one matrix, or alpha / sqrt(rank) with rank-stabilised LoRA (arXiv 2312.03732)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for end, a in patterns.items() if f".{module}".endswith(f".{end}")), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
