"""Decoding and prefill beside Transformers, llama.cpp and the limits of the machine: `make bench`.

    python -m benchmarks.decode [--shape llama-3.2-1b] [--rounds 3] [--only "ours,Transformers"] [--out benchmarks]

Writes a checkpoint of random bfloat16 numbers, starts a process for each contestant, and lets them take turns in each
round. Prints medians over the rounds, and compares their ratios with the bars. Long contexts are measured first, by our
own two contestants. Writes decode.json, decode.png and RESULTS.md into --out (`benchmarks.results` adds loading and
drafts to the latter). llama.cpp takes part on a CPU if llama-cpp-python and gguf are installed (pip install
llama-cpp-python gguf); the plot needs matplotlib.
"""

import importlib.util
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fire
import torch

from benchmarks.contestants import CONTESTANTS, gguf_copy, hugging_face_copy
from benchmarks.scaling import token
from benchmarks.shapes import PARAMS, default_folder, write_random_checkpoint
from llama.model import ModelArgs

Speeds = dict[str, dict[str, list[float]]]  # tokens/s by contestant and by place, one figure a round

# The bars: contestant, peer, place, and the least ratio of their tokens/s in one run; on a CPU, and on a GPU.
BARS = [
    *(("ours int4", "llama.cpp Q4_0", f"decode {rows} @ 128", 1.1) for rows in (1, 8, 32)),
    *(("ours int4", "llama.cpp Q4_0", f"prefill {n}", 1.0) for n in (512, 2048)),
    ("ours int8", "llama.cpp Q8_0", "decode 1 @ 128", 1.1),
    ("ours", "Transformers", "decode 1 @ 128", 2.2),
    ("ours", "llama.cpp bf16", "decode 1 @ 128", 1.05),
    ("ours", "llama.cpp bf16", "decode 32 @ 128", 1.5),
    ("ours compiled", "llama.cpp bf16", "decode 1 @ 128", 1.1),
    ("ours compiled", "Transformers", "decode 1 @ 128", 2.5),
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
LONG_BAR = 0.95  # long contexts: least ratio of default / compiled, at one row and eight
LONGER_BARS = {"ours": 1.2, "ours compiled": 1.35}  # most time of a token at 4,096 / at 128
PREFILL_GROWTH_BAR = 1.3  # most growth of the time per operation, from a prompt of 512 to the longest
# The least percentage of the measured bandwidth, decoding one row.
BANDWIDTH_BARS = {"cpu": {"ours compiled": 65}, "cuda": {"ours compiled": 85, "ours": 75}}
# The least ratio to one row's tokens/s.
BATCH_BARS = {"cpu": {"decode 8 @ 128": 4}, "cuda": {"decode 64 @ 128": 20}}
PREFILL_BAR = 60  # percent of the measured matmul rate, 4,096 tokens on a GPU


class Process:
    """A contestant in its own process."""

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
    """Bytes/s: on a CPU of reading 1 GB by `sum`, on CUDA of a copy, counted as read and written."""
    numbers = torch.ones(1 << 28, device=device)
    other = torch.empty_like(numbers) if device != "cpu" else None
    seconds = _least_seconds(lambda: numbers.sum() if other is None else other.copy_(numbers), device)
    return numbers.nbytes * (1 if other is None else 2) / seconds


def matmul_rate(device: str) -> float:
    """Operations/s of a product of square bfloat16 matrices."""
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
    rounds: int = 3,
    only: str | None = None,
    device: str | None = None,
    out: str = "benchmarks",
    folder: str | None = None,
    batches: str = "1,8,32",
    contexts: str = "4096,16384",
    prompts: str = "512,2048",
    long_prompt: int = 8192,
    tokens: int = 10,
) -> None:
    """Measures and prints.

    Args:
        shape: one of benchmarks.shapes.PARAMS.
        rounds: how many turns each has.
        only: names of contestants, separated by commas; all that can take part when None.
        device: "cpu" or "cuda".
        out: the folder for the results.
        folder: where the checkpoint is or will be; /tmp/llama-benchmarks/SHAPE when None.
        batches: numbers of rows that decode together, after 128 tokens of context each.
        contexts: long contexts, at one row and at eight, for "ours" and "ours compiled" alone; "" leaves them out.
        prompts: lengths of the prompts to prefill.
        long_prompt: a long prompt to prefill beside 512, for "ours" alone; 0 leaves it out.
        tokens: how many steps a turn has.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch_sizes, lengths, prompt_lengths = (_numbers(text) for text in (batches, contexts, prompts))
    path = default_folder(shape) if folder is None else Path(folder)
    n_bytes = write_random_checkpoint(path, shape)
    names = [name.strip() for name in only.split(",")] if only else list(CONTESTANTS)
    has_llama_cpp = device == "cpu" and all(map(importlib.util.find_spec, ("llama_cpp", "gguf")))
    names = [name for name in names if has_llama_cpp or not name.startswith("llama.cpp")]
    for name in names:  # makes the contestants' files before any of them is timed
        if name == "Transformers":
            hugging_face_copy(path)
        elif name.startswith("llama.cpp"):
            gguf_copy(path, name.split()[1])
    results = {"shape": shape, "weights_bytes": n_bytes, "device": device, "machine": _machine(device)}
    results |= {"rounds": rounds, "read_bytes_per_second": [], "matmul_per_second": [], "started": {}}
    results["command"] = f"python -m benchmarks.decode {shlex.join(sys.argv[1:])}"

    def finished(phase: str, speeds: Speeds) -> None:
        """Writes after each round, so that a run that ends early is not lost."""
        results[phase] = speeds
        (Path(out) / "decode.json").write_text(json.dumps(results, indent=1) + "\n")

    some = [name for name in names if name in ("ours", "ours compiled")]
    if lengths and some:
        places = [(rows, length) for rows in (1, 8) for length in (128, *lengths)]
        _measure(path, some, places, [512, long_prompt] if long_prompt else [], tokens, results, "long", finished)
    places = [(rows, 128) for rows in batch_sizes]
    _measure(path, names, places, prompt_lengths, tokens, results, "tokens_per_second", finished)
    note = f"    {results['command']}\n\n{results['machine']}; {rounds} rounds\n\n{report(results)}"
    (Path(out) / "RESULTS.md").write_text(f"# The last run\n\n{note}\n\n![decode speed](decode.png)\n")
    print(report(results))
    if importlib.util.find_spec("matplotlib"):
        plot(results, Path(out) / "decode.png")


def _measure(
    path: Path,
    names: list[str],
    places: list[tuple[int, int]],
    prompts: list[int],
    tokens: int,
    results: dict,
    phase: str,
    finished: Callable[[str, Speeds], None],
) -> None:
    """Lets contestants take turns at places (rows, tokens of context) and prompts; adds the speeds to `results`."""
    device, speeds = results["device"], {name: {} for name in names}
    room = {rows: 0 for rows, _ in places} | {1: max(prompts, default=0)}
    for rows, length in places:
        room[rows] = max(room[rows], length) + 4 * tokens
    processes = []
    try:
        for name in names:
            print(f"starting {name}", file=sys.stderr)
            processes.append(Process(name, path, device, room))
        for round_ in range(-1, results["rounds"]):  # the first warms up
            # Place by place, so that the figures that are compared are measured within seconds of each other.
            for rows, context in places:
                results["read_bytes_per_second"].append(read_bandwidth(device))
                for process in processes:
                    seconds = process.ask(batch=rows, context=context, tokens=tokens)["seconds"]
                    found = speeds[process.name].setdefault(f"decode {rows} @ {context}", [])
                    found.append(rows / statistics.median(seconds))
            for n in prompts:
                results["matmul_per_second"].append(matmul_rate(device))
                for process in processes:
                    if not process.name.endswith("compiled"):  # compiling does not change the prefill
                        seconds = process.ask(prompt=n)["seconds"]
                        speeds[process.name].setdefault(f"prefill {n}", []).append(n / seconds[0])
            print(f"round {round_ + 1} of {results['rounds']}", file=sys.stderr)
            if round_ < 0:
                for by_place in speeds.values():
                    by_place.clear()
                continue
            results["started"] |= {p.name: {**p.started, **p.ask()} for p in processes}
            finished(phase, speeds)
    finally:
        for process in processes:
            process.end()


def _table(speeds: Speeds, started: dict[str, dict] | None) -> list[str]:
    """A table of medians, and of how long each contestant took to start."""
    places = list(dict.fromkeys(what for by_place in speeds.values() for what in by_place))
    more = ["loaded, s", "first token, s", "peak, GB"] if started else []
    lines = [f"| | {' | '.join(places + more)} |", "|---|" + "---|" * len(places + more)]
    for name, by_place in speeds.items():
        cells = [f"{statistics.median(by_place[place]):.1f}" if place in by_place else "" for place in places]
        if started:
            took = started[name]
            cells += [f"{took['load']:.1f}", f"{took['first_token']:.1f}", f"{took['peak_bytes'] / 1e9:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def report(results: dict) -> str:
    """The tables, in Markdown."""
    args, device = ModelArgs(**PARAMS[results["shape"]]), results["device"]
    bandwidth = statistics.median(results["read_bytes_per_second"])
    rate = statistics.median(results["matmul_per_second"])
    cost = token(args)
    read, operations = 2 * cost["weights"], 2 * cost["layers"]  # per token: bytes in decoding, operations in a prompt
    speeds, long = results["tokens_per_second"], results.get("long", {})
    lines = [
        f"{results['shape']}: {results['weights_bytes'] / 1e9:.2f} GB in bfloat16. The machine reads "
        f"{bandwidth / 1e9:.1f} GB/s ({bandwidth / read:.1f} times what a token reads) and multiplies at "
        f"{rate / 1e9:.0f} GFLOP/s ({rate / operations:.0f} tokens/s of prefill).",
        "",
        "Tokens/s in all, medians (decode ROWS @ CONTEXT; prefill TOKENS):",
        *("", *_table(speeds, results["started"])),
    ]
    if long:
        lines += ["", "Long contexts, in a run of their own:", "", *_table(long, None)]
    lines += ["", "| ratio | measured | bar |", "|---|---|---|"]

    def ratio(of: Speeds, name: str, place: str, other: str, other_place: str) -> float | None:
        """The median of the rounds' ratios, so that a slow spell of the machine slows both; None if not measured."""
        by_round = [of.get(n, {}).get(p) for n, p in ((name, place), (other, other_place))]
        return statistics.median(a / b for a, b in zip(*by_round)) if all(by_round) else None

    def add(what: str, found: float | None, bar: str) -> None:
        if found is not None:
            lines.append(f"| {what} | {found:.2f} | {bar} |")

    for ours, peer, place, bar in BARS if device == "cpu" else GPU_BARS:
        add(f"{place}: {ours} / {peer}", ratio(speeds, ours, place, peer, place), f"at least {bar}")
    for place in long.get("ours", {}):
        if place.startswith("decode") and not place.endswith(" 128"):
            found = ratio(long, "ours", place, "ours compiled", place)
            add(f"{place}: ours / ours compiled", found, f"at least {LONG_BAR}")
    one = "decode 1 @ 128"
    for name, bar in LONGER_BARS.items():
        found = ratio(long, name, one, name, "decode 1 @ 4096")
        add(f"{name}: time of a token at 4,096 / at 128", found, f"at most {bar}")
    prompts = [int(place.split()[1]) for place in long.get("ours", {}) if place.startswith("prefill")]
    if prompts:
        n = max(prompts)
        found = ratio(long, "ours", "prefill 512", "ours", f"prefill {n}")  # of tokens/s

        def per_token(n: int) -> float:  # attention reads half the keys on average, twice: for scores and for sums
            return operations + 2 * args.n_layers * args.dim * n

        growth = None if found is None else found * per_token(512) / per_token(n)
        what = f"ours: time of a prompt of {n} / of 512, for each operation"
        add(what, growth, f"at most {PREFILL_GROWTH_BAR}")
    for name in ("ours", "ours compiled"):
        if (found := speeds.get(name, {}).get(one)) is None:
            continue
        share, bar = 100 * statistics.median(found) * read / bandwidth, BANDWIDTH_BARS[device].get(name)
        at_least = "" if bar is None else f"at least {bar} %"
        lines.append(f"| {name}: of the measured bandwidth, {one} | {share:.0f} % | {at_least} |")
        for place, bar in BATCH_BARS[device].items():
            add(f"{name}: {place} / {one}", ratio(speeds, name, place, name, one), f"at least {bar}")
        if device == "cuda" and (found := speeds[name].get("prefill 4096")) is not None:
            share = 100 * statistics.median(found) * operations / rate
            lines.append(f"| {name}: of the measured matmul rate, prefill 4096 | {share:.0f} % | {PREFILL_BAR} % |")
    return "\n".join(lines)


