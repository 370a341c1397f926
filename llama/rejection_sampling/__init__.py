"""Rejection sampling: draws n answers to a prompt, scores each, keeps the best.

`rejection_sample` does it in memory, `sample_files` and `rescore_files` from file to file. Knows nothing of how rows
are read, how records are written, or how an answer is decoded.
"""

from llama.rejection_sampling.draw import Plan, rejection_sample
from llama.rejection_sampling.files import rescore_files, sample_files
from llama.rejection_sampling.reward_model import RewardModel
from llama.rejection_sampling.scorers import Judge, Logprob, Reward, Scorer

__all__ = [
    "Judge",
    "Logprob",
    "Plan",
    "Reward",
    "RewardModel",
    "Scorer",
    "rejection_sample",
    "rescore_files",
    "sample_files",
]
