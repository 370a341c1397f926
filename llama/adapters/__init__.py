"""LoRA adapters of a model: read from PEFT's directories, folded into its weights or computed beside them.

Hu et al. 2021, "LoRA" (arXiv 2106.09685). Lies below the engine, so that `Llama.build` can load an adapter. Knows
nothing of engines, of text, or of how an adapter learns.
"""

from llama.adapters.files import MATRICES, TARGETS, Adapter, base_digests, read_adapter
from llama.adapters.lora import Lora, attach, build_adapted, merge

__all__ = [
    "MATRICES",
    "TARGETS",
    "Adapter",
    "Lora",
    "attach",
    "base_digests",
    "build_adapted",
    "merge",
    "read_adapter",
]
