"""Speculative decoding: tokens a step on the embedded checkpoint, and tokens/s with a target eight times its draft.

    python -m benchmarks.speculative acceptance
    python -m benchmarks.speculative speed [--rounds 2] [--acceptance 0.8,0]

`acceptance`: the drafts are the first layers of the embedded checkpoint with its last norm and output, and n-grams on
repetitive text. Besides tokens per step it prints the probability that the draft's token is accepted, and what it would
be by the rule of Leviathan et al. (sum(min(p, q))), both computed from the distributions at the answers' positions.

`speed`: random float32 weights. The draft runs, so that its cost counts; then each of its proposals is replaced by the
token that the target is known to choose, with the given probability, else by another. Three ways take turns: without
proposals, with proposals while they pay (like `Llama.build(draft=…)`), and always with proposals.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import fire
import torch

from benchmarks.shapes import write_tokenizer
from llama import Llama, ModelArgs, Tokenizer, Transformer, parallel
from llama.cli.arguments import DEMO
from llama.decoding.speculative import DraftModel
from llama.engine import Counters
from llama.sampling import filtered
from llama.sequence import Sequence

OPENINGS = ["Once upon a time", "One day", "The fox", "A king", "In the morning", "The little dog", "There was", "Anna"]
SETTINGS = {"greedy": {"temperature": 0}, "temperature 0.8, top_p 0.95": {"temperature": 0.8, "top_p": 0.95}}


def write_first_layers(folder: Path, n_layers: int) -> Path:
    """Writes the embedded checkpoint without its last layers to a directory."""
    folder.mkdir()
    state = torch.load(DEMO / "consolidated.00.pth", weights_only=True)
    last = {f"layers.{i}." for i in range(n_layers)}
    kept = {k: v for k, v in state.items() if not k.startswith("layers.") or k[: k.index(".", 7) + 1] in last}
    torch.save(kept, folder / "consolidated.00.pth")
    params = json.loads((DEMO / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"n_layers": n_layers}))
    (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    return folder


def both_acceptances(target: Llama, draft: Transformer, texts: list[list[int]], starts: list[int], options: dict):
    """The mean probability of acceptance at the positions from `starts` on: of the coupled race, and sum(min(p, q))."""
    coupled, best = [], []
    cache, target.model.cache = target.model.cache, None
    draft_cache, draft.cache = draft.cache, None
    for ids, start in zip(texts, starts):
        tokens = torch.tensor([ids])
        p, q = (_distributions(m(tokens)[0, start - 1 : -1], options) for m in (target.model, draft))
        best.append(torch.minimum(p, q).sum(-1))
        # i wins both races if no j arrives before it: probability 1 / sum_j max(p_j / p_i, q_j / q_i).
        for row_p, row_q in zip(p, q):
            both = ((row_p > 0) & (row_q > 0)).nonzero()
            slower = torch.maximum(row_p[None] / row_p[both], row_q[None] / row_q[both]).sum(-1)
            coupled.append((1 / slower).sum())
    target.model.cache, draft.cache = cache, draft_cache
    return torch.stack(coupled).mean().item(), torch.cat(best).mean().item()


def _distributions(logits: torch.Tensor, options: dict) -> torch.Tensor:
    """The probabilities that a token is drawn from, [T, vocab_size] float64."""
    if options["temperature"] == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    probs = torch.softmax(logits / options["temperature"], -1)
    settings = (torch.tensor([value], dtype=torch.float64) for value in (0.0, options["top_p"], 0.0))
    weights, ids = filtered(probs, *settings)
    weights = torch.zeros_like(probs, dtype=torch.float64).scatter(-1, ids, weights)
    return weights / weights.sum(-1, keepdim=True)


@torch.inference_mode()
def acceptance(max_gen_len: int = 100) -> None:
    """Prints tokens per step and acceptance on the embedded checkpoint.

    Args:
        max_gen_len: how many tokens each answer has.
    """
    size = {"max_seq_len": 256, "max_batch_size": 8, "device": "cpu", "dtype": "float32"}
    with tempfile.TemporaryDirectory() as name:
        drafts = {f"first {n} of 5 layers": write_first_layers(Path(name) / str(n), n) for n in (1, 2, 3, 4)}
        plain = Llama.build(DEMO, **size)
        plain.tokenizer.stop_tokens = set()
        prompts = [plain.tokenizer.encode(text, bos=True) for text in OPENINGS * 4]
        stories, _ = plain.generate(prompts[:8], 20, temperature=0)
        repeating = [p[:1] + 3 * (p[1:] + s) + p[1:] for p, s in zip(prompts, stories)]  # a beginning three times
        for label, texts, proposers in (
            ("stories", prompts, drafts | {"n-grams": "ngram"}),
            ("repetitive text", repeating * 4, {"n-grams": "ngram"}),
        ):
            for setting, options in SETTINGS.items():
                expected, _ = plain.generate(texts, max_gen_len, seed=1, **options)
                for what, draft in proposers.items():
                    llama = Llama.build(DEMO, draft=draft, **size)
                    llama._engine.payoff.clock = lambda: 0.0  # so that no proposal seems too slow
                    llama.tokenizer.stop_tokens = set()
                    same = llama.generate(texts, max_gen_len, seed=1, **options)[0] == expected
                    counters, counts = llama._engine.counters, llama._engine.counters.speculation
                    line = f"{label}, {setting}, {what}: {counters.decoded / counts.steps:.2f} tokens a step, "
                    line += f"{counts.accepted} of {counts.proposed} proposals accepted"
                    if draft != "ngram":
                        whole = [prompt + answer for prompt, answer in zip(texts, expected)]
                        starts = [len(prompt) for prompt in texts]
                        both = both_acceptances(llama, llama._engine.proposer.model, whole, starts, options)
                        line += f"; of single tokens {both[0]:.1%}, by Leviathan's rule {both[1]:.1%}"
                    print(line + f"; answers {'the same' if same else 'DIFFERENT'}")


class KnownAnswer:
    """Runs a draft, but proposes the known answer of each sequence with some probability, else wrong tokens."""

    def __init__(self, draft: Transformer, probability: float, vocab_size: int):
        self.draft = DraftModel(draft)
        self.probability, self.vocab_size = probability, vocab_size
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.generator = torch.Generator().manual_seed(0)

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        proposals = self.draft.propose(sequences, limits)
        for sequence, ids in zip(sequences, proposals):
            known = self.answers[tuple(sequence.prompt)][len(sequence.tokens) :]
            right = torch.rand(len(ids), generator=self.generator) < self.probability
            ids[:] = [a if r else (a + 1) % self.vocab_size for a, r in zip(known, right.tolist())]
        return proposals

    def forget(self) -> None:
        self.draft.forget()


def _parameters(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def speed(rounds: int = 2, acceptance: str = "0.8,0", new_tokens: int = 128) -> None:
    """Prints tokens/s without proposals, and with proposals that are right with a known probability.

    Args:
        rounds: how many turns each has.
        acceptance: the probabilities that a proposed token is right, separated by commas.
        new_tokens: how many tokens each answer has.
    """
    parallel.initialize(device=torch.device("cpu"))
    common = {"vocab_size": 8_192, "multiple_of": 64, "max_seq_len": 256}
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(Path(name) / "tokenizer.model", common["vocab_size"] - 256)
        tokenizer = Tokenizer(Path(name) / "tokenizer.model")
    tokenizer.stop_tokens = set()
    probabilities = acceptance if isinstance(acceptance, (tuple, list)) else str(acceptance).split(",")
    for rows in (1, 4):
        target = Transformer(ModelArgs(dim=1024, n_layers=14, n_heads=16, max_batch_size=rows, **common))
        draft = Transformer(ModelArgs(dim=512, n_layers=5, n_heads=8, max_batch_size=rows, **common))
        for model in (target, draft):
            model.init_weights(generator=generator)
            model.requires_grad_(False)
        sizes = [_parameters(model) / 1e6 for model in (target, draft)]  # before packing, which empties parameters
        prompts = torch.randint(0, 7_000, (rows, 16), generator=generator).tolist()
        without = Llama(target, tokenizer)
        answers, _ = without.generate(prompts, new_tokens, temperature=0)
        for probability in map(float, probabilities):
            proposer = KnownAnswer(draft, probability, common["vocab_size"])
            proposer.answers = {tuple(prompt): answer for prompt, answer in zip(prompts, answers)}
            ways = {name: Llama(target, tokenizer, proposer=proposer) for name in ("while they pay", "always")}
            ways["always"]._engine.payoff.clock = lambda: 0.0
            rates = _rates({"none": without} | ways, prompts, answers, rounds)
            counters = ways["while they pay"]._engine.counters
            print(
                f"target {sizes[0]:.0f} M, draft {sizes[1]:.0f} M parameters, {rows} row(s), {probability:.0%} right: "
                f"{rates['none']:.1f} tokens/s without; with proposals while they pay {rates['while they pay']:.1f} "
                f"({rates['while they pay'] / rates['none']:.2f} x, at least 0.98), always {rates['always']:.1f} "
                f"({rates['always'] / rates['none']:.2f} x); {counters.decoded / counters.speculation.steps:.2f} "
                "tokens a step",
                flush=True,
            )


def _rates(ways: dict[str, Llama], prompts: list[list[int]], answers: list, rounds: int) -> dict[str, float]:
    """Tokens/s of each way, medians of rounds in which they take turns."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):  # the first warms up
        for way, llama in ways.items():
            llama._engine.counters = Counters()
            llama._engine.slots.forget()
            started = time.perf_counter()
            if llama.generate(prompts, len(answers[0]), temperature=0)[0] != answers:
                raise RuntimeError(f"{way} gave other answers")
            if turn:
                seconds[way].append(time.perf_counter() - started)
    n_tokens = sum(map(len, answers))
    return {way: n_tokens / statistics.median(times) for way, times in seconds.items()}


if __name__ == "__main__":
    fire.Fire({"acceptance": acceptance, "speed": speed})
