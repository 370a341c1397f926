"""Directories to tensors and back: Meta's, Hugging Face's and quantised ones.

Knows the files' formats and how a model is split over ranks. Knows nothing of decoding, and the engine knows nothing of
this house. `llama.checkpoint.convert` writes directories, `llama.checkpoint.inspect` describes and verifies them.
"""

from llama.checkpoint.open import Checkpoint, build_model, open_checkpoint
from llama.checkpoint.save import save_checkpoint

__all__ = ["Checkpoint", "build_model", "open_checkpoint", "save_checkpoint"]
