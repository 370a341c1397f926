"""One new token for each running sequence: eager, compiled, or replayed from a CUDA graph.

An eager step is a plain forward pass; the other two run `Transformer.step`. Every step reads every weight once. They
save time between the kernels: a graph launches all kernels at once, and a compiler fuses them. Knows nothing of
sequences or sampling.
"""

import contextlib
import importlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from getpass import getuser

import torch
import torch.distributed as dist

from llama.layers.cuda_graph import CUDAGraphs
from llama.layers.hooks import Logits, watched
from llama.layers.packing import signature
from llama.model import Transformer

# Importing the compiler takes two seconds. A thread does it while prompts are prefilled. Nobody else may import a part
# of it meanwhile, because its modules import each other.
COMPILER = "torch._inductor.compile_fx"
_importers: list[threading.Thread] = []


def _finish_import() -> None:
    for thread in _importers:
        thread.join()


class DecodeStep:
    """Runs the last token of each of the first slots of the cache; call it as `step(tokens, positions, spare)`.

    Args:
        model: with a cache.
        compile: whether to compile the step with `torch.compile`, at the first call with one row and at the first with
            several. Each takes a minute the first time on a machine, and some seconds in later processes.
    """

    def __init__(self, model: Transformer, compile: bool = False):
        self.model = model
        self.device = model.device
        self.compiled = compile
        self.key_positions = torch.arange(model.args.max_seq_len, device=self.device)
        self._step: Callable[..., torch.Tensor] | None = getattr(model, "step", None)  # `ForwardOnly` has none
        if compile:
            # On CUDA the compiler makes and tunes the kernels. On a CPU the matrix products stay those of `layouts`,
            # which are as fast as the memory, and the compiler fuses what is between them.
            options = {"coordinate_descent_tuning": True} if self.device.type == "cuda" else {}
            # The model does not change, so a step need not check each of its modules.
            options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
            _finish_import()
            # Isolated, because PyTorch otherwise counts the programs of all models together, and stops at eight.
            self._step = torch.compile(model.step, fullgraph=True, isolate_recompiles=True, options=options)
            if not _importers:
                _importers.append(threading.Thread(target=importlib.import_module, args=[COMPILER], daemon=True))
                _importers[0].start()
        self._uncompiled = {"one sequence", "several sequences"} if compile else set()
        self._graphs: CUDAGraphs | None = None
        if self.device.type == "cuda" and self._step is not None:
            self._graphs = CUDAGraphs(self._step, model.args.max_batch_size, self.key_positions)
        self._signature: tuple | None = None  # of the model when the step was compiled or recorded

    def __call__(
        self,
        tokens: list[int],
        positions: list[int],
        spare: Callable[[int], int] | None = None,
        eager: bool = False,
    ) -> torch.Tensor:
        """Logits of the tokens that follow, float32 [B, vocab_size].

        Args:
            tokens: the last token of each row, not in the cache yet.
            positions: the position of each token.
            spare: returns a position of a slot above these that may be overwritten, for a graph that runs more rows;
                None if there is no such slot.
            eager: whether to run a plain forward pass, because the matrices are not packed.
        """
        if eager or not (self.compiled or self._graphs):
            rows = torch.tensor(tokens, device=self.device)[:, None]
            return self.model.run(rows, positions)[:, -1]
        if self._signature is None:
            self._signature = signature(self.model)
        with self._report_compilation("one sequence" if len(tokens) == 1 else "several sequences"):
            if self._graphs is not None:
                return self._graphs(tokens, positions, spare)
            return self._step(*self._inputs(tokens, positions), exact=len(tokens) == 1 and positions[0] > 0)

    def for_changed_model(self) -> "DecodeStep | None":
        """The step for a model that may have changed: this one, a new one, or None if each module must be called."""
        if not self.compiled and (self._graphs is None or any(watched(self.model))):
            return None
        is_stale = self._signature not in (None, signature(self.model))
        return DecodeStep(self.model, self.compiled) if is_stale else self

    @contextlib.contextmanager
    def _report_compilation(self, rows: str) -> Iterator[None]:
        """Prints on stderr why the first step takes long."""
        if rows not in self._uncompiled:
            yield
            return
        _finish_import()
        own = os.path.join(tempfile.gettempdir(), f"torchinductor_{getuser()}")
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", own)
        started = time.perf_counter()
        yield
        self._uncompiled.remove(rows)
        took = f"{time.perf_counter() - started:.1f} seconds (kept in {folder}, TORCHINDUCTOR_CACHE_DIR)"
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"Compiled the step for {rows} in {took}", file=sys.stderr)

    def _inputs(self, tokens: list[int], positions: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = torch.tensor(tokens)[:, None]
        key_positions = self.key_positions[: max(2, max(positions) + 1)]
        places = torch.tensor(positions)
        # One program for all lengths. One for one row, and one for several (which in a cache of two are always two).
        torch._dynamo.mark_dynamic(key_positions, 0)
        if len(tokens) > 1 and self.model.args.max_batch_size > 2:
            torch._dynamo.mark_dynamic(rows, 0)
            torch._dynamo.mark_dynamic(places, 0)
        return rows, places, key_positions


def run_rows(
    model: Transformer, texts: list[list[int]], starts: list[int], first_slot: int
) -> tuple[Logits, list[int]]:
    """Runs text[start:] of each of B texts in one pass, right-padded. Each slot holds the keys before `start` already.

    A row whose padding would exceed the cache starts earlier, and writes some keys again. Returns the logits
    [B, T, vocab_size], and each row's column of text[start].
    """
    width = max(map(int.__sub__, map(len, texts), starts))
    rows, firsts, columns = [], [], []
    for text, start in zip(texts, starts):
        first = min(start, model.args.max_seq_len - width)
        rows.append(text[first:] + [0] * (width - len(text) + first))
        firsts.append(first)
        columns.append(start - first)
    tokens = torch.tensor(rows, device=model.device)
    return model.run(tokens, firsts, slice(first_slot, first_slot + len(rows))), columns
