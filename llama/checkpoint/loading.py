"""Loads a checkpoint's tensors into a model: this rank's slices, each byte read once, with no second copy in memory.

On the CPU the matrices are the mapped files at first; `layers.packing` packs them for decoding later. Knows nothing of
formats: a checkpoint is anything that reads slices of full tensors, such as `meta.MetaCheckpoint` and
`huggingface.HuggingFaceCheckpoint`.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from llama.checkpoint.meta import MetaCheckpoint, Part, part_of_rank, shape_of_part
from llama.layers.layouts import Layout, Rounded
from llama.layers.linear import Linear
from llama.layers.packing import drop_pages, groups, is_mapped, lay_out_together
from llama.layers.quantization import BLOCK_ROWS, Blocks, Quantized
from llama.model import Transformer
from llama.parallel import raise_if_a_rank_failed

# How many bytes are copied at a time. On CUDA there are two pinned buffers of this size.
CHUNK_BYTES = 64 << 20


@dataclass
class Loaded:
    """What `load_weights` has done."""

    n_bytes: int = 0  # of this rank's weights
    n_mapped: int = 0  # how many of these bytes are still the mapped file
    is_repacked: bool = False  # whether this machine's kernels could not use a quantised file's blocks

    def note(self, layout: Layout, is_quantized: bool) -> None:
        """Counts a layout; `is_quantized`: its matrices are from a quantised file."""
        self.n_bytes += layout.n_bytes
        self.is_repacked |= is_quantized and not isinstance(layout, Rounded)
        self.n_mapped += sum(part.data.nbytes for part in getattr(layout, "parts", ()) if is_mapped(part.data))

    def describe(self, device: torch.device, seconds: float, n_ranks: int) -> str:
        """One line for the user: how long, how much, where, how fast."""
        gigabytes = self.n_bytes / 1e9
        text = f"Loaded in {seconds:.2f} seconds: {gigabytes:.2f} GB on {device}, {gigabytes / seconds:.1f} GB/s"
        if n_ranks > 1:
            text += f", on each of {n_ranks} processes"
        if self.n_mapped:
            text += f" ({self.n_mapped / 1e9:.2f} GB mapped: read from the file when first used)"
        if self.is_repacked:
            text += " (repacked: this machine's kernels do not read the file's blocks)"
        return text


def load_weights(
    model: Transformer,
    checkpoint: MetaCheckpoint,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
    alone: bool = False,
) -> Loaded:
    """Loads this rank's slices of a checkpoint into a model that was built on the meta device.

    On the CPU, a contiguous slice of the right dtype stays mapped and takes no memory of its own; everything else is
    copied once, tensor by tensor. With `quantize` ("int8" or "int4"), or if the checkpoint is quantised, matrices are
    laid out as soon as all those of a layout are read: at most a few are in memory unpacked. With `alone` each matrix
    has a layout of its own, so that an adapter can add to its output.

    Raises RankFailed if another rank has failed meanwhile (inside `parallel.fail_together`).
    """
    rank, n_ranks = model.tok_embeddings.rank, model.tok_embeddings.world_size
    n_bytes = {name: math.prod(full) * dtype.itemsize // n_ranks for name, full in checkpoint.shapes.items()}
    is_quantized, quantize = checkpoint.quantization is not None, checkpoint.quantization or quantize
    copier = StagedCopy(device) if device.type == "cuda" else None
    parts: dict[Linear, torch.Tensor | Quantized | Blocks] = {}  # waiting for the others of their layout
    loaded = Loaded()
    together = {linear: (linear,) if alone else group for group in groups(model) for linear in group}
    is_silent = None if dist.get_rank() == 0 else True  # None: silent if stderr is no terminal
    total = sum(n_bytes.values())
    with tqdm(desc="Loading", total=total, unit="B", unit_scale=True, delay=1, disable=is_silent) as bar:
        for name in [name for name, _ in model.named_parameters()]:  # each once, though two modules may share it
            raise_if_a_rank_failed()
            module = model.get_submodule(name.removesuffix(".weight"))
            piece = part_of_rank(name, checkpoint.shapes[name], model.args, rank, n_ranks)
            if is_quantized and module in together:
                part = checkpoint.read(name, *piece).to(device)
            elif device.type == "cpu" and checkpoint.dtype == dtype:
                part = checkpoint.read(name, *piece).contiguous()
            else:
                part = _copy(checkpoint, name, piece, dtype, device, copier)
            bar.update(n_bytes[name])
            if not quantize or module not in together:
                module.weight = nn.Parameter(part, requires_grad=False)
                loaded.n_bytes += part.nbytes
                loaded.n_mapped += part.nbytes if is_mapped(part) else 0
                continue
            parts[module] = part
            if all(linear in parts for linear in together[module]):
                if copier is not None:
                    copier.wait()
                group = {linear: parts.pop(linear) for linear in together[module]}
                loaded.note(lay_out_together(group, quantize, dtype), is_quantized)
        if copier is not None:
            copier.finish()
    if model.args.tied_embeddings:
        part = model.output.weight = model.tok_embeddings.weight
        if is_quantized:  # the file has it, in blocks
            shape = checkpoint.shapes["tok_embeddings.weight"]
            part = checkpoint.read("output.weight", *part_of_rank("output.weight", shape, model.args, rank, n_ranks))
            part = part.to(device)
        if quantize:
            loaded.note(lay_out_together({model.output: part}, quantize, dtype), is_quantized)
    model.to(device)  # moves the rotary table; the parameters are there already
    return loaded


def make_trainable(model: Transformer) -> None:
    """Lets every weight require gradients, copies mapped weights into memory, and keeps the model from being packed."""
    model.packable = False
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() if is_mapped(parameter.data) else parameter.data
        parameter.requires_grad_(True)


def pieces(
    checkpoint: MetaCheckpoint, name: str, dim: int, start: int, stop: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """[start, stop) along `dim` of a full tensor, in pieces of at most CHUNK_BYTES.

    Yields for each the dimension of the cut (the rows for a whole tensor), its start within [start, stop), and what
    `read` returns for it.
    """
    full = checkpoint.shapes[name]
    if stop - start == full[dim]:
        dim, start, stop = 0, 0, full[0]
    # A piece has whole heads, as Hugging Face's row order needs, and whole blocks, as rounding needs.
    unit = math.lcm(checkpoint.args.head_dim, BLOCK_ROWS)
    unit_bytes = math.prod(full) // full[dim] * unit * checkpoint.dtype.itemsize
    step = max(1, CHUNK_BYTES // unit_bytes) * unit
    for first in range(start, stop, step):
        yield dim, first - start, checkpoint.read(name, dim, first, min(first + step, stop))


def _copy(
    checkpoint: MetaCheckpoint,
    name: str,
    part: Part,
    dtype: torch.dtype,
    device: torch.device,
    copier: "StagedCopy | None",
) -> torch.Tensor:
    """A copy of a part of a full tensor."""
    target = torch.empty(shape_of_part(checkpoint.shapes[name], part), dtype=dtype, device=device)
    for along, at, piece in pieces(checkpoint, name, *part):
        place = target.narrow(along, at, piece.shape[along])
        if copier is None:
            place.copy_(piece)
        else:
            copier.copy(piece, place)
    return target


class StagedCopy:
    """Copies from mapped files to a device through two buffers: while one is being sent, the other is filled.

    Several threads read the files into the buffers. A buffer is `buffer_bytes` (at least one row of any source) of
    pinned memory, from which a card copies without the CPU. The copies run on a stream of their own, and the device
    converts the dtype. If the device is the CPU (in tests), the steps run one after the other.
    """

    N_THREADS = 4  # one thread reads mapped pages slower than a card takes them

    def __init__(self, device: torch.device, buffer_bytes: int = CHUNK_BYTES):
        self.device, self.module = device, torch.get_device_module(device)  # torch.cpu has streams that do nothing
        is_pinned = device.type == "cuda"
        self.buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=is_pinned) for _ in range(2)]
        self.stream = self.module.Stream(device)
        self.sent = [self.module.Event() for _ in range(2)]  # the end of each buffer's last copy
        self.turn = 0
        self.threads = ThreadPoolExecutor(self.N_THREADS)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies `source`, on the CPU, to `target`, on the device, in pieces; returns when `source` has been read."""
        rows = max(1, self.buffers[0].nbytes // max(1, source[:1].nbytes))
        for source_part, target_part in zip(source.split(rows), target.split(rows)):
            self.turn = 1 - self.turn
            self.sent[self.turn].synchronize()
            staged = self.buffers[self.turn][: source_part.nbytes].view(source.dtype).view(source_part.shape)
            thread_rows = -(-len(staged) // self.N_THREADS)
            shares = zip(staged.split(thread_rows), source_part.split(thread_rows))
            list(self.threads.map(lambda share: share[0].copy_(share[1]), shares))
            drop_pages(source_part)
            self._send(staged, target_part)

    def _send(self, staged: torch.Tensor, target: torch.Tensor) -> None:
        # Kernels on the current stream may still use the target's memory for something else.
        self.stream.wait_stream(self.module.current_stream(self.device))
        with self.module.stream(self.stream):
            if target.is_contiguous() and target.dtype == staged.dtype:
                target.copy_(staged, non_blocking=True)
            else:  # two steps, because a single copy_ would convert on the CPU
                target.copy_(staged.to(self.device, non_blocking=True))
            self.sent[self.turn].record()

    def wait(self) -> None:
        """Makes the current stream wait for the copies so far."""
        self.module.current_stream(self.device).wait_stream(self.stream)

    def finish(self) -> None:
        """Waits until all copies have arrived."""
        self.threads.shutdown()
        self.module.synchronize(self.device)
