"""Training steps: gradients over passes and processes, clipped, then the optimizers.

A step sums the loss of all its passes on all replicas, and divides by the sum of their weights once. So a step is the
same step however many passes and processes it is divided over. Knows nothing of files or of what is learned.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from llama import parallel
from llama.checkpoint.meta import COLUMNS, ROWS, partition_dim
from llama.model import Transformer
from llama.training.batches import Batch
from llama.training.loss import LanguageLoss, PreferenceLoss

# With more ranks than KV heads, several ranks hold a copy of the same rows, and each has a part of their gradient.
COPIED = (".wk.weight", ".wv.weight", ".wk.lora.b", ".wv.lora.b")


class Diverged(ValueError):
    """The loss or a gradient is not finite. The weights are those before the step."""


@dataclass
class Step:
    """The result of a step: the mean loss in nats, the weight it was divided by, and the gradient's norm unclipped."""

    loss: float
    weight: int
    gradient_norm: float


def shard_over_replicas(module: nn.Module, model: Transformer) -> None:
    """Shards weights, gradients and optimizer state over the replicas: FSDP2 (arXiv 2304.11277).

    Call it before the optimizers are made. With one replica it changes nothing.
    """
    n_replicas = parallel.n_replicas()
    if n_replicas == 1:
        return
    n_ranks = dist.get_world_size() // n_replicas
    device = model.rotary.device.type
    mesh = init_device_mesh(device, (n_replicas, n_ranks), mesh_dim_names=("replicas", "ranks"))["replicas"]
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def cosine(peak: float, n_steps: int, warmup: int, floor: float = 0.0) -> Callable[[int], float]:
    """The learning rate of each step from 0: up to `peak` in `warmup` steps, then half a cosine down to `floor`."""

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(1, n_steps - warmup)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return rate


def adamw(module: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)) -> Optimizer:
    """AdamW for the parameters that require a gradient (arXiv 1711.05101); norms do not decay."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if not name.endswith("norm.weight")], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name.endswith("norm.weight")], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, fused=True)


class Trainer:
    """Runs steps.

    Args:
        module: a loss with its model inside, already sharded over the replicas.
        optimizers: update its parameters.
        rate: the learning rate of each step, counted from 0.
        clip: the largest norm of a gradient; None for no limit.
        dtype: of the computation; the weights and the optimizers keep theirs.
    """

    def __init__(
        self,
        module: LanguageLoss | PreferenceLoss,
        optimizers: list[Optimizer],
        rate: Callable[[int], float],
        clip: float | None = 1.0,
        dtype: torch.dtype = torch.float32,
    ):
        self.module, self.optimizers, self.rate, self.clip, self.dtype = module, optimizers, rate, clip, dtype
        self.model = module.model
        self.device = self.model.rotary.device
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.n_replicas, self.group = parallel.n_replicas(), self.model.tok_embeddings.group
        self.n_ranks = dist.get_world_size(self.group)

    def step(self, number: int, passes: Iterable[Batch]) -> Step:
        """Runs one step of the optimizers.

        Args:
            number: of the step, from 0.
            passes: this replica's batches; every replica has the same number, and some may be empty.

        Raises:
            Diverged: on every rank; the weights have not changed.
        """
        batches = list(passes)
        weight = int(self._sum(sum(map(self.module.weight, batches))))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            with self._precision():
                # FSDP takes the mean over the replicas.
                loss = self.module(batch.to(self.device)) * (self.n_replicas / max(weight, 1))
            loss.backward()
            total += loss.detach().double()
        loss = self._sum(total.item()) / self.n_replicas
        norm = self._finish_gradients()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._forget_gradients()
            raise Diverged(f"step {number + 1}: the loss is {loss:g} and its gradient's norm {norm:g}")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate(number) * group.get("factor", 1.0)
            optimizer.step()
        self._forget_gradients()
        return Step(loss, weight, norm)

    @torch.no_grad()
    def evaluate(self, passes: Iterable[Batch]) -> float:
        """The mean loss of batches; every replica has the same number."""
        total, weight = 0.0, 0
        for batch in passes:
            with self._precision():
                total += self.module(batch.to(self.device)).item()
            weight += self.module.weight(batch)
        return self._sum(total) / max(self._sum(weight), 1)

    def weights_are_finite(self) -> bool:
        bad = sum(not bool(_local(p).isfinite().all()) for p in self.parameters.values())
        counts = torch.tensor(float(bad), device=self.device)
        dist.all_reduce(counts)
        return counts.item() == 0

    def _precision(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _sum(self, value: float) -> float:
        """The sum over the replicas."""
        if self.n_replicas == 1:
            return value
        return sum(part[0] for part in parallel.gather_from_replicas([value]))

    def _forget_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    @torch.no_grad()
    def _finish_gradients(self) -> float:
        """Sums the gradients of copied heads, clips, and returns the norm of the whole gradient before clipping."""
        split = torch.zeros((), dtype=torch.float64, device=self.device)  # squares of split parameters' gradients
        whole = split.clone()
        copies = max(1, self.n_ranks // self.model.args.n_kv_heads)
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            has_copies = copies > 1 and name.endswith(COPIED)
            if has_copies:
                self._sum_copies(_local(parameter.grad), copies)
            square = _local(parameter.grad).double().square().sum()
            if is_split(name):
                split += square / (copies if has_copies else 1)
            else:
                whole += square
        if self.n_ranks > 1:
            dist.all_reduce(split, group=self.group)
        square = (split + whole).item()
        if any(isinstance(p, DTensor) for p in self.parameters.values()):
            square = self._sum(square)
        norm = math.sqrt(square) if square >= 0 else math.nan
        if self.clip is not None and norm > self.clip:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    _local(parameter.grad).mul_(self.clip / (norm + 1e-6))
        return norm

    def _sum_copies(self, gradient: torch.Tensor, copies: int) -> None:
        parts = [torch.empty_like(gradient) for _ in range(self.n_ranks)]
        dist.all_gather(parts, gradient.contiguous(), group=self.group)
        first = dist.get_rank(self.group) // copies * copies
        gradient.copy_(sum(parts[first + 1 : first + copies], parts[first]))


def is_split(name: str) -> bool:
    """Whether each model-parallel rank has a part of a parameter, and not all of it."""
    name = name.removeprefix("model.")
    if ".lora." in name:
        matrix, _, part = name.partition(".lora.")
        return partition_dim(f"{matrix}.weight") == (COLUMNS if part == "a" else ROWS)
    return name != "score.weight" and partition_dim(name) is not None


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
