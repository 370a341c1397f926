"""What a token costs on paper, from the shapes alone. `python -m benchmarks.scaling` prints docs/scaling.md's tables.

With a decode.json of `benchmarks.decode` (--measured), it also compares the measured points with the estimate.
"""

import json
import statistics
from pathlib import Path

import fire

from benchmarks.shapes import PARAMS, TIED
from llama.model import ModelArgs

SHAPES = {"llama-3.2-1b": "1B", "llama-3.1-8b": "8B", "llama-3.1-70b": "70B", "llama-3.1-405b": "405B"}
# NVIDIA's data sheet of the H100 SXM: memory bandwidth, bytes/s; dense bfloat16 operations/s; bytes of memory.
H100_READ, H100_MULTIPLY, H100_BYTES = 3.35e12, 989e12, 80e9
# A sum of some kilobytes over ranks is all latency. By number of ranks: 8 over NVLink, 16 over a network.
SECONDS_PER_SUM = {1: 0.0, 8: 10e-6, 16: 30e-6}
READS, MULTIPLIES = 0.85, 0.60  # the shares of these limits that we aim at


def token(args: ModelArgs) -> dict[str, float]:
    """For one token: weights read, those of the layers, bytes of keys and values, sums over ranks, bytes of each."""
    kv_dim = args.n_kv_heads * args.head_dim
    layer = 2 * args.dim * args.dim + 2 * args.dim * kv_dim + 3 * args.dim * args.hidden_dim
    return {
        "weights": args.n_layers * layer + args.vocab_size * args.dim,  # the embedding is looked up
        "layers": args.n_layers * layer,  # the tokens of a prompt use only these: only the last one needs logits
        "kv_bytes": args.n_layers * 2 * kv_dim * 2,
        "sums": 2 * args.n_layers + 1,  # after wo and w2 of each layer, and after the embedding
        "sum_bytes": args.dim * 2,
    }


def main(measured: str = "benchmarks/decode.json") -> None:
    """Prints the tables; MEASURED is a file that `benchmarks.decode` has written."""
    print("| bfloat16 | read per token | operations | keys and values per token | sums over ranks | bytes of each |")
    print("|---|---|---|---|---|---|")
    for name, short in SHAPES.items():
        cost = token(ModelArgs(**PARAMS[name]))
        print(
            f"| {short} | {cost['weights'] * 2 / 1e9:.1f} GB | {2 * cost['weights'] / 1e9:.1f} G | "
            f"{cost['kv_bytes'] / 1e3:.0f} kB | {cost['sums']} | {cost['sum_bytes'] / 1e3:.1f} kB |"
        )
    print("\n| decode, one row, tokens/s | 1 H100 | 8 H100 | 16 H100 | prefill on 8, tokens/s |")
    print("|---|---|---|---|---|")
    for name, short in SHAPES.items():
        args = ModelArgs(**PARAMS[name])
        cost, cells = token(args), []
        held = 2 * (cost["weights"] + (0 if name in TIED else args.vocab_size * args.dim))
        for n_ranks, seconds in SECONDS_PER_SUM.items():
            if held / n_ranks > H100_BYTES:
                cells.append("does not fit")
                continue
            reading = 2 * cost["weights"] / n_ranks / (READS * H100_READ)
            cells.append(f"{1 / (reading + (cost['sums'] + 1) * seconds):.0f}")  # one more for the logits
        # The sums of thousands of positions are left out: at 400 GB/s their bytes take a tenth of the time.
        prefill = MULTIPLIES * 8 * H100_MULTIPLY / (2 * cost["layers"])
        print(f"| {short} | {' | '.join(cells)} | {prefill:,.0f} |")
    if not Path(measured).is_file():
        return
    results = json.loads(Path(measured).read_text())
    bandwidth = statistics.median(results["read_bytes_per_second"])
    rate = statistics.median(results["matmul_per_second"])
    args = ModelArgs(**PARAMS[results["shape"]])
    cost = token(args)
    print(f"\nMeasured, {results['shape']}, {bandwidth / 1e9:.1f} GB/s and {rate / 1e9:.0f} GFLOP/s:\n")
    print("| ours compiled | tokens/s | on paper | |")
    print("|---|---|---|---|")
    for what, speeds in results["tokens_per_second"].get("ours compiled", {}).items():
        speed = statistics.median(speeds)
        if what.startswith("prefill"):
            paper = rate / (2 * cost["layers"])
        else:
            _, batch, _, context = what.split()
            read = 2 * cost["weights"] + int(batch) * int(context) * cost["kv_bytes"]
            paper = min(int(batch) * bandwidth / read, rate / (2 * cost["weights"]))
        print(f"| {what} | {speed:.1f} | {paper:.1f} | {100 * speed / paper:.0f} % |")


if __name__ == "__main__":
    fire.Fire(main)
