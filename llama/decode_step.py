"""One new token for each running sequence: as PyTorch runs it, compiled, or replayed from a CUDA graph.

The last two are `Transformer.step`, the first is a plain forward pass. A step reads every weight once. What can be
saved is the time between the kernels: a graph launches them all at once, and a compiler makes fewer of them. Knows
nothing of sequences or sampling.
"""

import bisect
import os
import tempfile
import time
from collections.abc import Callable
from getpass import getuser

import torch

from llama.layers.cuda_graph import CUDAGraph
from llama.model import Transformer

SHORTEST_LENGTH = 256  # of the keys that a graph reads; its other lengths are 1.5 and 2 times as much, and so on


class DecodeStep:
    """Runs the last token of each of the first rows of the cache; call it as `step(tokens, positions, spare)`.

    Args:
        model: with a cache.
        compile: whether to compile the step with `torch.compile`, which takes a minute the first time on a machine.
    """

    def __init__(self, model: Transformer, compile: bool = False):
        self.model = model
        self.device = model.rotary.device
        self.compiled = compile
        self.key_positions = torch.arange(model.args.max_seq_len, device=self.device)
        self._step: Callable[..., torch.Tensor] = model.step
        if compile:
            # On CUDA the compiler makes and tunes the kernels; on a CPU the products stay oneDNN's or PyTorch's own,
            # which are as fast as the memory there, and what is between them is fused.
            options = {"coordinate_descent_tuning": True} if self.device.type == "cuda" else {}
            # The model stays as it is: no look at each of its modules before each step.
            options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
            # In a region of its own: PyTorch counts the programs of all models together otherwise, and stops at eight.
            self._step = torch.compile(model.step, fullgraph=True, isolate_recompiles=True, options=options)
        self._graphs: dict[tuple[int, int], CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.batch_sizes = _sizes(1, model.args.max_batch_size)
        self.lengths = _sizes(SHORTEST_LENGTH, model.args.max_seq_len)

    def __call__(
        self, tokens: list[int], positions: list[int], spare: Callable[[int], int] | None = None
    ) -> torch.Tensor:
        """Logits of the tokens that follow, float32 [B, vocab_size].

        Args:
            tokens: the last token of each row, not in the cache yet.
            positions: where it belongs.
            spare: gives a position of a row above these that nothing is lost from if a graph for more rows writes
                there; None if there is no such row.
        """
        if self.device.type == "cuda":
            return self._replay(tokens, positions, spare)
        if not self.compiled:
            rows = torch.tensor(tokens, device=self.device)[:, None]
            return self.model.run(rows, positions)[:, -1]
        return self._step(*self._inputs(tokens, positions), exact=len(tokens) == 1 and positions[0] > 0)

    def warm_up(self) -> str:
        """Compiles for one row and for several, which are two programs; says how long it took."""
        started = time.perf_counter()
        with torch.inference_mode():
            for n_rows in {1, min(2, self.model.args.max_batch_size)}:
                self([0] * n_rows, [1] * n_rows, lambda row: 1)
        own = os.path.join(tempfile.gettempdir(), f"torchinductor_{getuser()}")
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", own)
        return f"Compiled in {time.perf_counter() - started:.1f} seconds (kept in {folder}, TORCHINDUCTOR_CACHE_DIR)"

    def _inputs(self, tokens: list[int], positions: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = torch.tensor(tokens)[:, None]
        key_positions = self.key_positions[: max(2, max(positions) + 1)]
        places = torch.tensor(positions)
        # One program for all lengths, and one for all numbers of rows but one row.
        torch._dynamo.mark_dynamic(key_positions, 0)
        if len(tokens) > 1:
            torch._dynamo.mark_dynamic(rows, 0)
            torch._dynamo.mark_dynamic(places, 0)
        return rows, places, key_positions

    def _replay(self, tokens: list[int], positions: list[int], spare: Callable[[int], int] | None) -> torch.Tensor:
        """Runs a graph for at least so many rows and keys; it is captured the first time."""
        n_rows = len(tokens)
        if spare is not None:
            n_rows = self.batch_sizes[bisect.bisect_left(self.batch_sizes, n_rows)]
        length = self.lengths[bisect.bisect_left(self.lengths, max(positions) + 1)]
        graph = self._graphs.get((n_rows, length))
        if graph is None:
            graph = self._graphs[n_rows, length] = CUDAGraph(
                self._step, n_rows, self.key_positions[:length], self._pool
            )
        more = range(len(tokens), n_rows)
        return graph([*tokens, *(0 for _ in more)], [*positions, *(spare(row) for row in more)])[: len(tokens)]


def _sizes(first: int, most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, … times `first` up to `most`, and `most`."""
    sizes = {size for i in range(32) for size in (first << i, (first << i) * 3 // 2) if size < most}
    return sorted({*sizes, most})
