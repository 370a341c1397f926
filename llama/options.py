"""How an answer is decoded: every keyword of `generate` in one checked record, one for each prompt.

Knows nothing of models or text. The names are those of Transformers and vLLM.
"""

import math
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Rational, Real
from typing import Any

import torch

# (ids so far [1, T], logits [1, vocab_size]) -> logits [1, vocab_size]: the face of Transformers' LogitsProcessor.
LogitsProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# The most answers to one prompt. They are all set up at once: without a limit, a mistyped number in one line of a data
# set would take all the memory there is.
MAX_SEQUENCES = 10_000

# The least and the most that a number may be. Within these float32 neither overflows nor rounds to zero, whatever the
# options are together, and integers fit into int64 tensors.
MAX_INT = 2**63 - 1
LIMITS = {
    "max_gen_len": (0, MAX_INT),
    "temperature": (0, 1e30),
    "top_p": (1e-30, 1),
    "top_k": (0, MAX_INT),
    "repetition_penalty": (1e-6, 1e6),
    "no_repeat_ngram_size": (0, MAX_INT),
    "num_return_sequences": (1, MAX_SEQUENCES),
    "num_beams": (1, MAX_SEQUENCES),
    "seed": (-(2**63), 2**64 - 1),
    "top_logprobs": (0, MAX_INT),
}
MAX_BIAS = 1e30


@dataclass(frozen=True)
class DecodingOptions:
    """How the answers to one prompt are decoded. `per_prompt` makes one for each prompt of a call.

    Attributes:
        max_gen_len: the most new tokens of an answer; None: as many as fit.
        temperature: divides the logits before sampling; 0 takes the most likely token each time.
        top_p: samples from the smallest set of tokens that holds this much of the probability, in (0, 1].
        top_k: samples from the k most likely tokens (and those tied with the last); None or 0: from all.
        min_p: drops tokens less than min_p times as likely as the most likely one, in [0, 1] (arXiv 2407.01082).
        repetition_penalty: divides the logits above 0, and multiplies those below, of every token of the prompt and
            the answer so far (CTRL, arXiv 1909.05858); 1 is none.
        no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and answer; 0: no such rule.
        num_return_sequences: answers to each prompt, at most 10,000.
        num_beams: beam search with so many beams if more than 1; needs temperature 0.
        length_penalty: a beam's score is its log-probability / length ** length_penalty.
        early_stopping: when a beam search ends: True, False or "never", as in Transformers.
        stop: strings that end the answer where they begin, and ids of tokens that do; neither is part of it.
        logit_bias: added to the logits of the ids it names.
        seed: makes the answers reproducible.
        logits_processor: called as Transformers' with ids [1, T] and logits [1, vocab_size]; returns logits.
        top_logprobs: how many of the most likely tokens to report at each position.
    """

    max_gen_len: int | None = None
    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop: str | int | list[str | int] | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    logits_processor: LogitsProcessor | None = None
    top_logprobs: int = 0

    def __post_init__(self):
        integer, number = _is_int, _is_number
        _require(
            self, "max_gen_len", "an integer of at least 0, or None", lambda v: v is None or (integer(v) and v >= 0)
        )
        _require(self, "temperature", "a finite number of at least 0", lambda v: number(v) and v >= 0)
        _require(self, "top_p", "a number in (0, 1]", lambda v: number(v) and 0 < v <= 1)
        _require(self, "top_k", "an integer of at least 0, or None", lambda v: v is None or (integer(v) and v >= 0))
        _require(self, "min_p", "a number in [0, 1], or None", lambda v: v is None or (number(v) and 0 <= v <= 1))
        _require(self, "repetition_penalty", "a number above 0", lambda v: number(v) and v > 0)
        for name in ("no_repeat_ngram_size", "top_logprobs"):
            _require(self, name, "an integer of at least 0", lambda v: integer(v) and v >= 0)
        for name in ("num_return_sequences", "num_beams"):
            _require(self, name, "an integer of at least 1", lambda v: integer(v) and v >= 1)
        _require(self, "length_penalty", "a number from -50 to 50", lambda v: number(v) and -50 <= v <= 50)
        _require(self, "early_stopping", "True, False or 'never'", lambda v: v is True or v is False or v == "never")
        _require(self, "seed", "an integer, or None", lambda v: v is None or integer(v))
        _require(self, "logits_processor", "a callable, or None", lambda v: v is None or callable(v))
        _require(self, "stop", "strings that are not empty and token ids", lambda _: all(map(_is_stop, self.stops)))
        bias = f"a dictionary of token ids to numbers or -inf, of at most {MAX_BIAS}"
        _require(self, "logit_bias", bias, lambda v: v is None or _is_bias(v))
        for name in LIMITS:
            _require_within_limits(self, name)
        if self.num_beams > 1:
            if self.temperature > 0:
                raise ValueError(
                    f"num_beams = {self.num_beams} with temperature = {self.temperature}: a beam search does not "
                    "sample, so expected temperature = 0 with it (top_p, top_k and min_p then have no part)"
                )
            if self.top_logprobs or any(isinstance(stop, str) for stop in self.stops):
                raise ValueError(
                    f"num_beams = {self.num_beams} with top_logprobs or a stop string: "
                    "expected neither in a beam search (ids in `stop` are fine)"
                )
            if self.num_return_sequences > self.num_beams:
                raise ValueError(
                    f"num_return_sequences = {self.num_return_sequences} with num_beams = {self.num_beams}: "
                    "expected at most as many answers as beams"
                )

    @property
    def stops(self) -> list[str | int]:
        """`stop` as a list."""
        if self.stop is None:
            return []
        return list(self.stop) if isinstance(self.stop, (list, tuple, set, frozenset)) else [self.stop]

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on more than the model."""
        none = self.repetition_penalty == 1 and self.no_repeat_ngram_size == 0
        return bool(self.logit_bias) or not none or self.logits_processor is not None

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if an option names a token that the model does not have."""
        for name, ids in (("stop", [s for s in self.stops if _is_int(s)]), ("logit_bias", self.logit_bias or ())):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise ValueError(f"{name} names token {_shown(token)}: expected ids from 0 to {vocab_size - 1}")
        if self.top_logprobs > vocab_size:
            raise ValueError(f"top_logprobs = {self.top_logprobs}: expected at most the {vocab_size} tokens there are")


