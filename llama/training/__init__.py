"""Training: supervised fine-tuning, adapters and reward models, from a data file to a checkpoint.

Knows nothing of command lines, servers or sampling.
"""

from llama.training.options import Options
from llama.training.sft import finetune
from llama.training.trainer import Diverged

__all__ = ["Diverged", "Options", "finetune"]
