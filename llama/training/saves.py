"""Saves of a run, from which it can go on: weights that learn, the optimizer's state, and how many steps are done.

torch.distributed.checkpoint writes them, each process its own part, into a directory that appears whole: a run may be
killed at any moment. Reading a save runs no code from its files. Knows nothing of data or losses.
"""

import contextlib
import errno
import fcntl
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.optim import Optimizer

from llama import parallel
from llama.checkpoint.config import read_json

RUN = "run.json"  # how the run was started
STEP = re.compile(r"step-(\d{8})")
# The only classes that the index of a save may name.
INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
INDEX_NAMES = {("torch", "Size"), ("torch", "device"), ("collections", "OrderedDict"), ("builtins", "dict")}
INDEX_NAMES |= {("torch.serialization", "_get_layout"), ("torch._C", "_get_layout"), ("pathlib", "PosixPath")}
INDEX_NAMES |= {("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"), ("builtins", "set")}


@contextlib.contextmanager
def run_folder(folder: Path, started_as: dict[str, Any], force: bool) -> Iterator[None]:
    """Makes a run's directory, or opens the one that is there, and locks it. All processes call this.

    Args:
        started_as: the options, data and base of the run, as JSON values; an earlier run must have the same.
        force: whether to delete an earlier run.

    Raises:
        ValueError: the earlier run was started with other values; says what differs.
        FileExistsError: another process is training in it.
    """
    with contextlib.ExitStack() as stack:
        with parallel.fail_together():
            if dist.get_rank() == 0:
                folder.mkdir(exist_ok=True)
                stack.callback(os.close, lock := os.open(folder, os.O_RDONLY))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
                except BlockingIOError:
                    raise FileExistsError(f"another process is training in {folder}: wait for it, or end it") from None
                _check_run(folder, started_as, force)
        yield


def _check_run(folder: Path, started_as: dict[str, Any], force: bool) -> None:
    path = folder / RUN
    expected = "the values that a run was started with; --force starts over"
    before = read_json(path, expected) if path.is_file() and not force else None
    if before is None:
        remove_all(folder)
        (folder / f"{RUN}.new").write_text(json.dumps(started_as, indent=1) + "\n")
        os.replace(folder / f"{RUN}.new", path)
    elif keys := [key for key in {**before, **started_as} if before.get(key) != started_as.get(key)]:
        found = "; ".join(f"{key} was {before.get(key)!r} and is {started_as.get(key)!r}" for key in keys)
        raise ValueError(f"{folder} has a run that was started differently: {found}. Start it so, or pass --force")


def remove_all(folder: Path) -> None:
    """Removes the saves of a run."""
    for entry in folder.iterdir():
        if STEP.fullmatch(entry.name):
            shutil.rmtree(entry)


def state_of(module: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """The tensors of a save, by name; a name begins with the rank in the model-parallel group.

    An optimizer that has no state yet, before the first step, gets its first one here.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    rank = dist.get_rank() % (dist.get_world_size() // parallel.n_replicas())
    state: dict[str, Any] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = f"rank {rank} {names[parameter]}"
                state[name] = parameter.detach()
                for key, value in _optimizer_state(optimizer, parameter).items():
                    state[f"{name} {key}"] = value
    return state


def _optimizer_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    state = optimizer.state[parameter]
    if not state and isinstance(optimizer, torch.optim.Muon):
        state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    elif not state:
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        state["step"] = torch.zeros((), dtype=torch.float32, device=local.device)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes a save after `step` steps, then removes the earlier ones. All processes call this.

    Raises:
        OSError: on every rank. The save before it stays, and nothing of this one is left.
    """
    target, partial = folder / f"step-{step:08d}", folder / ".partial"
    if target.is_dir():
        return
    n_bytes = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
    with parallel.fail_together():
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(folder).free
            if free < n_bytes:
                raise OSError(errno.ENOSPC, f"{target} needs {n_bytes:,} bytes, and {free:,} are free")
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(partial, sync_files=True))
    except (CheckpointException, OSError, RuntimeError) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{target} could not be written; the save before it is whole: {_reason(error)}") from None
    with parallel.fail_together():
        if dist.get_rank() == 0:
            os.replace(partial, target)
            for other in folder.iterdir():
                if STEP.fullmatch(other.name) and other != target:
                    shutil.rmtree(other)


def newest(folder: Path) -> int | None:
    """After how many steps the newest save was written; None if there is none."""
    steps = [int(match[1]) for entry in folder.iterdir() if (match := STEP.fullmatch(entry.name))]
    return max(steps, default=None)


def load(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Reads a save into the tensors of `state`, in place. All processes call this.

    Raises:
        ValueError: it is damaged, or belongs to another run.
    """
    path = folder / f"step-{step:08d}"
    try:
        dcp.load(state, storage_reader=_SafeReader(path))
    except (CheckpointException, RuntimeError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read: {_reason(error)}; remove it to start over") from None


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return f"{type(cause).__name__}: {cause}".split("\n")[0]


class _SafeReader(dcp.FileSystemReader):
    """Reads the index, which is a pickle, without running code from it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module in INDEX_MODULES and "." not in name) or is_dtype or (module, name) in INDEX_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which no save has: refused, nothing was run")