NAMES = tuple(field.name for field in fields(DecodingOptions))


def per_prompt(n_prompts: int, **options: Any) -> list[DecodingOptions]:
    """The options of each prompt; a list among the values holds one value for each prompt.

    For `stop`, whose value may itself be a list, that is a list with a list or None in it.

    Raises:
        ValueError: a value is out of range or contradicts another, or a list is not as long as there are prompts.
        TypeError: an option has a name that is none.
    """
    _check_names(options)
    # Arrays and tensors, and single numbers of theirs, are taken for what they hold.
    options = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in options.items()}
    lists = {name: value for name, value in options.items() if _is_per_prompt(name, value)}
    for name, values in lists.items():
        if len(values) != n_prompts:
            raise ValueError(f"{name} is a list of {len(values)}: expected one value for each of {n_prompts} prompts")
    if not lists:
        return [DecodingOptions(**options)] * n_prompts
    result = []
    for index in range(n_prompts):
        try:
            result.append(DecodingOptions(**options | {name: values[index] for name, values in lists.items()}))
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
    return result


def from_json(options: dict[str, Any]) -> dict[str, Any]:
    """Decoding options as a file has them. Raises TypeError.

    The ids of a logit_bias are strings in JSON, and pandas writes the integers of a column as 5.0 if one is missing.
    """
    _check_names(options)
    is_whole = {name: isinstance(value, float) and value.is_integer() for name, value in options.items()}
    options = {name: int(value) if is_whole[name] else value for name, value in options.items()}
    bias = options.get("logit_bias")
    if isinstance(bias, dict):
        is_id = re.compile(r"\d{1,18}", re.ASCII).fullmatch
        ids = {int(key) if isinstance(key, str) and is_id(key) else key: value for key, value in bias.items()}
        options = options | {"logit_bias": ids}
    return options


def _check_names(options: Iterable[str]) -> None:
    for name in options:
        if name not in NAMES:
            raise TypeError(f"{name!r} is not a decoding option: expected one of {', '.join(sorted(NAMES))}")


def _is_per_prompt(name: str, value: Any) -> bool:
    if name == "stop":
        return isinstance(value, list) and any(item is None or isinstance(item, (list, tuple, set)) for item in value)
    return isinstance(value, (list, tuple)) and not callable(value)  # Transformers' LogitsProcessorList is both


def _require(options: DecodingOptions, name: str, expected: str, is_right: Callable[[Any], bool]) -> None:
    value = getattr(options, name)
    if not is_right(value):
        raise ValueError(f"{name} = {_shown(value)}: expected {expected}")


def _require_within_limits(options: DecodingOptions, name: str) -> None:
    value, (least, most) = getattr(options, name), LIMITS[name]
    if value is not None and not least <= value <= most:
        limit = most if value > most else least
        shown = f"{limit:,}" if isinstance(limit, int) else limit
        raise ValueError(f"{name} = {_shown(value)}: expected at {'most' if limit == most else 'least'} {shown}")


def _shown(value: Any) -> str:
    """A value for a message, cut to a line."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of thousands of digits"


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(value, Rational) and not isinstance(value, Integral):  # a tensor cannot be multiplied by a Fraction
        return False
    return is_real and -sys.float_info.max <= value <= sys.float_info.max  # integers can be beyond


def _is_stop(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, str) and value != "")


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_int(token) and (bias == -math.inf or (_is_number(bias) and bias <= MAX_BIAS))
        for token, bias in value.items()
    )
