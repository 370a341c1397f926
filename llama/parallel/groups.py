"""The process groups: the ranks that a model is split over, the part of a dimension that each holds, and the replicas.

If the caller has made groups, they are used. Knows nothing of Llama or of what the ranks compute.
"""

import atexit
import contextlib
import functools
import io
import os
import sys
from datetime import timedelta

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist

from llama.parallel import failing
from llama.parallel.devices import pick_device

# The model-parallel size of the groups that `initialize` made; None if it made none.
_own_model_parallel_size: int | None = None


def initialize(model_parallel_size: int | None = None, device: torch.device | None = None) -> None:
    """Makes the process groups that the model-parallel layers need, unless they exist.

    Under torchrun the world is torchrun's. In a plain `python` or a notebook it is one process, whose group needs no
    port. Groups that the caller has made, in `torch.distributed` or in fairscale, are used.

    A model is split over model_parallel_size processes; None means all. If the size is smaller than the world, each
    group of so many consecutive ranks holds a whole model (a replica). The backend of a group made here is NCCL for a
    CUDA `device`, else gloo. Raises ValueError if the size does not divide the number of processes, or contradicts the
    caller's groups.
    """
    global _own_model_parallel_size
    device = device or pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL works on the current device of the process
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ and "RANK" in os.environ:  # torchrun's rendezvous
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_destroy_groups)
    world_size = dist.get_world_size()
    if world_size > 1:
        failing.connect()
    has_groups = fairscale_groups.model_parallel_is_initialized()
    current = fairscale_groups.get_model_parallel_world_size() if has_groups else None
    if model_parallel_size is None:
        model_parallel_size = world_size if current is None or current == _own_model_parallel_size else current
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
    if world_size == 1 and "RANK" not in os.environ and model_parallel_size in range(2, 1 << 20):
        folder, name = os.path.split(sys.argv[0])
        script = "-m llama" if os.path.basename(folder) == "llama" else name if os.path.isfile(name) else "SCRIPT.py"
        raise ValueError(
            f"model_parallel_size={model_parallel_size} in a run of one process: a model is split over processes, and "
            f"torchrun starts them: `torchrun --nproc_per_node {model_parallel_size} {script} …` (turn a notebook into "
            "a script first)"
        )
    if model_parallel_size not in sizes:
        raise ValueError(
            f"model_parallel_size={model_parallel_size} does not divide the {world_size} process(es) of this run: "
            f"expected one of {sizes} (torchrun --nproc_per_node sets the number of processes)"
        )
    if current == model_parallel_size:
        return
    if current is not None:
        if current != _own_model_parallel_size:
            found = f"the caller has initialised fairscale's groups with {current}"
            raise ValueError(f"model_parallel_size={model_parallel_size}, but {found}: pass {current}, or None")
        # Layers remember the group they were built with, so models already built keep working.
        fairscale_groups.destroy_model_parallel()
        _gloo_group.cache_clear()
    with contextlib.redirect_stdout(io.StringIO()):  # fairscale announces its groups in three lines
        fairscale_groups.initialize_model_parallel(model_parallel_size)
    _own_model_parallel_size = model_parallel_size


def _destroy_groups() -> None:
    """At exit: ends the groups' threads. If they outlive the interpreter, they sometimes abort the process."""
    if dist.is_initialized() and getattr(sys, "last_value", None) is None:
        dist.destroy_process_group()


def silence_other_ranks() -> None:
    """Discards stdout of every rank but 0, so that a script's `print` appears once.

    The example scripts, Meta's and ours, rely on it. stderr is unchanged, so that every error is seen.
    """
    if dist.get_rank() > 0 and getattr(sys.stdout, "name", None) != os.devnull:
        sys.stdout = open(os.devnull, "w")


def partition(size: int, rank: int, n_ranks: int) -> tuple[int, int]:
    """The part [start, stop) of a dimension that a rank holds. If n_ranks does not divide it, some hold one more."""
    return rank * size // n_ranks, (rank + 1) * size // n_ranks


def replica() -> int:
    """The index of the replica that this process belongs to, from 0."""
    return dist.get_rank() // fairscale_groups.get_model_parallel_world_size()


def n_replicas() -> int:
    return dist.get_world_size() // fairscale_groups.get_model_parallel_world_size()


def gather_from_replicas(part: list) -> list[list]:
    """Every replica's part, on every rank. A replica that comes early sleeps until the others have come."""
    if n_replicas() == 1:
        return [part]
    parts: list[list] = [[] for _ in range(n_replicas())]
    dist.all_gather_object(parts, part, group=_gloo_group())
    return parts


@functools.cache
def _gloo_group() -> dist.ProcessGroup:
    """The ranks that hold the same part of each replica's model. Over gloo, because a rank that waits there sleeps."""
    size, world_size = fairscale_groups.get_model_parallel_world_size(), dist.get_world_size()
    groups = [list(range(i, world_size, size)) for i in range(size)]
    made = [dist.new_group(ranks, backend="gloo", timeout=timedelta(days=365)) for ranks in groups]
    return made[dist.get_rank() % size]
