"""A decoding step as a CUDA graph: its kernels are recorded once and launched together. Knows nothing of models."""

from collections.abc import Callable

import torch


class CUDAGraph:
    """A step of some rows and keys, recorded at its first call: inputs and outputs have fixed places in memory.

    Args:
        step: (tokens [B, 1], positions [B], key_positions [length]) -> logits [B, vocab_size].
        n_rows: B.
        key_positions: 0, 1, … on the device.
        pool: the memory that the graphs of one model share.
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
            # Once before, so that nothing is compiled, loaded or chosen during the recording.
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
