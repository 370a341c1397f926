"""Where the model runs: process groups, device and dtype, and the model-parallel layers.

Knows nothing of Llama: it splits matrices over ranks and adds the pieces up again. The weights and their partitioning
are fairscale's; the forward pass is our own while no gradient is wanted, because fairscale's reduce cannot be compiled.
"""

import atexit
import contextlib
import functools
import io
import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from torch import nn

from llama.lifeline import FAILED, LOST_PEER, Hub, Lifeline
from llama.products import Layout

# The model-parallel size of the groups that `initialize` made; None while there are none, or they are the caller's.
_own_model_parallel_size: int | None = None

# What tells this process that another of its run has failed; None in a run of one process.
_lifeline: Lifeline | None = None
_meeting = 0  # how many times `fail_together` was entered: the same on each rank


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device this rank computes on: the one asked for, else CUDA, else MPS, else the CPU.

    A bare "cuda" becomes the card of this process's LOCAL_RANK, as torchrun sets it.

    Raises:
        ValueError: the device named does not exist here.
    """
    if device is None:
        if torch.cuda.is_available():
            device = "cuda"
        else:
            device = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device {device!r} is not known to PyTorch: expected 'cpu', 'cuda', 'cuda:N' or 'mps'"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {str(device)!r} was asked for, but PyTorch finds no CUDA device here")
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"this process wants CUDA device {index}, but there are {torch.cuda.device_count()}: "
                "start at most one process per card, or pass device='cpu'"
            )
        device = torch.device("cuda", index)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' was asked for, but PyTorch finds no Apple GPU here")
    return device


def pick_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype nearest to `dtype` (the checkpoint's) that `device` computes in."""
    if (
        dtype == torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return torch.float16
    if dtype == torch.float64 and device.type == "mps":
        return torch.float32
    return dtype


def initialize(model_parallel_size: int | None = None, device: torch.device | None = None) -> None:
    """Makes the process groups that the model-parallel layers need, as far as they are not there yet.

    Under torchrun the world is torchrun's; in a plain `python` or a notebook it is one process, whose group needs
    no port. Groups that the caller has made, in `torch.distributed` or in fairscale, are used as they are.

    Args:
        model_parallel_size: over how many processes a model is split; the world size when None. Where it is smaller,
            each run of that many consecutive ranks holds a whole model (a replica).
        device: decides the backend of a group made here: NCCL for CUDA, else gloo.

    Raises:
        ValueError: the size does not divide the number of processes, or contradicts the caller's groups.
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
    if world_size > 1 and _lifeline is None:
        _connect_lifeline()
    current = None
    if fairscale_groups.model_parallel_is_initialized():
        current = fairscale_groups.get_model_parallel_world_size()
    if model_parallel_size is None:
        model_parallel_size = world_size if current is None or current == _own_model_parallel_size else current
    if model_parallel_size < 1 or world_size % model_parallel_size != 0:
        sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"model_parallel_size={model_parallel_size} does not divide the {world_size} process(es) of this run: "
            f"expected one of {sizes} (torchrun --nproc_per_node sets the number of processes)"
        )
    if current == model_parallel_size:
        return
    if current is not None:
        if current != _own_model_parallel_size:
            raise ValueError(
                f"model_parallel_size={model_parallel_size}, but the caller has initialised "
                f"fairscale's groups with {current}: pass {current}, or None"
            )
        # Layers remember the group they were built with, so models already built keep working.
        fairscale_groups.destroy_model_parallel()
        _replica_group.cache_clear()
    with contextlib.redirect_stdout(io.StringIO()):  # fairscale announces its groups in three lines
        fairscale_groups.initialize_model_parallel(model_parallel_size)
    _own_model_parallel_size = model_parallel_size


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
    dist.all_gather_object(parts, part, group=_replica_group())
    return parts


@functools.cache
def _replica_group() -> dist.ProcessGroup:
    """The ranks that hold the same part of each replica's model; of gloo, which sleeps, and waits however long."""
    size, world_size = fairscale_groups.get_model_parallel_world_size(), dist.get_world_size()
    groups = [list(range(i, world_size, size)) for i in range(size)]
    made = [dist.new_group(ranks, backend="gloo", timeout=timedelta(days=365)) for ranks in groups]
    return made[dist.get_rank() % size]


def _destroy_groups() -> None:
    """At exit: ends the groups' threads, which abort the process now and then if they outlive the interpreter."""
    if dist.is_initialized() and getattr(sys, "last_value", None) is None:
        dist.destroy_process_group()


def silence_other_ranks() -> None:
    """Sends stdout of every rank but 0 to nowhere, so that a script's `print` appears once.

    The example scripts, Meta's and ours, rely on it. stderr, and with it every error, stays.
    """
    if dist.get_rank() > 0 and getattr(sys.stdout, "name", None) != os.devnull:
        sys.stdout = open(os.devnull, "w")


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """When one rank raises inside, every rank does, so that none is left waiting for it in a collective.

    The ranks meet at the end, so the work inside must not be collective; afterwards they are in step, and the run can
    go on. The rank's own exception stays what it is; the others raise a RuntimeError with its message. Long work
    inside calls `raise_if_a_rank_failed` now and then, so as not to finish for nothing.
    """
    global _meeting
    _meeting += 1
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if dist.get_world_size() > 1:
        message = None if error is None or isinstance(error, RankFailed) else f"{type(error).__name__}: {error}"
        if message is not None and _lifeline is not None:
            _lifeline.warn(_meeting, f"rank {dist.get_rank()} failed: {message}")
        messages: list[str | None] = [None] * dist.get_world_size()
        with fail_at_once():
            dist.all_gather_object(messages, message)
        for rank, message in enumerate(messages):
            if message is not None and (error is None or isinstance(error, RankFailed)):
                raise RankFailed(f"rank {rank} failed: {message}")
    if error is not None:
        raise error


@contextlib.contextmanager
def fail_at_once() -> Iterator[None]:
    """When one rank raises inside, the others end within seconds, with its message, wherever they are.

    For collective work, such as a forward pass: ranks that wait for the failed one cannot be brought back into step. A
    rank whose collective breaks raises a RuntimeError with the message of the rank that failed; one that stays stuck in
    its collective prints the message and is ended. If every rank raises (they share a mistake), nothing more happens.
    """
    if _lifeline is not None and _lifeline.lost is not None:
        raise RankFailed(f"{_lifeline.lost}; start the run again")
    try:
        yield
    except Exception as error:
        if _lifeline is None:
            raise
        lost_peer = isinstance(error, (dist.DistError, RuntimeError)) and any(
            word in str(error) for word in ("gloo/transport", "NCCL", "onnection")
        )
        cause = _lifeline.report(f"{type(error).__name__}: {error}", LOST_PEER if lost_peer else FAILED)
        if cause is None:
            raise
        raise RankFailed(cause) from error


class RankFailed(RuntimeError):
    """Another rank failed; the message is that rank's."""


def raise_if_a_rank_failed() -> None:
    """Raises RankFailed once another rank has raised in the `fail_together` that this one is in."""
    if _lifeline is not None and (message := _lifeline.lost or _lifeline.warnings.get(_meeting)) is not None:
        raise RankFailed(message)


def _connect_lifeline() -> None:
    """Ties the processes of a run together (llama.lifeline); without a route to rank 0's port it does without."""
    global _lifeline
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    hub = Hub(n_ranks) if rank == 0 else None
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    address = [(host, hub.port, hub.password) if hub else None]
    dist.broadcast_object_list(address, src=0)
    try:
        _lifeline = Lifeline(rank, n_ranks, address[0], hub)
    except OSError as error:
        where = f"{address[0][0]}:{address[0][1]}"
        print(f"rank {rank} cannot reach rank 0 at {where} ({error}): failures of others show late", file=sys.stderr)


def partition(size: int, rank: int, n_ranks: int) -> tuple[int, int]:
    """[start, stop) of a dimension that a rank holds. Where n_ranks does not divide the size, some hold one more."""
    return rank * size // n_ranks, (rank + 1) * size // n_ranks


class Linear(nn.Module):
    """A matrix: a parameter `weight` as a checkpoint has it, or rows of a layout made for fast products.

    Once laid out it has no parameter and takes no gradient; `state_dict` has the weight nevertheless.
    """

    weight: nn.Parameter | None
    layout: Layout | None = None  # may hold other matrices too,
    rows: slice | None = None  # and these are this one's

    def product(self, x: torch.Tensor) -> torch.Tensor:  # [..., in_features] -> [..., rows of the matrix]
        return F.linear(x, self.weight) if self.layout is None else self.layout(x)[..., self.rows]

    def dense(self) -> torch.Tensor:
        """The matrix as an ordinary tensor; after quantisation, the values that stand for it."""
        return self.weight.detach() if self.layout is None else self.layout.to_dense()[self.rows]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout is not None:
            destination[prefix + "weight"] = self.dense()


def products(x: torch.Tensor, *linears: "ColumnParallelLinear") -> tuple[torch.Tensor, ...]:
    """What each of several matrices makes of one input: one product, once they are laid out together."""
    layout = linears[0].layout
    if layout is None or layout is not linears[-1].layout:
        return tuple(linear(x) for linear in linears)
    return layout(x).split([linear.output_size_per_partition for linear in linears], dim=-1)


class ColumnParallelLinear(Linear, fairscale_layers.ColumnParallelLinear):
    """`x @ weight.T` with the rows of `weight` [out_features, in_features] split over the ranks.

    Each rank has its slice of the output; with `gather_output` every rank has the whole.
    """

    def __init__(self, in_features: int, out_features: int, gather_output: bool = False):
        # Not fairscale's __init__: it allocates and fills its weights on the CPU, even under torch.device("meta").
        nn.Module.__init__(self)
        self.group = fairscale_groups.get_model_parallel_group()
        self.world_size = dist.get_world_size(self.group)
        self.in_features, self.out_features = in_features, out_features
        self.gather_output = gather_output
        start, stop = partition(out_features, dist.get_rank(self.group), self.world_size)
        self.output_size_per_partition = stop - start
        self.weight = nn.Parameter(torch.empty(self.output_size_per_partition, in_features))
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in_features] -> [..., out_features (/ world_size)]
        if self.world_size > 1 and self.layout is None and _needs_gradient(x, self.weight):
            return super().forward(x)  # fairscale's collectives carry gradients
        y = self.product(x)
        return gather_last_dim(y, self.out_features, self.group) if self.gather_output else y


