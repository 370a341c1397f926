"""The ranks of a run: their process groups, their devices, their replicas, and how they fail together.

Knows nothing of Llama, or of what the ranks compute.
"""

from llama.parallel.devices import dtype_by_name, pick_device, pick_dtype
from llama.parallel.failing import RankFailed, fail_at_once, fail_together, raise_if_a_rank_failed
from llama.parallel.groups import gather_from_replicas, initialize, n_replicas, partition, replica, silence_other_ranks

__all__ = [
    "RankFailed",
    "dtype_by_name",
    "fail_at_once",
    "fail_together",
    "gather_from_replicas",
    "initialize",
    "n_replicas",
    "partition",
    "pick_device",
    "pick_dtype",
    "raise_if_a_rank_failed",
    "replica",
    "silence_other_ranks",
]
