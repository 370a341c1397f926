"""The progress of a run: a bar, a JSON line for each step, a PNG of the curves. Rank 0 alone writes them.

Knows nothing of what is trained.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

LOG, CURVES = "log.jsonl", "curves.png"


class Report:
    """Reports the steps of a run. Lines that a killed run wrote after its last save are dropped.

    Args:
        folder: the run's.
        first: how many steps are done.
        n_steps: how many steps the run has.
        flops_per_token: of a forward and a backward pass.
        peak: the machine's floating-point operations a second; None: the share of it is not shown.
        show: whether to show a bar.
    """

    def __init__(
        self, folder: Path, first: int, n_steps: int, flops_per_token: float, peak: float | None, show: bool = True
    ):
        self.folder, self.flops_per_token, self.peak = folder, flops_per_token, peak
        self.is_mine = dist.get_rank() == 0
        self.bar = tqdm(
            desc="Training", initial=first, total=n_steps, unit="step", disable=not (show and self.is_mine) or None
        )
        if self.is_mine:
            kept = [json.dumps(line) + "\n" for line in read_log(folder) if line["step"] <= first]
            (folder / f"{LOG}.new").write_text("".join(kept))
            os.replace(folder / f"{LOG}.new", folder / LOG)
        self._since = time.perf_counter()

    def note(self, step: int, n_tokens: int, **values: float) -> None:
        """Writes one line: the step, its tokens, tokens/s since the last line, and the caller's `values`."""
        seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
        rate = n_tokens / seconds
        line: dict[str, Any] = {"step": step, **values, "tokens": n_tokens, "tokens_per_s": round(rate, 1)}
        shown = {"loss": f"{values['loss']:.4f}", "tokens/s": f"{rate:,.0f}"}
        if self.peak:
            line["share_of_peak"] = round(rate * self.flops_per_token / self.peak, 4)
            shown["of peak"] = f"{line['share_of_peak']:.0%}"
        if self.is_mine:
            with (self.folder / LOG).open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def plot(self) -> None:
        if self.is_mine:
            plot_curves(self.folder)

    def close(self) -> None:
        self.bar.close()

    def warn(self, text: str) -> None:
        if self.is_mine:
            print(f"warning: {text}", file=sys.stderr)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without a line that a kill has cut short."""
    lines = []
    with contextlib.suppress(FileNotFoundError), (folder / LOG).open() as file:
        for text in file:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def plot_curves(folder: Path) -> bool:
    """Draws loss, learning rate and gradient norm over the steps; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = read_log(folder)
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    axes[0].plot(steps, [line["loss"] for line in lines], label="training")
    if held_out := [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]:
        axes[0].plot(*zip(*held_out), "o-", label="held out")
    axes[0].set_ylabel("loss (nats)")
    axes[0].legend()
    for axis, key, label in ((axes[1], "gradient_norm", "gradient norm"), (axes[2], "lr", "learning rate")):
        axis.plot(steps, [line[key] for line in lines])
        axis.set_ylabel(label)
    axes[2].set_xlabel("step")
    figure.savefig(folder / f".{CURVES}", format="png", dpi=120)
    os.replace(folder / f".{CURVES}", folder / CURVES)
    return True


def measured_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations a second of a large matrix product on this device, the best of six."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        _wait_for(device)
        started = time.perf_counter()
        a @ b
        _wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
