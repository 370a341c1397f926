"""Decoding and prefill, ours beside Transformers and llama.cpp and what the machine can do: `make bench`.

    python -m benchmarks.decode [--shape llama-3.2-1b] [--rounds 5] [--only "ours,Transformers"] [--out benchmarks]

Writes a checkpoint of random bfloat16 numbers in the shape, starts a process for each contestant, and lets them take
turns in each round; medians over the rounds are printed, and the ratios between them. Beside the table, in --out:
decode.json, decode.png and RESULTS.md. llama.cpp takes part where llama-cpp-python and gguf are installed
(pip install llama-cpp-python gguf), the plot needs matplotlib; on CUDA, llama.cpp is left out.
"""

import importlib.util
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fire
import torch

from benchmarks.contestants import CONTESTANTS, gguf_copy, hugging_face_copy
from benchmarks.scaling import token
from benchmarks.shapes import PARAMS, default_folder, write_random_checkpoint
from llama.model import ModelArgs

# (what is compared, with what, where, at least): the bars, ratios of tokens/s within one run; on a CPU, and on a GPU.
BARS = [
    ("ours compiled", "llama.cpp bf16", "decode 1 @ 128", 1.1),
    ("ours compiled", "Transformers", "decode 1 @ 128", 2.5),
    ("ours", "Transformers", "decode 1 @ 128", 1.5),
    ("ours int8 compiled", "llama.cpp Q8_0", "decode 1 @ 128", 1.1),
    ("ours int4 compiled", "llama.cpp Q4_0", "decode 1 @ 128", 0.8),
    ("ours", "llama.cpp bf16", "prefill 512", 1.0),
    ("ours", "Transformers", "prefill 512", 1.0),
]
GPU_BARS = [
    ("ours compiled", "Transformers", "decode 1 @ 128", 1.0),
    ("ours", "Transformers", "decode 1 @ 128", 1.0),
    ("ours int8 compiled", "ours compiled", "decode 1 @ 128", 1.6),
    ("ours int8", "ours", "decode 1 @ 128", 1.6),
    ("ours", "Transformers", "prefill 4096", 1.0),
]
# At least so many percent of the measured bandwidth, decoding one row.
BANDWIDTH_BARS = {"cpu": {"ours compiled": 65}, "cuda": {"ours compiled": 85, "ours": 75}}
# At least so many times one row's tokens/s.
BATCH_BARS = {"cpu": {"decode 8 @ 128": 4}, "cuda": {"decode 64 @ 128": 30}}
PREFILL_BAR = 60  # percent of the measured matmul rate, 4,096 tokens on a GPU


