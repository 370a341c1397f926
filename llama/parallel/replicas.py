"""Which replica of the model this process is part of, and the results of all replicas. Knows nothing of models."""

import functools
from datetime import timedelta

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch.distributed as dist


def replica() -> int:
    """Which replica this process is part of, from 0."""
    return dist.get_rank() // fairscale_groups.get_model_parallel_world_size()


def n_replicas() -> int:
    return dist.get_world_size() // fairscale_groups.get_model_parallel_world_size()


def gather_from_replicas(part: list) -> list[list]:
    """Every replica's part, on every rank. A replica that has finished sleeps until the others have."""
    if n_replicas() == 1:
        return [part]
    parts: list[list] = [[] for _ in range(n_replicas())]
    dist.all_gather_object(parts, part, group=gloo_group())
    return parts


@functools.cache
def gloo_group() -> dist.ProcessGroup:
    """The ranks that hold the same part of each replica's model, over gloo, which sleeps while it waits, for ever."""
    size, world_size = fairscale_groups.get_model_parallel_world_size(), dist.get_world_size()
    groups = [list(range(i, world_size, size)) for i in range(size)]
    made = [dist.new_group(ranks, backend="gloo", timeout=timedelta(days=365)) for ranks in groups]
    return made[dist.get_rank() % size]
