"""LoRA adapters: on the matrices of a model, folded into a checkpoint, and in files as PEFT writes them.

Hu et al. 2021, "LoRA" (arXiv 2106.09685). Knows nothing of training, engines or text.
"""

from llama.adapters.files import TARGETS, Adapter, base_digests, read_adapter, write_adapter
from llama.adapters.folded import AdaptedCheckpoint, merge
from llama.adapters.lora import Lora, add_lora, attach, attach_adapter

__all__ = [
    "TARGETS",
    "AdaptedCheckpoint",
    "Adapter",
    "Lora",
    "add_lora",
    "attach",
    "attach_adapter",
    "base_digests",
    "merge",
    "read_adapter",
    "write_adapter",
]