class Process:
    """A contestant in its process."""

    def __init__(self, name: str, folder: Path, device: str, room: dict[int, int]):
        command = [sys.executable, "-m", "benchmarks.contestants", name, str(folder), device, json.dumps(room)]
        log = open(folder.with_name(f"{folder.name}-{name.replace(' ', '-')}.log"), "w")
        self.name, self.log = name, log.name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.started = self._answer()

    def ask(self, **request: int) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: its messages are in {self.log}")
        return json.loads(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def read_bandwidth(device: str) -> float:
    """Bytes/s: of reading 1 GB by `sum` on a CPU; of a copy, read and written, on CUDA."""
    numbers = torch.ones(1 << 28, device=device)
    other = torch.empty_like(numbers) if device != "cpu" else None
    seconds = _least_seconds(lambda: numbers.sum() if other is None else other.copy_(numbers), device)
    return numbers.nbytes * (1 if other is None else 2) / seconds


def matmul_rate(device: str) -> float:
    """Operations/s of a bfloat16 product of square matrices."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return 2 * n**3 / _least_seconds(lambda: a @ b, device)


def _least_seconds(work, device: str, repeats: int = 8) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def main(
    shape: str = "llama-3.2-1b",
    rounds: int = 5,
    only: str | None = None,
    device: str | None = None,
    out: str = "benchmarks",
    folder: str | None = None,
    batches: str = "1,8,32",
    contexts: str = "128,512,1024,2048,4096",
    prompts: str = "512,2048",
    tokens: int = 12,
) -> None:
    """Measures and prints.

    Args:
        shape: one of benchmarks.shapes.PARAMS.
        rounds: how many turns each has.
        only: names of contestants, separated by commas; all that can take part when None.
        device: "cpu" or "cuda".
        out: where the results are written.
        folder: where the checkpoint is or will be; /tmp/llama-benchmarks/SHAPE when None.
        batches: numbers of rows that decode together, after 128 tokens of context each.
        contexts: tokens before those that are timed, at one row.
        prompts: lengths that are prefilled.
        tokens: steps to a turn.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch_sizes, lengths, prompt_lengths = (_numbers(text) for text in (batches, contexts, prompts))
    path = default_folder(shape) if folder is None else Path(folder)
    n_bytes = write_random_checkpoint(path, shape)
    names = [name.strip() for name in only.split(",")] if only else list(CONTESTANTS)
    has_llama_cpp = device == "cpu" and all(map(importlib.util.find_spec, ("llama_cpp", "gguf")))
    names = [name for name in names if has_llama_cpp or not name.startswith("llama.cpp")]
    room = {b: (max(*lengths, *prompt_lengths) if b == 1 else 128) + 4 * tokens for b in batch_sizes}
    for name in names:  # what they read is made before any of them is timed
        if name == "Transformers":
            hugging_face_copy(path)
        elif name.startswith("llama.cpp"):
            gguf_copy(path, name.split()[1])
    processes = []
    try:
        for name in names:
            print(f"starting {name}", file=sys.stderr)
            processes.append(Process(name, path, device, room))
        for results in _measure(processes, device, rounds, tokens, batch_sizes, lengths, prompt_lengths):
            for process in processes:
                results["started"][process.name] |= process.ask()
            results |= {"shape": shape, "weights_bytes": n_bytes, "device": device}
            results["machine"] = _machine(device)
            results["command"] = f"python -m benchmarks.decode {shlex.join(sys.argv[1:])}"
            _write(results, Path(out))  # after each round: a run that is ended early is not lost
    finally:
        for process in processes:
            process.end()
    print(report(results))
    if importlib.util.find_spec("matplotlib"):
        plot(results, Path(out) / "decode.png")


def _write(results: dict, folder: Path) -> None:
    (folder / "decode.json").write_text(json.dumps(results, indent=1) + "\n")
    machine = f"{results['machine']}; {results['rounds']} rounds"
    note = f"    {results['command']}\n\n{machine}\n\n{report(results)}"
    (folder / "RESULTS.md").write_text(f"# The last run\n\n{note}\n\n![decode speed](decode.png)\n")


def _measure(
    processes: list[Process],
    device: str,
    rounds: int,
    tokens: int,
    batch_sizes: list[int],
    lengths: list[int],
    prompt_lengths: list[int],
) -> Iterator[dict]:
    """Tokens/s of each contestant, by what it did, one figure a round, and the machine's own rates."""
    places = [(1, length) for length in lengths] + [(b, 128) for b in batch_sizes if b > 1]
    speeds: dict[str, dict[str, list[float]]] = {p.name: {} for p in processes}
    bandwidths, rates = [], []
    for round_ in range(-1, rounds):  # the first is for warming up
        # Place by place, so that those that are compared are timed within seconds of each other.
        for batch, context in places:
            bandwidths.append(read_bandwidth(device))
            for process in processes:
                # Peers at one length of context: they would compute it again in every turn.
                if context == 128 or process.name in ("ours", "ours compiled"):
                    seconds = process.ask(batch=batch, context=context, tokens=tokens)["seconds"]
                    speed = batch / statistics.median(seconds)
                    speeds[process.name].setdefault(f"decode {batch} @ {context}", []).append(speed)
        for n in prompt_lengths:
            rates.append(matmul_rate(device))
            for process in processes:
                speed = n / process.ask(prompt=n)["seconds"][0]
                speeds[process.name].setdefault(f"prefill {n}", []).append(speed)
        print(f"round {round_ + 1} of {rounds}", file=sys.stderr)
        if round_ < 0:
            for by_place in speeds.values():
                by_place.clear()
            continue
        yield {
            "tokens_per_second": speeds,
            "read_bytes_per_second": bandwidths,
            "matmul_per_second": rates,
            "started": {p.name: dict(p.started) for p in processes},
            "rounds": round_ + 1,
        }


def report(results: dict) -> str:
    """The tables, as text that is Markdown too."""
    speeds = {
        name: {what: statistics.median(values) for what, values in by_place.items()}
        for name, by_place in results["tokens_per_second"].items()
    }
    places = list(dict.fromkeys(what for by_place in speeds.values() for what in by_place))
    bandwidth = statistics.median(results["read_bytes_per_second"])
    rate = statistics.median(results["matmul_per_second"])
    cost = token(ModelArgs(**PARAMS[results["shape"]]))
    read, operations = 2 * cost["weights"], 2 * cost["layers"]  # a token's, decoding and in a prompt
    lines = [
        f"{results['shape']}: {results['weights_bytes'] / 1e9:.2f} GB in bfloat16. The machine reads "
        f"{bandwidth / 1e9:.1f} GB/s ({bandwidth / read:.1f} times what a token reads) and multiplies at "
        f"{rate / 1e9:.0f} GFLOP/s ({rate / operations:.0f} tokens/s of prefill).",
        "",
        "Tokens/s in all, medians (decode ROWS @ CONTEXT; prefill TOKENS):",
        "",
        f"| | {' | '.join(places)} | loaded, s | first token, s | peak, GB |",
        "|---|" + "---|" * (len(places) + 3),
    ]
    for name, by_place in speeds.items():
        started = results["started"][name]
        cells = [f"{by_place[place]:.1f}" if place in by_place else "" for place in places]
        cells += [f"{started['load']:.1f}", f"{started['first_token']:.1f}", f"{started['peak_bytes'] / 1e9:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| ratio | measured | at least |", "|---|---|---|"]
    device = results["device"]

    def ratio(name: str, place: str, other: str, other_place: str) -> float | None:
        """Turn by turn, so that a slow spell of the machine falls on both; None if one of them was not measured."""
        by_round = [results["tokens_per_second"].get(n, {}).get(p) for n, p in ((name, place), (other, other_place))]
        return statistics.median(a / b for a, b in zip(*by_round)) if all(by_round) else None

    for ours, peer, place, bar in BARS if device == "cpu" else GPU_BARS:
        if (found := ratio(ours, place, peer, place)) is not None:
            lines.append(f"| {place}: {ours} / {peer} | {found:.2f} | {bar} |")
    for name in ("ours", "ours compiled"):
        by_place, one = speeds.get(name, {}), "decode 1 @ 128"
        if one not in by_place:
            continue
        share, bar = 100 * by_place[one] * read / bandwidth, BANDWIDTH_BARS[device].get(name)
        at_least = "" if bar is None else f"{bar} %"
        lines.append(f"| {name}: of the measured bandwidth, {one} | {share:.0f} % | {at_least} |")
        for place, bar in BATCH_BARS[device].items():
            if (found := ratio(name, place, name, one)) is not None:
                lines.append(f"| {name}: {place} / {one} | {found:.2f} | {bar} |")
        if (found := ratio(name, one, name, "decode 1 @ 4096")) is not None:
            lines.append(f"| {name}: time of a token at 4,096 / at 128 | {found:.2f} | at most 1.35 |")
        if device == "cuda" and "prefill 4096" in by_place:
            share = 100 * by_place["prefill 4096"] * operations / rate
            lines.append(f"| {name}: of the measured matmul rate, prefill 4096 | {share:.0f} % | {PREFILL_BAR} % |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Decode speed against context at one row, and against rows at 128 tokens of context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_context, by_batch) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for name, by_place in results["tokens_per_second"].items():
        points = {tuple(map(int, w.split()[1::2])): statistics.median(v) for w, v in by_place.items() if "@" in w}
        style = "-o" if name.startswith("ours") else "--s"
        along = sorted((context, speed) for (batch, context), speed in points.items() if batch == 1)
        across = sorted((batch, speed) for (batch, context), speed in points.items() if context == 128)
        by_context.plot(*zip(*along), style, label=name, markersize=4)
        by_batch.plot(*zip(*across), style, label=name, markersize=4)
    for axes, label in ((by_context, "tokens of context, one row"), (by_batch, "rows, 128 tokens of context each")):
        axes.set(xlabel=label, ylabel="tokens/s in all", xscale="log", ylim=(0, None))
        ticks = sorted({x for line in axes.get_lines() for x in line.get_xdata()})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    by_batch.legend(fontsize=7)
    figure.suptitle(f"{results['shape']}, {results['machine']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _numbers(text: str | int | tuple) -> list[int]:
    """1,8,32 as a command line may give it."""
    if isinstance(text, (tuple, list)):
        return [int(n) for n in text]
    return [int(n) for n in str(text).split(",")]


def _machine(device: str) -> str:
    versions = {"Python": platform.python_version(), "PyTorch": torch.__version__}
    for module in ("transformers", "llama_cpp"):
        if importlib.util.find_spec(module):
            versions[module] = importlib.import_module(module).__version__
    if device == "cpu":
        model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "CPU")
        features = torch.backends.cpu.get_cpu_capability()
        what = f"{model}, {torch.get_num_threads()} threads, {features}"
    else:
        what = torch.cuda.get_device_name()
    return f"{what}; {', '.join(f'{name} {version}' for name, version in versions.items())}"


if __name__ == "__main__":
    fire.Fire(main)
