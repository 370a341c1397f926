"""The options of a training run, checked. Knows nothing of how a run uses them."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llama.adapters import TARGETS

Learn = Literal["answers", "last", "all"]
Long = Literal["skip", "cut"]
Head = Literal["scalar"]
Format = Literal["meta", "hf"]
Dtype = Literal["float32", "bfloat16"]  # float16 would need its losses scaled


@dataclass(frozen=True)
class Options:
    """What is learned, and how."""

    max_seq_len: int = 2048  # the most tokens of a document
    learn: Learn = "answers"  # of a dialog: each of the assistant's turns, the last of them, or everything
    threshold: float | None = None  # learns every answer of `llama sample` with at least this score; else the best one
    # Divides the logits in the loss; use the temperature that the answers were drawn at.
    temperature: float = 1.0
    long: Long = "skip"  # skips or cuts documents longer than max_seq_len; both are counted
    head: Head | None = None  # "scalar" trains a reward model on pairs of `chosen` and `rejected`
    lora_rank: int | None = None  # trains an adapter of this rank, and freezes the weights
    lora_alpha: float | None = None  # the adapter's scale is lora_alpha / lora_rank; twice the rank when left out
    lora_targets: str | None = None  # the matrices that get an adapter, such as wq,wv; all seven when left out
    batch_tokens: int = 16384  # the most tokens of a step
    pass_tokens: int | None = None  # the most tokens of a forward pass; batch_tokens, at most 8192, when left out
    pack: bool = True  # whether documents share a row; they do not see each other
    epochs: float = 1.0  # how many times the run goes through the data; may be a fraction
    steps: int | None = None  # the most steps
    lr: float | None = None  # the largest learning rate; 1e-5 when left out, 2e-4 with an adapter
    warmup: float = 0.03  # the share of the steps in which the rate rises; then it falls like a cosine
    weight_decay: float = 0.0  # for all weights but the norms
    clip: float = 1.0  # the largest norm of a gradient; 0 for no limit
    eval_share: float = 0.0  # the share of the examples that is held out
    eval_every: int = 100  # steps from one evaluation to the next
    save_every: int = 100  # steps from one save to the next
    # The dtype of the computation; when left out, float32 for a float32 checkpoint, else bfloat16. Weights that learn
    # are float32.
    dtype: Dtype | None = None
    recompute: bool = False  # computes activations twice, to save memory
    seed: int = 1  # for the order of the data and the first weights of an adapter or a head
    to: Format | None = None  # the format to write; when left out the base's, and "hf" for a reward model

    def __post_init__(self):
        """Raises ValueError that names the first option out of range."""
        for names, expected, holds in RULES:
            for name in names.split():
                value = getattr(self, name)
                if not (value is None and name in OPTIONAL) and not holds(value):
                    raise ValueError(f"{name} = {value!r}: expected {expected}")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices and not (value is None and name in OPTIONAL):
                raise ValueError(f"{name} = {value!r}: expected one of {', '.join(map(repr, choices))}")
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise ValueError(f"lora_targets has {unknown[0]!r}: expected some of {', '.join(TARGETS)}")
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_targets is not None):
            raise ValueError("lora_alpha and lora_targets describe an adapter: expected lora_rank with them")

    @property
    def targets(self) -> tuple[str, ...]:
        return TARGETS if self.lora_targets is None else tuple(self.lora_targets.replace(",", " ").split())

    @property
    def alpha(self) -> float:
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


OPTIONAL = ("threshold", "head", "lora_rank", "lora_alpha", "pass_tokens", "steps", "lr", "dtype", "to")
COUNTS = "max_seq_len batch_tokens eval_every save_every lora_rank pass_tokens steps"
RULES = (
    (COUNTS, "an integer of at least 1", lambda value: type(value) is int and value >= 1),
    ("epochs temperature lr lora_alpha", "a number above 0", lambda value: _is_number(value) and value > 0),
    ("weight_decay clip", "a number of at least 0", lambda value: _is_number(value) and value >= 0),
    ("warmup eval_share", "a number of at least 0 and below 1", lambda value: _is_number(value) and 0 <= value < 1),
    ("threshold", "a number", _is_number),
    ("seed", "an integer", lambda value: type(value) is int),
    ("pack recompute", "True or False", lambda value: isinstance(value, bool)),
)
CHOICES = {name: get_args(kind) for name, kind in {"learn": Learn, "long": Long, "head": Head}.items()}
CHOICES |= {"to": get_args(Format), "dtype": get_args(Dtype)}
