"""A checkpoint's tensors into a model: this rank's slices, each byte once, without a second copy in memory.

On the CPU the matrices are used as they lie in the files at first, and are packed for decoding later (`pack`). Knows
nothing of formats: a checkpoint is anything that reads slices of full tensors (`checkpoint.MetaCheckpoint`,
`huggingface.HuggingFaceCheckpoint`).
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from llama.checkpoint.meta import MetaCheckpoint, partition_dim, slice_of_rank
from llama.layers.linear import Linear
from llama.layers.packing import drop_pages, is_mapped, lay_out_together
from llama.layers.quantization import Quantized
from llama.model import Transformer
from llama.parallel import raise_if_a_rank_failed

# How much a load copies at a time; on CUDA there are two pinned buffers of this size.
CHUNK_BYTES = 64 << 20


@dataclass
class Loaded:
    """What a load has done: the bytes of this rank's weights, and how many of them are still the mapped file."""

    n_bytes: int = 0
    n_mapped: int = 0

    def describe(self, device: torch.device, seconds: float, n_ranks: int) -> str:
        """One line for the user: how long, how much, where, how fast."""
        gigabytes = self.n_bytes / 1e9
        text = f"Loaded in {seconds:.2f} seconds: {gigabytes:.2f} GB on {device}, {gigabytes / seconds:.1f} GB/s"
        if n_ranks > 1:
            text += f", on each of {n_ranks} processes"
        if self.n_mapped:
            text += f" ({self.n_mapped / 1e9:.2f} GB mapped: read from the file when first used)"
        return text


