"""An adapter's directory, as PEFT writes and reads it: adapter_config.json and adapter_model.safetensors.

The rows of B of queries and keys are in Hugging Face's order in the files and in Meta's here. The file's metadata has
digests of the base it was trained on, which PEFT does not look at. Knows nothing of running a model.

Format: huggingface.co/docs/peft/main/en/developer_guides/checkpoint.
"""

import hashlib
import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.huggingface import file_name, has_rotary_rows, rows_in_halves, rows_in_pairs

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# The matrices of a layer, by Meta's names: what an adapter can be added to.
TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")

# What PEFT can do to a model beyond plain LoRA on matrices, each with the value that means "not used".
UNUSED = {"bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "use_qalora": False}
UNUSED |= {"modules_to_save": None, "layer_replication": None, "trainable_token_indices": None}
UNUSED |= {"target_parameters": None, "alora_invocation_tokens": None, "use_bdlora": None}


@dataclass
class Adapter:
    """An adapter as it is in memory, whole: A and B of each matrix it changes, by Meta's name of the matrix.

    Attributes:
        path: where it is from, for messages.
        pairs: name to A [rank, in_features] and B [out_features, rank], rows of queries and keys in Meta's order.
        scales: name to what B A is multiplied with.
        digests: of the base it was trained on: see `base_digests`; empty where PEFT wrote it.
    """

    path: Path
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scales: dict[str, float]
    digests: dict[str, str] = field(default_factory=dict)

    def delta(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor | None:
        """What is added to a matrix, float32; [start, stop) along `dim` of it. None if it stays as it is."""
        if name not in self.pairs:
            return None
        a, b = (part.float() for part in self.pairs[name])
        if dim == 0:
            b = b[start:stop]
        elif dim == 1:
            a = a[:, start:stop]
        return (b @ a) * self.scales[name]

    def check_base(self, checkpoint: Any) -> None:
        """Raises ValueError if this adapter is of another base than the checkpoint: other shapes, or other weights."""
        for name, (a, b) in self.pairs.items():
            expected = checkpoint.shapes.get(name)
            if expected is None or (b.shape[0], a.shape[1]) != tuple(expected):
                found = f"{name} of {[b.shape[0], a.shape[1]]}"
                base = "no such matrix" if expected is None else f"one of {list(expected)}"
                raise ValueError(f"{self.path} is an adapter for another base: it changes {found}, and this has {base}")
        for what, digest in (base_digests(checkpoint) if self.digests else {}).items():
            if digest and self.digests.get(what) and digest != self.digests[what]:
                raise ValueError(
                    f"{self.path} is an adapter for another base: its {what} had the digest "
                    f"{self.digests[what]}, this one's have {digest}; expected the checkpoint it was trained on"
                )


def base_digests(checkpoint: Any) -> dict[str, str]:
    """What tells one base from another: digests of its norms and first embeddings, and of some rows of its matrices.

    Numbers are rounded to bfloat16 first, so that another dtype or format of the same weights has the same digests. A
    quantised checkpoint keeps its norms and embeddings; the digest of its matrices is "".
    """
    layers = [f"layers.{i}." for i in sorted({0, checkpoint.args.n_layers - 1})]
    norms = ["norm.weight", *(f"{layer}{norm}.weight" for layer in layers for norm in ("attention_norm", "ffn_norm"))]
    matrices = [f"{layer}{house}.{m}.weight" for layer in layers for house, m in _MATRICES]
    sums = {"norms": hashlib.sha256(), "matrices": hashlib.sha256()}
    for name in norms:
        sums["norms"].update(_bytes(checkpoint.read(name)))
    first = min(checkpoint.args.head_dim, checkpoint.args.vocab_size)
    sums["norms"].update(_bytes(checkpoint.read("tok_embeddings.weight", 0, 0, first)))
    for name in [] if checkpoint.quantization else matrices:
        sums["matrices"].update(_bytes(checkpoint.read(name, 0, 0, checkpoint.args.head_dim)))
    found = {what: digest.hexdigest()[:16] for what, digest in sums.items()}
    return found | ({"matrices": ""} if checkpoint.quantization else {})


_MATRICES = [("attention", m) for m in ("wq", "wk", "wv", "wo")] + [("feed_forward", m) for m in ("w1", "w2", "w3")]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def read_adapter(path: str | os.PathLike, checkpoint: Any) -> Adapter:
    """Reads an adapter of PEFT's and checks that it is one for this checkpoint.

    Args:
        path: its directory.
        checkpoint: the base, as `open_checkpoint` gives it.

    Raises:
        FileNotFoundError: the directory or a file of it is missing.
        ValueError: it is no LoRA, or does what this package does not (named); it lacks a tensor or has one too many;
            its shapes or digests are another base's.
        ImportError: safetensors is not installed.
    """
    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            what = "does not exist" if not path.exists() else f"has no {name}"
            raise FileNotFoundError(f"adapter {path} {what}: expected a directory with {CONFIG} and {WEIGHTS}")
    config = _read_config(path / CONFIG)
    tensors, metadata = _read_tensors(path / WEIGHTS)
    pairs, scales = {}, {}
    for name in [name for name in checkpoint.shapes if name.split(".")[-2] in TARGETS]:
        module = PREFIX + file_name(name).removesuffix(".weight")
        a, b = tensors.pop(f"{module}.lora_A.weight", None), tensors.pop(f"{module}.lora_B.weight", None)
        if a is None and b is None:
            continue
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"{path / WEIGHTS}: {module} has no lora_A and lora_B that fit each other")
        if has_rotary_rows(name) and b.shape[0] % checkpoint.args.head_dim == 0:
            b = rows_in_pairs(b, checkpoint.args.head_dim)
        pairs[name], scales[name] = (a, b), _scale(config, module.removeprefix(PREFIX), a.shape[0])
    if tensors:
        raise ValueError(
            f"{path / WEIGHTS} has {len(tensors)} tensors that are no adapter of a matrix in the layers of this base, "
            f"such as {min(tensors)}: expected LoRA on {', '.join(TARGETS)} of {checkpoint.args.n_layers} layers"
        )
    if not pairs:
        raise ValueError(f"{path / WEIGHTS} holds no tensors: expected lora_A and lora_B of some matrices")
    adapter = Adapter(path, pairs, scales, json.loads(metadata.get("base", "{}")))
    adapter.check_base(checkpoint)
    return adapter


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): expected PEFT's configuration of a LoRA") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{path}: peft_type is {found!r}: expected 'LORA'")
    for key, unused in UNUSED.items():
        if config.get(key) not in (unused, None, [], {}):
            raise ValueError(f"{path}: {key} is {config[key]!r}: only {unused!r} is supported")
    if not isinstance(config.get("lora_alpha"), (int, float)) or not isinstance(config.get("r"), int):
        raise ValueError(f"{path}: expected numbers as r and lora_alpha")
    return config


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank of one matrix, or alpha / sqrt(rank) with rank-stabilised LoRA (arXiv 2312.03732)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((patterns[end] for end in patterns if module.endswith(end)), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(f"{path} needs the safetensors package: pip install 'llama[hf]'") from None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def write_adapter(
    folder: Path, adapter: Adapter, rank: int, alpha: float, head_dim: int, base: str, task: str = "CAUSAL_LM"
) -> None:
    """Writes an adapter's two files into a directory that is there.

    Args:
        adapter: whole, in Meta's order of rows.
        rank, alpha: of LoRA; the scale is alpha / rank.
        base: the base's directory or name, which PEFT shows.
        task: PEFT's name of it.
    """
    ours = {name.split(".")[-2] for name in adapter.pairs}
    targets = sorted({file_name(f"layers.0.{house}.{m}.weight").split(".")[-2] for house, m in _MATRICES if m in ours})
    config = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "inference_mode": True}
    config |= {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": targets, "bias": "none"}
    config |= {"fan_in_fan_out": False, "use_rslora": False, "init_lora_weights": True, "modules_to_save": None}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for name, (a, b) in adapter.pairs.items():
        module = PREFIX + file_name(name).removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = a.float()
        tensors[f"{module}.lora_B.weight"] = (rows_in_halves(b, head_dim) if has_rotary_rows(name) else b).float()
    _write_safetensors(folder / WEIGHTS, tensors, {"format": "pt", "base": json.dumps(adapter.digests)})


def _write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file of float32 (github.com/huggingface/safetensors): needs no package."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B"))
        file.flush()
        os.fsync(file.fileno())
