"""A decode step as a CUDA graph: records its kernels once, then launches all of them together. Knows no models."""

import bisect
from collections.abc import Callable

import torch

SHORTEST_LENGTH = 256  # how many keys a graph reads at least; longer graphs read 1.5, 2, 3, 4, 6, … times as many


class CUDAGraphs:
    """Graphs of one step for several numbers of rows and keys. Each is recorded when it is first needed.

    Args:
        step: as in `CUDAGraph`.
        max_batch_size: the most rows.
        key_positions: 0, 1, … up to the last position of the cache, on the device.
    """

    def __init__(self, step: Callable[..., torch.Tensor], max_batch_size: int, key_positions: torch.Tensor):
        self.step, self.key_positions = step, key_positions
        self.batch_sizes = sizes(1, max_batch_size)
        self.lengths = sizes(SHORTEST_LENGTH, len(key_positions))
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, int], CUDAGraph] = {}

    def __call__(self, tokens: list[int], positions: list[int], spare: Callable[[int], int] | None) -> torch.Tensor:
        """Returns the logits [B, vocab_size] after `tokens` at `positions`. The graph may have more rows and keys.

        `spare(row)` returns a position of an unused row that the graph may overwrite. None: use no unused rows.
        """
        n_rows = len(tokens)
        if spare is not None:
            n_rows = self.batch_sizes[bisect.bisect_left(self.batch_sizes, n_rows)]
        length = self.lengths[bisect.bisect_left(self.lengths, max(positions) + 1)]
        graph = self._graphs.get((n_rows, length))
        if graph is None:
            graph = CUDAGraph(self.step, n_rows, self.key_positions[:length], self._pool)
            self._graphs[n_rows, length] = graph
        unused = range(len(tokens), n_rows)
        return graph([*tokens, *(0 for _ in unused)], [*positions, *(spare(row) for row in unused)])[: len(tokens)]


def sizes(first: int, most: int) -> list[int]:
    """`first` times 1, 1.5, 2, 3, 4, 6, 8, … (rounded down) up to `most`, and `most` itself."""
    found = {size for i in range(32) for size in (first << i, (first << i) * 3 // 2) if size < most}
    return sorted({*found, most})


class CUDAGraph:
    """A step for fixed numbers of rows and keys, recorded at its first call. Its inputs and outputs stay in place.

    Args:
        step: (tokens [B, 1], positions [B], key_positions [length]) -> logits [B, vocab_size].
        n_rows: B.
        key_positions: 0, 1, … on the device.
        pool: memory that the graphs of one model share.
    """

    def __init__(self, step: Callable[..., torch.Tensor], n_rows: int, key_positions: torch.Tensor, pool: tuple):
        self.step = step
        self.key_positions = key_positions
        self.tokens = torch.zeros(n_rows, 1, dtype=torch.long, device=key_positions.device)
        self.positions = torch.zeros(n_rows, dtype=torch.long, device=key_positions.device)
        self.pool = pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: torch.Tensor | None = None

    def __call__(self, tokens: list[int], positions: list[int]) -> torch.Tensor:
        self.tokens.copy_(torch.tensor(tokens)[:, None])
        self.positions.copy_(torch.tensor(positions))
        if self.graph is None:
            # Run it once before recording, so that nothing is compiled, loaded or tuned during the recording.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step(self.tokens, self.positions, self.key_positions)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
                self.logits = self.step(self.tokens, self.positions, self.key_positions)
        self.graph.replay()
        return self.logits