COLOURS = {"ours": "tab:blue", "Transformers": "tab:green", "llama.cpp": "tab:orange"}
KINDS = {  # the panels: bytes of a weight, and the contestants
    "bfloat16": (2.0, ("ours", "Transformers", "llama.cpp bf16")),
    "8 bits": (1.0, ("ours int8", "llama.cpp Q8_0")),
    "4 bits": (0.5, ("ours int4", "llama.cpp Q4_0")),
}


def plot(results: dict, path: Path) -> None:
    """Plots tokens/s against rows, a panel for each kind of weights, and against the context; the limit is grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bandwidth, cost = statistics.median(results["read_bytes_per_second"]), token(ModelArgs(**PARAMS[results["shape"]]))
    figure, panels = pyplot.subplots(1, 4, figsize=(16, 4.2))

    def line(axes, speeds: Speeds, name: str, rows: int | None, width: float | None = None) -> None:
        """Draws tokens/s against rows, or for a number of `rows` against the context; hollow marks mean compiled."""
        points = {tuple(map(int, w.split()[1::2])): statistics.median(v) for w, v in speeds.items() if "@" in w}
        kept = {(context if rows else n): v for (n, context), v in points.items() if rows in (None, n)}
        program = next(p for p in COLOURS if name.startswith(p))
        style = {"color": COLOURS[program], "linestyle": "-" if program == "ours" else "--", "marker": "o"}
        hollow = {"markerfacecolor": "white"} if "compiled" in name else {}
        axes.plot(*zip(*sorted(kept.items())), **style, **hollow, label=name, linewidth=width)

    for axes, (kind, (n_bytes, names)) in zip(panels, KINDS.items()):
        every = results["tokens_per_second"]
        for name in [n for m in names for n in (m, f"{m} compiled") if n in every]:
            line(axes, every[name], name, None)
        rows = sorted({x for drawn in axes.get_lines() for x in drawn.get_xdata()}) or [1]
        limit = [n * bandwidth / (n_bytes * cost["weights"] + n * 128 * cost["kv_bytes"]) for n in rows]
        axes.plot(rows, limit, color="grey", linewidth=1, label="the memory's limit")
        axes.set(title=kind, xlabel="rows, 128 tokens of context each")
    for name, speeds in results.get("long", {}).items():
        for rows in (1, 8):
            line(panels[3], speeds, name, rows)
    lengths = sorted({x for drawn in panels[3].get_lines() for x in drawn.get_xdata()}) or [128]
    for rows in (1, 8):
        limit = [rows * bandwidth / (2 * cost["weights"] + rows * n * cost["kv_bytes"]) for n in lengths]
        panels[3].plot(lengths, limit, color="grey", linewidth=1)
    panels[3].set(title="bfloat16: eight rows above, one below", xlabel="tokens of context")
    for axes in panels:
        axes.set(xscale="log", yscale="log", ylabel="tokens/s in all")
        ticks = sorted({x for drawn in axes.get_lines() for x in drawn.get_xdata()})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in panels[:3]:
        axes.legend(fontsize=7)
    figure.suptitle(f"{results['shape']}, {results['machine']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _numbers(text: str | int | tuple) -> list[int]:
    """1,8,32 as a command line may give it."""
    if isinstance(text, (tuple, list)):
        return [int(n) for n in text]
    return [int(n) for n in str(text).split(",") if n]


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