def load_weights(
    model: Transformer,
    checkpoint: MetaCheckpoint,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
    alone: bool = False,
) -> Loaded:
    """Gives a model built on the meta device its tensors, this rank's slices of the checkpoint's.

    On the CPU, a slice that is one piece of a file and has the right dtype stays mapped and takes no memory of its own.
    Everything else is copied once, tensor by tensor. With `quantize`, "int8" or "int4", or where the checkpoint is
    quantised, matrices are laid out as soon as those that belong together are there, so that only few are there as they
    were at any time.

    Raises:
        RankFailed: another rank has failed meanwhile (inside `parallel.fail_together`).
    """
    rank, n_ranks = model.tok_embeddings.rank, model.tok_embeddings.world_size
    slices = {}
    for name, full in checkpoint.shapes.items():
        dim = partition_dim(name)
        slices[name] = (
            (0, 0, full[0]) if dim is None else (dim, *slice_of_rank(name, full[dim], model.args, rank, n_ranks))
        )
    n_bytes = sum(
        math.prod(full) // full[dim] * (stop - start) * dtype.itemsize
        for full, (dim, start, stop) in zip(checkpoint.shapes.values(), slices.values())
    )
    quantize = checkpoint.quantization or quantize
    copier = StagedCopy(device) if device.type == "cuda" else None
    parts: dict[Linear, torch.Tensor | Quantized] = {}
    loaded, together = Loaded(), {linear: group for group in model.matrices() for linear in group}
    if alone:
        together = {linear: (linear,) for linear in together}
    with tqdm(
        desc="Loading",
        total=n_bytes,
        unit="B",
        unit_scale=True,
        delay=1,
        disable=None if dist.get_rank() == 0 else True,
    ) as bar:
        for name in [name for name, _ in model.named_parameters()]:  # each once, though two modules may share it
            raise_if_a_rank_failed()
            module = model.get_submodule(name.removesuffix(".weight"))
            if checkpoint.quantization and module in together:
                part = checkpoint.read(name, *slices[name]).to(device)
            elif device.type == "cpu" and checkpoint.dtype == dtype:
                part = checkpoint.read(name, *slices[name]).contiguous()
            else:
                part = _copy(checkpoint, name, *slices[name], dtype, device, copier)
            bar.update(math.prod(checkpoint.shapes[name]) * dtype.itemsize // n_ranks)
            if not quantize or module not in together:
                module.weight = nn.Parameter(part, requires_grad=False)
                loaded.n_bytes += part.nbytes
                loaded.n_mapped += part.nbytes if is_mapped(part) else 0
                continue
            parts[module] = part
            if all(linear in parts for linear in together[module]):
                if copier is not None:
                    copier.wait()
                loaded.n_bytes += lay_out_together(
                    {linear: parts.pop(linear) for linear in together[module]}, quantize, dtype
                )
        if copier is not None:
            copier.finish()
    if model.args.tied_embeddings:
        model.output.weight = model.tok_embeddings.weight
        if quantize:
            loaded.n_bytes += lay_out_together({model.output: model.output.weight}, quantize, dtype)
    model.to(device)  # the rotary table; the parameters are there
    return loaded


def make_trainable(model: Transformer) -> None:
    """Gives every weight memory of its own, where it was a mapped file, and lets it require gradients."""
    model.packable = False
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() if is_mapped(parameter.data) else parameter.data
        parameter.requires_grad_(True)


def pieces(
    checkpoint: MetaCheckpoint, name: str, dim: int, start: int, stop: int
) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """[start, stop) along `dim` of a full tensor, cut so that each piece has at most CHUNK_BYTES.

    Yields:
        dim, start and stop of the piece (along the rows if all of the tensor is wanted), and what `read` gives for it.
    """
    full = checkpoint.shapes[name]
    if stop - start == full[dim]:
        dim, start, stop = 0, 0, full[0]
    # Whole heads at a time: those of a Hugging Face file are put into another order as they are read.
    unit = checkpoint.args.head_dim
    unit_bytes = math.prod(full) // full[dim] * unit * checkpoint.dtype.itemsize
    step = max(1, CHUNK_BYTES // unit_bytes) * unit
    for first in range(start, stop, step):
        last = min(first + step, stop)
        yield dim, first, last, checkpoint.read(name, dim, first, last)


def _copy(
    checkpoint: MetaCheckpoint,
    name: str,
    dim: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
    device: torch.device,
    copier: "StagedCopy | None",
) -> torch.Tensor:
    """[start, stop) along `dim` of a full tensor, as a tensor of its own."""
    shape = list(checkpoint.shapes[name])
    shape[dim] = stop - start
    target = torch.empty(shape, dtype=dtype, device=device)
    for along, first, last, piece in pieces(checkpoint, name, dim, start, stop):
        part = target.narrow(along, first - (start if along == dim else 0), last - first)
        if copier is None:
            part.copy_(piece)
        else:
            copier.copy(piece, part)
    return target


class StagedCopy:
    """Copies from mapped files to a device through two buffers: while one is on its way, the other is filled.

    The files are read as the buffers are filled, by several threads; the copies run on a stream of their own, and a
    change of dtype happens on the device. Buffers are pinned memory, from which a card copies by itself.

    Args:
        device: where to. On the CPU (for tests) it does the same, one step after the other.
        buffer_bytes: of each of the two; at least a row of any source.
    """

    N_THREADS = 4  # one thread reads mapped pages slower than a card takes them

    def __init__(self, device: torch.device, buffer_bytes: int = CHUNK_BYTES):
        self.device = device
        on_cuda = device.type == "cuda"
        self.buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=on_cuda) for _ in range(2)]
        self.stream = torch.cuda.Stream(device) if on_cuda else None
        self.sent = [torch.cuda.Event() for _ in range(2)] if on_cuda else []  # a buffer's last copy has ended
        self.turn = 0
        self.threads = ThreadPoolExecutor(self.N_THREADS)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies `source`, on the CPU, to `target`, on the device; returns when `source` has been read.

        A source larger than a buffer goes in pieces.
        """
        rows = max(1, self.buffers[0].nbytes // max(1, source[:1].nbytes))
        for source_part, target_part in zip(source.split(rows), target.split(rows)):
            self.turn = 1 - self.turn
            if self.stream is not None:
                self.sent[self.turn].synchronize()
            staged = self.buffers[self.turn][: source_part.nbytes].view(source.dtype).view(source_part.shape)
            thread_rows = -(-len(staged) // self.N_THREADS)
            shares = zip(staged.split(thread_rows), source_part.split(thread_rows))
            list(self.threads.map(lambda share: share[0].copy_(share[1]), shares))
            drop_pages(source_part)
            self._send(staged, target_part)

    def _send(self, staged: torch.Tensor, target: torch.Tensor) -> None:
        if self.stream is None:
            target.copy_(staged)
            return
        # The target's memory may have been something else's on the current stream.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            if target.is_contiguous() and target.dtype == staged.dtype:
                target.copy_(staged, non_blocking=True)
            else:  # as it lies to the device, and from there: copy_ in one step would convert on the CPU
                target.copy_(staged.to(self.device, non_blocking=True))
            self.sent[self.turn].record()

    def wait(self) -> None:
        """Lets what runs on the device from now on see what has been sent."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def finish(self) -> None:
        """Waits until everything has arrived."""
        self.threads.shutdown()
        if self.stream is not None:
            self.stream.synchronize()
