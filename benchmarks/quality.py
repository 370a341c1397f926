"""What int8 and int4 cost in perplexity: `python -m benchmarks.quality`.

The embedded checkpoint reads texts that the generator of its training data makes with a new seed. stories260K, if
../shared has it, reads texts that it samples itself in float32. Perplexity is over all tokens together.
"""

import itertools
import math
from pathlib import Path

import fire

from demo import corpus
from llama import Llama, Tokenizer
from llama.training.examples import Reader

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo" / "checkpoint"
STORIES = ROOT.parent / "shared" / "checkpoints" / "stories260K"
SEED = 2_000_000_011  # no seed of the training data


def demo_texts(n: int) -> list[list[int]]:
    """Ids of documents like those that the embedded checkpoint was trained on."""
    reader = Reader(Tokenizer(DEMO / "tokenizer.model"), max_seq_len=256)
    drawn = corpus.documents(SEED)
    texts = ((reader.text(d) if isinstance(d, str) else reader.dialog(d)).ids for d in drawn)
    return list(itertools.islice((text for text in texts if 2 <= len(text) <= 256), n))


def stories_texts(n: int) -> list[list[int]]:
    llama = build(STORIES, dtype="float32")
    prompt = [llama.tokenizer.bos_id]
    tokens, _ = llama.generate([prompt], 255, temperature=1, top_p=1, num_return_sequences=n, seed=1)
    return [prompt + answer for answer in tokens]


def build(folder: Path, **options) -> Llama:
    return Llama.build(folder, max_seq_len=512, max_batch_size=8, device="cpu", **options)


def perplexity(llama: Llama, texts: list[list[int]]) -> float:
    logprobs = [value for score in llama.score(texts) for value in score["logprobs"][1:]]
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def main(n: int = 200) -> None:
    for name, folder, make in (("embedded", DEMO, demo_texts), ("stories260K", STORIES, stories_texts)):
        if not folder.is_dir():
            print(f"{name}: absent")
            continue
        texts = make(n)
        plain = perplexity(build(folder, dtype="bfloat16"), texts)
        print(f"{name}: {n} texts of {sum(map(len, texts)):,} tokens, perplexity in bfloat16 {plain:.4f}")
        for kind in ("int8", "int4"):
            rounded = perplexity(build(folder, dtype="bfloat16", quantize=kind), texts)
            print(f"{name}: {kind} {rounded:.4f} ({100 * (rounded / plain - 1):+.2f} %)")


if __name__ == "__main__":
    fire.Fire(main)
