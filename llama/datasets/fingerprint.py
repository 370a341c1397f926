"""A model's fingerprint: its shape, its tokenizer and a sample of every weight; the same on any number of processes.

A journal keeps the fingerprint of its model, so that no file mixes the answers of two models.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llama.generation import Llama
from llama.layers.layouts import Layout
from llama.layers.linear import Linear, RowParallelLinear, VocabParallelEmbedding
from llama.model import RMSNorm, Transformer
from llama.parallel import partition

N_COLUMNS = 64  # of each matrix


def fingerprint(llama: Llama) -> dict[str, Any]:
    """The model's fingerprint, as JSON. Collective: every process that holds a part of the model calls it."""
    if remote := getattr(llama, "fingerprint", None):  # a `RemoteModel` has it
        return remote
    model = llama.answerer.shared.engine.module  # not `llama.model`: after that the model counts as changed
    args = {name: value for name, value in vars(model.args).items() if name != "max_batch_size"}
    dtype = str(model.dtype).removeprefix("torch.")
    tokenizer = f"{llama.tokenizer.kind} {llama.tokenizer.digest}"
    if (template := llama.formatter.template) is not None:
        tokenizer += f", chat template {template.digest}"
    adapter = {"adapter": model.adapter} if hasattr(model, "adapter") else {}  # beside quantised weights
    return {**args, "dtype": dtype, "weights": weights_digest(model), **adapter, "tokenizer": tokenizer}


@functools.cache
def package_digest() -> str:
    """A digest of this package's code. Replicas compare it, to see that all run the same code."""
    files = sorted(path for path in Path(__file__).parents[1].rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@torch.inference_mode()
def weights_digest(model: Transformer) -> str:
    """A digest of 64 evenly spaced columns of every matrix, and of 64 weights of every norm.

    The bits of a column's numbers are summed as integers: the sum is exact, and the same however the rows are split
    over ranks. The columns are those of the whole matrix, whatever its layout.
    """
    columns_of: dict[Layout, torch.Tensor] = {}  # several matrices share a layout
    hashed = [(n, m) for n, m in model.named_modules() if isinstance(m, (Linear, VocabParallelEmbedding, RMSNorm))]
    total = torch.stack([_column_sums(model, name, module, columns_of) for name, module in hashed])
    total = total if total.is_cuda else total.cpu()  # NCCL takes only CUDA tensors, gloo not those of every device
    dist.all_reduce(total, group=model.output.group)
    return hashlib.sha256(str(total.tolist()).encode()).hexdigest()[:16]


def _column_sums(
    model: Transformer, name: str, module: nn.Module, columns_of: dict[Layout, torch.Tensor]
) -> torch.Tensor:
    """int64 [N_COLUMNS]: this rank's part of the sums over a matrix's columns."""
    rank, n_ranks = model.tok_embeddings.rank, model.tok_embeddings.world_size
    sums = torch.zeros(N_COLUMNS, dtype=torch.int64, device=model.rotary.device)
    # Weights that several ranks hold count once: norms, and key and value heads if there are more ranks than heads.
    n_copies = n_ranks if isinstance(module, RMSNorm) else 1
    if name.endswith((".wk", ".wv")):
        n_copies = max(1, n_ranks // model.args.n_kv_heads)
    if rank % n_copies:
        return sums
    layout = module.layout if isinstance(module, Linear) else None
    width = module.in_features if isinstance(module, Linear) else module.weight.shape[-1]
    start, stop = partition(width, rank, n_ranks) if isinstance(module, RowParallelLinear) else (0, width)
    indices = torch.arange(N_COLUMNS, device=sums.device) * width // N_COLUMNS
    here = (start <= indices) & (indices < stop)
    indices = indices[here] - start
    if layout is None:
        columns = torch.atleast_2d(module.weight)[:, indices]
    else:
        if layout not in columns_of:
            columns_of[layout] = layout.columns(indices)
        columns = columns_of[layout][module.rows]
    bits = columns.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[columns.element_size()])
    sums[here] = bits.sum(dim=0, dtype=torch.int64)
    return sums
