"""Random interleavings of questions and changes to a model, in float32, compared with a plain model.

    python -m benchmarks.interleavings [--n 10000] [--seed 0]

One `Llama` and one plain model (no packing, no cache, no reuse, no batch) have the same weights. Each step does one
thing to both: it answers some prompts, streams an answer (sometimes running or asking the model in between), runs the
network, adds or removes a hook, patches a class, edits or loads weights, casts there and back, or exchanges a module.
Every answer must equal the plain model's in the same state.
"""

import collections
import copy
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fire
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.shapes import write_tokenizer
from llama import Llama, ModelArgs, Tokenizer, Transformer, parallel
from llama.layers.packing import groups
from llama.model import Attention, FeedForward, RMSNorm, TransformerBlock

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "max_seq_len": 48}
MATRICES = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")] + [f"feed_forward.w{i}" for i in (1, 2, 3)]
WATCHED = ["norm", "output", "tok_embeddings", *(f"layers.{i}.{m}" for i in (0, 1) for m in MATRICES)]
WATCHED += [f"layers.{i}{part}" for i in (0, 1) for part in ("", ".attention", ".feed_forward", ".ffn_norm")]


class LowRank(nn.Module):
    """A matrix plus a product of two small ones."""

    def __init__(self, base: nn.Module, seed: int):
        super().__init__()
        self.base, generator = base, torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(0.2 * torch.randn(2, base.weight.shape[1], generator=generator), requires_grad=False)
        self.b = nn.Parameter(0.2 * torch.randn(base.weight.shape[0], 2, generator=generator), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Scaled(nn.Module):
    """A module whose output is scaled."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: object) -> torch.Tensor:
        return self.inner(*args) * 0.9


class Interleavings:
    """The two models, and the steps that change or ask both."""

    def __init__(self, seed: int, folder: Path):
        self.random = random.Random(seed)
        write_tokenizer(folder / "tokenizer.model", 256)
        tokenizer = Tokenizer(folder / "tokenizer.model")
        tokenizer.stop_tokens = set()
        self.n_tokens = tokenizer.n_words
        models = []
        for _ in range(2):
            model = Transformer(ModelArgs(**SHAPE, vocab_size=self.n_tokens, max_batch_size=3))
            model.init_weights(0.2, torch.Generator().manual_seed(seed))
            models.append(model.requires_grad_(False))
        self.start = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
        self.plain = models[1]
        self.plain.packable = False
        self.llama = Llama(models[0], tokenizer)
        self.undo: list[Callable[[], None]] = []  # each removes a hook, a patch or an exchanged module
        self.n_by_position = 0  # how many of the hooks change only the last position of a pass
        self.prompts = [[self.random.randrange(self.n_tokens) for _ in range(n)] for n in (1, 5, 20, 24, 30)]
        self.counts: collections.Counter[str] = collections.Counter()
        self.n_answers = self.n_packed = 0

    @property
    def both(self) -> tuple[Transformer, Transformer]:
        return self.llama.model, self.plain

    def step(self) -> None:
        """Runs one random action."""
        ask = [self.generate] * 4 + [self.stream, self.forward]
        change = [
            self.hook,
            self.hook_last,
            self.patch,
            self.take_off,
            self.edit,
            self.edit_data,
            self.load,
            self.cast,
            self.exchange,
            self.copy,
        ]
        action = self.random.choice(ask + change)
        self.counts[action.__name__] += 1
        action()
        self.n_packed += any(linear.pack is not None for group in groups(self.llama.model) for linear in group)

    # Questions

    def prompt(self) -> list[int]:
        prompt = self.random.choice(self.prompts)
        return prompt[: self.random.randint(1, len(prompt))] if self.random.random() < 0.3 else prompt

    @torch.inference_mode()
    def expected(self, prompt: list[int], n: int) -> list[int]:
        ids, logits = list(prompt), None
        for _ in range(n):
            if not self.n_by_position:  # the whole text again, without a cache
                logits = self.plain(torch.tensor([ids]))
            elif len(ids) == len(prompt):  # a hook changes each pass's last position, so the passes must be the same
                logits = self.plain(torch.tensor([ids]), 0)
            else:
                logits = self.plain(torch.tensor([ids[-1:]]), len(ids) - 1)
            ids.append(int(logits[0, -1].argmax()))
        return ids[len(prompt) :]

    def generate(self) -> None:
        prompts, n = [self.prompt() for _ in range(self.random.randint(1, 4))], self.random.choice([1, 3, 12])
        found = self.llama.generate(prompts, max_gen_len=n, temperature=0)[0]
        self.compare(found, [self.expected(prompt, n) for prompt in prompts])

    def stream(self) -> None:
        text = "".join(self.random.choices("abc", k=self.random.randint(0, 20)))
        prompt = self.llama.tokenizer.encode(text, bos=True, eos=False)
        stream = self.llama.stream_text(text, temperature=0, max_gen_len=4)
        found = next(stream, "")
        if self.random.random() < 0.3:
            self.random.choice([self.generate, self.forward])()
        found += "".join(stream)
        self.compare(found, self.llama.tokenizer.decode(self.expected(prompt, 4)))

    def forward(self) -> None:
        """Runs the network directly, in one or two pieces."""
        prompt = self.prompt()
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            cut = self.random.randint(1, len(prompt))

            def pieces(model: Transformer) -> torch.Tensor:
                logits = model.forward(tokens[:, :cut], 0)
                return model.forward(tokens[:, cut:], cut) if cut < len(prompt) else logits

            found = pieces(self.llama.model)
            expected = pieces(self.plain) if self.n_by_position else self.plain(tokens)[:, -found.shape[1] :]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        self.n_answers += 1

    def compare(self, found: object, expected: object) -> None:
        if found != expected:
            raise AssertionError(
                f"found {found}, but the plain model gives {expected}, after {sum(self.counts.values())} steps"
            )
        self.n_answers += 1

    # Changes

    def hook(self) -> None:
        if len(self.undo) > 4:
            return self.take_off()
        name, scale, before = self.random.choice(WATCHED), self.random.uniform(0.7, 1.2), self.random.random() < 0.3
        handles = []
        for model in self.both:
            module = model
            for part in name.split("."):
                while isinstance(module, Scaled) and part != "inner":
                    module = module.inner
                module = module.get_submodule(part)
            if before and name != "tok_embeddings":
                hook = module.register_forward_pre_hook(lambda m, inputs: (inputs[0] * scale, *inputs[1:]))
            else:
                hook = module.register_forward_hook(lambda m, inputs, output: output * scale)
            handles.append(hook)
        self.undo.append(lambda: [handle.remove() for handle in handles])

    def hook_last(self) -> None:
        """A hook that changes the last position of every pass: of a prompt, then of each token."""
        if len(self.undo) > 4:
            return self.take_off()
        name, size = self.random.choice(["layers.0", "layers.1", "norm"]), self.random.uniform(0.5, 2)

        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, -1, ::2] += size
            return output

        handles = [model.get_submodule(name).register_forward_hook(hook) for model in self.both]

        def remove() -> None:
            for handle in handles:
                handle.remove()
            self.n_by_position -= 1

        self.n_by_position += 1
        self.undo.append(remove)

    def patch(self) -> None:
        """Patches `forward` of a class that both models use."""
        cls, scale = (
            self.random.choice([FeedForward, Attention, RMSNorm, TransformerBlock]),
            self.random.uniform(0.8, 1.2),
        )
        forward = cls.forward
        cls.forward = lambda module, *args: forward(module, *args) * scale
        self.undo.append(lambda: setattr(cls, "forward", forward))

    def take_off(self) -> None:
        """Undoes the last hook, patch or exchange: in this order, because an exchanged module may hold another."""
        if self.undo:
            self.undo.pop()()

    def weight(self) -> str:
        return self.random.choice(list(self.start))

    @torch.no_grad()
    def edit(self) -> None:
        name, factor = self.weight(), self.random.uniform(0.8, 1.2)
        for model in self.both:
            for found, parameter in model.named_parameters():
                if found.replace(".inner", "").replace(".base", "") == name:
                    parameter.mul_(factor)

    def edit_data(self) -> None:
        layer, name, row = self.random.randrange(2), self.random.choice(MATRICES), self.random.randrange(16)
        for model in self.both:
            module = model.layers[layer]
            while isinstance(module, Scaled):
                module = module.inner
            module = module.get_submodule(name)
            weight = (module.base if isinstance(module, LowRank) else module).weight
            weight.data[row] += 0.05
        del weight

    def load(self) -> None:
        """Undoes everything and loads the first weights, so that edits do not add up to infinities."""
        while self.undo:
            self.take_off()
        assign = self.random.random() < 0.3
        for model in self.both:
            model.load_state_dict({name: tensor.clone() for name, tensor in self.start.items()}, assign=assign)
            model.requires_grad_(False)

    def cast(self) -> None:
        dtype = self.random.choice([torch.bfloat16, torch.float16, torch.float64])
        for model in self.both:
            model.to(dtype).float()

    def exchange(self) -> None:
        if len(self.undo) > 4:
            return self.take_off()
        layer, seed = self.random.randrange(2), self.random.randrange(100)
        name = self.random.choice([None, "attention.wq", "attention.wv", "feed_forward.w3", "feed_forward.w2"])
        put_back = []
        for model in self.both:
            if name is None:
                parent, key = model.layers, str(layer)
            else:
                block = model.layers[layer]
                while isinstance(block, Scaled):
                    block = block.inner
                parent, key = block.get_submodule(name.split(".")[0]), name.split(".")[1]
            old = getattr(parent, key)
            if isinstance(old, LowRank):
                return
            setattr(parent, key, Scaled(old) if name is None else LowRank(old, seed))
            put_back.append(lambda parent=parent, key=key, old=old: setattr(parent, key, old))
        self.undo.append(lambda: [back() for back in put_back])

    def copy(self) -> None:
        """Replaces the model with a copy of it."""
        while self.undo:
            self.take_off()
        self.llama.model = copy.deepcopy(self.llama.model)


def main(n: int = 10000, seed: int = 0) -> None:
    """Runs n steps, and prints how often each action was taken.

    Args:
        n: steps.
        seed: for all random choices.
    """
    torch.set_num_threads(1)
    parallel.initialize(device=torch.device("cpu"))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        steps = Interleavings(seed, Path(folder))
        for _ in range(n):
            steps.step()
    done = ", ".join(f"{count} {name}" for name, count in steps.counts.most_common())
    print(f"{n:,} steps in {time.perf_counter() - started:.0f} s: {done}")
    print(f"matrices were packed after {steps.n_packed:,} of them")
    print(f"{steps.n_answers:,} answers, each the plain model's")


if __name__ == "__main__":
    fire.Fire(main)
