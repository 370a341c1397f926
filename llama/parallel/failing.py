"""When one rank of a run fails, the others fail too, with its message. Knows nothing of what they compute."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator

import torch.distributed as dist

from llama.parallel.lifeline import FAILED, LOST_PEER, Hub, Lifeline, tell

# The connection by which this process learns that another has failed; None in a run of one process.
_lifeline: Lifeline | None = None

_meeting = 0  # how many times `fail_together` was entered; the same number on each rank


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """When one rank raises inside, every rank raises, so that none waits for it in a collective.

    The ranks meet at the end, so nothing inside may be collective. Afterwards they are in step, and the run can go on.
    The rank that failed raises its own exception, the others a RankFailed with its message. Long work inside calls
    `raise_if_a_rank_failed` now and then, to stop early.
    """
    global _meeting
    _meeting += 1
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if dist.get_world_size() > 1:
        message = None
        if error is not None and not isinstance(error, RankFailed):
            message = f"rank {dist.get_rank()} failed: {type(error).__name__}: {error}"
            if _lifeline is not None:
                _lifeline.warn(_meeting, message)
        messages: list[str | None] = [None] * dist.get_world_size()
        with fail_at_once():
            dist.all_gather_object(messages, message)
        for rank, message in enumerate(messages):
            if message is not None and (error is None or isinstance(error, RankFailed)):
                raise RankFailed(message, rank)
    if error is not None:
        raise error


@contextlib.contextmanager
def fail_at_once() -> Iterator[None]:
    """When one rank raises inside, the others end within seconds, with its message, wherever they are.

    This is for collective code, such as a forward pass: ranks that wait for the failed one cannot get back into step.
    A rank whose collective breaks raises a RankFailed with the message of the rank that failed. A rank that is stuck in
    its collective prints the message and exits. If all ranks raise (they share a mistake), each raises its own.
    """
    if _lifeline is not None and _lifeline.lost is not None:
        raise RankFailed(_lifeline.lost["message"] + "; start the run again", _lifeline.lost["rank"])
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
        raise RankFailed(**cause) from error


class RankFailed(RuntimeError):
    """Another rank failed; the message is its message."""

    def __init__(self, message: str, rank: int = 0):
        super().__init__(message)
        self.rank = rank

    def tell(self) -> None:
        """Prints the message on stderr, once on each host, without a traceback: the other rank's is the useful one."""
        tell(self.rank, str(self))


def raise_if_a_rank_failed() -> None:
    """Raises RankFailed if another rank has raised in the current `fail_together`."""
    if _lifeline is not None and (found := _lifeline.lost or _lifeline.warnings.get(_meeting)) is not None:
        raise RankFailed(found["message"], found["rank"])


def connect() -> None:
    """Connects this process to rank 0 (`llama.parallel.lifeline`), if it can reach rank 0's port."""
    global _lifeline
    if _lifeline is not None:
        return
    show = sys.excepthook
    sys.excepthook = lambda kind, error, traceback: (
        error.tell() if isinstance(error, RankFailed) else show(kind, error, traceback)
    )
    rank = dist.get_rank()
    hub = Hub(dist.get_world_size()) if rank == 0 else None
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    address = [(host, hub.port, hub.password) if hub else None]
    dist.broadcast_object_list(address, src=0)
    try:
        _lifeline = Lifeline(rank, address[0], hub)
    except OSError as error:
        where = f"{address[0][0]}:{address[0][1]}"
        effect = "it will notice late when another rank fails"
        print(f"rank {rank} cannot reach rank 0 at {where} ({error}): {effect}", file=sys.stderr)
