"""Adds an adapter to a model, gathers it after training, and writes it in PEFT's format."""

import json
import os
from pathlib import Path

import torch

from llama.adapters import MATRICES, TARGETS, Adapter, attach
from llama.adapters.files import CONFIG, PREFIX, WEIGHTS
from llama.checkpoint.huggingface import file_name, has_rotary_rows, rows_in_halves
from llama.checkpoint.meta import COLUMNS, ROWS, full_shapes
from llama.checkpoint.save import gather, whole_parameter
from llama.checkpoint.writer import appear_whole, safetensors_header
from llama.model import Transformer


def add_lora(
    model: Transformer,
    rank: int,
    scale: float,
    targets: tuple[str, ...] = TARGETS,
    generator: torch.Generator | None = None,
) -> None:
    """Freezes a model and adds a float32 adapter to each of its target matrices. At first it changes nothing.

    A is uniform in ±1/sqrt(in_features), as in PEFT; B is zero. Every rank draws all of A and keeps its part, so the
    adapter does not depend on the number of processes.

    Args:
        rank: the rank of B A; at least 1.
        scale: alpha / rank, in LoRA's terms.
        targets: some of TARGETS.
        generator: draws A, on the CPU.
    """
    model.requires_grad_(False)
    shapes = full_shapes(model.args)
    for layer in range(model.args.n_layers):
        for matrix in MATRICES:
            if matrix.rpartition(".")[2] in targets:
                name = f"layers.{layer}.{matrix}.weight"
                rows, columns = shapes[name]
                a = torch.empty(rank, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
                attach(model, name, a, torch.zeros(rows, rank), scale)


def gather_adapter(model: Transformer, digests: dict[str, str]) -> Adapter:
    """The whole adapter of a model, on every rank. All processes call this; `digests` identify its base."""
    shapes, pairs, scales = full_shapes(model.args), {}, {}
    for module_name, module in model.named_modules():
        if (lora := getattr(module, "lora", None)) is None:
            continue
        name, a, b = f"{module_name}.weight", whole_parameter(lora.a), whole_parameter(lora.b)
        rows, columns = shapes[name]
        if lora.split == COLUMNS:
            a = gather(name, a, COLUMNS, columns, model.args, lora.group)
        else:
            b = gather(name, b, ROWS, rows, model.args, lora.group)
        pairs[name], scales[name] = (a.cpu(), b.cpu()), lora.scale
    return Adapter(Path(), pairs, scales, digests)


def write_adapter(out: Path, adapter: Adapter, alpha: float, head_dim: int, base: str) -> None:
    """Writes an adapter's directory in PEFT's format, whole or not at all.

    Args:
        adapter: its matrices all have the same rank.
        alpha: LoRA's alpha; the scale is alpha / rank.
        base: the base's directory or name, which PEFT shows.

    Raises:
        FileExistsError, OSError: as `appear_whole`.
    """
    tensors = {}
    for name, (a, b) in adapter.pairs.items():
        module = PREFIX + file_name(name).removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = a.float().contiguous()
        b = rows_in_halves(b, head_dim) if has_rotary_rows(name) else b
        tensors[f"{module}.lora_B.weight"] = b.float().contiguous()
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    config |= {"r": len(a), "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": targets, "bias": "none"}
    config |= {"fan_in_fan_out": False, "use_rslora": False, "init_lora_weights": True, "modules_to_save": None}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    metadata = {f"base_{what}": digest for what, digest in adapter.digests.items()}
    with appear_whole(out, sum(tensor.nbytes for tensor in tensors.values())) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with (folder / WEIGHTS).open("wb") as file:
            file.write(safetensors_header(shapes, torch.float32, metadata))
            for tensor in tensors.values():
                file.write(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))
            file.flush()
            os.fsync(file.fileno())