class RowParallelLinear(Linear, fairscale_layers.RowParallelLinear):
    """`x @ weight.T` with the columns of `weight` [out_features, in_features] split over the ranks.

    Takes the slice of the input that a ColumnParallelLinear left on this rank; the ranks' products are summed.
    """

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)  # as in ColumnParallelLinear
        self.group = fairscale_groups.get_model_parallel_group()
        self.world_size = dist.get_world_size(self.group)
        self.in_features, self.out_features = in_features, out_features
        self.input_is_parallel = True
        start, stop = partition(in_features, dist.get_rank(self.group), self.world_size)
        self.input_size_per_partition = stop - start
        self.weight = nn.Parameter(torch.empty(out_features, self.input_size_per_partition))
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in_features / world_size] -> [..., out_features]
        if self.world_size > 1 and self.layout is None and _needs_gradient(x, self.weight):
            return super().forward(x)
        return sum_over_ranks(self.product(x), self.group)


class VocabParallelEmbedding(fairscale_layers.VocabParallelEmbedding):
    """The embedding table [num_embeddings, embedding_dim] with its rows split over the ranks."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        nn.Module.__init__(self)  # as in ColumnParallelLinear
        self.group = fairscale_groups.get_model_parallel_group()
        self.world_size = dist.get_world_size(self.group)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.rank = dist.get_rank(self.group)
        self.vocab_start_index, self.vocab_end_index = partition(num_embeddings, self.rank, self.world_size)
        self.num_embeddings_per_partition = self.vocab_end_index - self.vocab_start_index
        self.weight = nn.Parameter(torch.empty(self.num_embeddings_per_partition, embedding_dim))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [...] -> [..., embedding_dim]
        if self.world_size == 1:
            return F.embedding(ids, self.weight)
        if _needs_gradient(ids, self.weight):
            return super().forward(ids)
        elsewhere = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        rows = F.embedding((ids - self.vocab_start_index).masked_fill(elsewhere, 0), self.weight)
        return sum_over_ranks(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.group)


def _needs_gradient(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def sum_over_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of every rank's `x`, the same bits on each of them. `x` is overwritten."""
    if dist.get_world_size(group) > 1:
        if torch.compiler.is_compiling():
            return funcol.all_reduce(x, "sum", group)  # the form that a compiler can follow
        dist.all_reduce(x, group=group)
    return x


def gather_last_dim(x: torch.Tensor, size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's part of a last dimension of `size`, cut by `partition`, side by side: [..., size] on each rank."""
    world_size = dist.get_world_size(group)
    if world_size == 1:
        return x
    widths = [stop - start for start, stop in (partition(size, rank, world_size) for rank in range(world_size))]
    # Collectives want equal pieces: where they differ, by one, the narrower ones are padded on the way.
    x = F.pad(x, (0, max(widths) - x.shape[-1])) if x.shape[-1] < max(widths) else x.contiguous()
    if torch.compiler.is_compiling():
        pieces = funcol.all_gather_tensor(x, gather_dim=0, group=group).chunk(world_size)
    else:
        pieces = [torch.empty_like(x) for _ in range(world_size)]
        dist.all_gather(pieces, x, group=group)
    return torch.cat([piece[..., :width] for piece, width in zip(pieces, widths)], dim=-1)
