"""Which of the whole models this process is part of, and what all of them have done. Knows nothing of models."""

import functools
from datetime import timedelta

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch.distributed as dist


def replica() -> int:
    """Which of the whole models that the processes hold this one is part of, from 0."""
    return dist.get_rank() // fairscale_groups.get_model_parallel_world_size()


def n_replicas() -> int:
    return dist.get_world_size() // fairscale_groups.get_model_parallel_world_size()


def gather_from_replicas(part: list) -> list[list]:
    """Every replica's part, on every rank. One that has finished waits for the others without spinning."""
    if n_replicas() == 1:
        return [part]
    parts: list[list] = [[] for _ in range(n_replicas())]
    dist.all_gather_object(parts, part, group=gloo_group())
    return parts


@functools.cache
def gloo_group() -> dist.ProcessGroup:
    """The ranks that hold the same part of each replica's model; of gloo, which sleeps, and waits however long."""
    size, world_size = fairscale_groups.get_model_parallel_world_size(), dist.get_world_size()
    groups = [list(range(i, world_size, size)) for i in range(size)]
    made = [dist.new_group(ranks, backend="gloo", timeout=timedelta(days=365)) for ranks in groups]
    return made[dist.get_rank() % size]
