"""How an answer is decoded: the options of one prompt in one checked record.

The names are those of Transformers and vLLM. Knows nothing of models or text.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from llama.keywords import LogitsProcessor, unknown

# The most answers to one prompt. All of them are set up at once, so without a limit one mistyped number in a data set
# could take all memory.
MAX_SEQUENCES = 10_000

# The type of each number, its minimum and its maximum. Within these limits float32 neither overflows nor rounds to zero
# in any combination of options, and integers fit into int64 tensors.
MAX_INT = 2**63 - 1
NUMBERS = {
    "max_gen_len": (Integral, 0, MAX_INT),
    "temperature": (Real, 0, 1e30),
    "top_p": (Real, 1e-30, 1),
    "top_k": (Integral, -1, MAX_INT),
    "min_p": (Real, 0, 1),
    "repetition_penalty": (Real, 1e-6, 1e6),
    "no_repeat_ngram_size": (Integral, 0, MAX_INT),
    "presence_penalty": (Real, -2, 2),
    "frequency_penalty": (Real, -2, 2),
    "num_return_sequences": (Integral, 1, MAX_SEQUENCES),
    "num_beams": (Integral, 1, MAX_SEQUENCES),
    "length_penalty": (Real, -50, 50),
    "seed": (Integral, -(2**63), 2**64 - 1),
    "top_logprobs": (Integral, 0, MAX_INT),
}
MAX_BIAS = 1e30


@dataclass(frozen=True)
class DecodingOptions:
    """How the answers to one prompt are decoded. `per_prompt` creates one for each prompt of a call."""

    max_gen_len: int | None = None  # the most new tokens of an answer; None: as many as fit
    # Divides the logits before sampling; 0 takes the most likely token each time. None: 0.6, or 0 in a beam search.
    temperature: float | None = None
    top_p: float = 0.9  # samples from the smallest set of tokens with at least this probability together, in (0, 1]
    # Samples from the k most likely tokens and those as likely as the k-th; None, 0 or -1: from all tokens.
    top_k: int | None = None
    min_p: float | None = None  # drops tokens less than min_p times as likely as the likeliest (arXiv 2407.01082)
    # For each token of the prompt and the answer so far, divides its logit if positive and multiplies it if negative
    # (CTRL, arXiv 1909.05858); 1 changes nothing.
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # no n-gram of this size occurs twice in prompt and answer; 0: no limit
    presence_penalty: float = 0.0  # subtracted from the logit of each token of the answer so far, -2 to 2
    frequency_penalty: float = 0.0  # subtracted once for each occurrence of the token in the answer so far, -2 to 2
    num_return_sequences: int = 1  # answers to each prompt, at most 10,000
    num_beams: int = 1  # more than 1: beam search with this many beams; needs temperature 0
    length_penalty: float = 1.0  # a beam's score is its log-probability / length ** length_penalty
    early_stopping: bool | str = False  # when a beam search ends: True, False or "never", as in Transformers
    # Strings and token ids that end the answer; the answer does not contain them.
    stop: str | int | list[str | int] | None = None
    logit_bias: Mapping[int, float] | None = None  # for some token ids, a number to add to the logit
    seed: int | None = None  # makes the answers reproducible
    # Constraints on the answer, at most one of these (`llama.decoding.grammar`):
    json_schema: Mapping[str, Any] | str | None = None  # the answer is JSON that fits this schema
    regex: str | None = None  # the whole answer matches this regular expression, in Rust's syntax
    choice: list[str] | None = None  # the answer is one of these texts
    grammar: str | None = None  # the answer fits this grammar, in Lark's notation
    logits_processor: LogitsProcessor | None = None  # called as in Transformers; returns logits [1, vocab_size]
    top_logprobs: int = 0  # how many of the most likely tokens to report at each position
    # Cuts a prompt on the "left" or "right" until max_gen_len tokens fit after it, or a quarter of max_seq_len if that
    # is less. A dialog is cut in its longest message. None: a prompt that does not fit is an error.
    truncate: str | None = None

    def __post_init__(self):
        for name, (kind, least, most) in NUMBERS.items():
            value, may_be_none = getattr(self, name), self.__dataclass_fields__[name].default is None
            is_kind = isinstance(value, kind) and not isinstance(value, (bool, Fraction))  # PyTorch refuses Fraction
            if (is_kind and least <= value <= most) or (value is None and may_be_none):
                continue
            expected = "an integer" if kind is Integral else "a number"
            if is_kind and value == value:  # not NaN
                expected += f" of at least {least:,}" if value < least else f" of at most {most:,}"
            raise _mistake(self, name, expected + (", or None" if may_be_none else ""))
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise _mistake(self, "early_stopping", "True, False or 'never'")
        if self.truncate not in (None, "left", "right"):
            raise _mistake(self, "truncate", "'left' or 'right', or None")
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise _mistake(self, "logits_processor", "a callable, or None")
        if self.stop is not None and not all(map(_is_stop, self.stops)):
            raise _mistake(self, "stop", "strings that are not empty and token ids")
        if self.logit_bias is not None and not _is_bias(self.logit_bias):
            raise _mistake(self, "logit_bias", f"a dictionary of token ids to numbers of at most {MAX_BIAS}, or -inf")
        if self.temperature is None:
            object.__setattr__(self, "temperature", 0.0 if self.num_beams > 1 else 0.6)
        if self.top_k == -1:  # vLLM's
            object.__setattr__(self, "top_k", None)
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        """Raises ValueError if an option cannot be combined with beam search."""
        if self.temperature > 0:
            raise ValueError(
                f"num_beams = {self.num_beams} with temperature = {self.temperature}: a beam search does not "
                "sample, so expected temperature = 0 with it (top_p, top_k and min_p then have no effect)"
            )
        if self.top_logprobs or self.stop_strings:
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
    def stop_strings(self) -> list[str]:
        """The strings in `stops`."""
        return [stop for stop in self.stops if isinstance(stop, str)] if self.stop is not None else []

    @property
    def stop_ids(self) -> frozenset[int]:
        """The token ids in `stops`."""
        return frozenset(self.stops).difference(self.stop_strings) if self.stop is not None else frozenset()

    def check_model(self, vocab_size: int, max_batch_size: int, name: str = "") -> None:
        """Raises ValueError if a token id or num_beams is too large for the model. Its message begins with `name`."""
        stop_ids = () if self.stop is None else self.stop_ids
        for option, ids in (("stop", stop_ids), ("logit_bias", self.logit_bias or ())):
            for token in ids:
                if not 0 <= token < vocab_size:
                    found = f"{name}{option} names token {shown(token)}"
                    raise ValueError(f"{found}: expected ids from 0 to {vocab_size - 1}")
        if self.top_logprobs > vocab_size:
            found = f"top_logprobs = {self.top_logprobs}"
            raise ValueError(f"{name}{found}: expected at most {vocab_size}, the size of the vocabulary")
        if self.num_beams > max_batch_size:
            found = f"num_beams = {self.num_beams}: expected at most max_batch_size = {max_batch_size}"
            raise ValueError(f"{name}{found}, which `Llama.build` sets")


NAMES = tuple(field.name for field in fields(DecodingOptions))


def per_prompt(n_prompts: int, **options: Any) -> list[DecodingOptions]:
    """Returns the options of each prompt. A value that is a list has one element for each prompt.

    A single `stop` or `choice` may be a list too: those have one element for each prompt if any element is a list or
    None. Raises ValueError for a value or a length out of range, and TypeError for an unknown option.
    """
    lists = {}
    for name, value in options.items():
        if name not in NAMES:
            raise TypeError(unknown(name, NAMES))
        # Arrays, tensors and their scalars become lists and numbers.
        options[name] = value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, (list, tuple)) and _is_per_prompt(name, value):
            lists[name] = value
            if len(value) != n_prompts:
                raise ValueError(f"{name} is a list of {len(value)}: expected as many values as prompts, {n_prompts}")
    if not lists:
        return [DecodingOptions(**options)] * n_prompts
    result = []
    for index in range(n_prompts):
        try:
            result.append(DecodingOptions(**options | {name: values[index] for name, values in lists.items()}))
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
    return result


def check_flags(**flags: Any) -> None:
    """Raises TypeError for a value other than True and False: a string such as "no" would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            found = f"{name} = {shown(value)}: expected True or False"
            raise TypeError(found + " (for the likeliest tokens, top_logprobs)" * (name == "logprobs"))


def as_list(name: str, values: Any, what: str, single: str) -> list:
    """Returns the elements of an iterable as a list. Raises TypeError for other types, texts and dictionaries."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        hint = f", so pass [{single}]" if isinstance(values, (str, bytes, Mapping)) else ""
        raise TypeError(f"{name} is a {type(values).__name__}: expected a list of {what}{hint}")
    return list(values)


def check_ids(name: str, ids: Any, vocab_size: int, limit: int | None) -> list[int]:
    """Returns token ids as a list of int. `ids` may be a list, a tuple, an array or a tensor.

    Raises ValueError or TypeError if there are no ids, more than `limit` (max_seq_len; None: no limit), or ids outside
    0 to vocab_size - 1. The message begins with `name`.
    """
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(ids, (list, tuple)):
        kind = type(ids).__name__
        raise TypeError(f"{name} is a {kind}: expected a list of token ids (`text_completion` takes texts)")
    if len(ids) == 0:
        raise ValueError(f"{name} is empty: expected at least one token id, such as the tokenizer's bos_id")
    if limit is not None and len(ids) > limit:
        found = f"{name} has {len(ids):,} tokens"
        raise ValueError(f"{found}: expected at most max_seq_len = {limit:,}; truncate = 'left' or 'right' cuts it")
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= token < vocab_size:
            raise ValueError(f"{name} has {token!r} among its ids: expected integers from 0 to {vocab_size - 1}")
    return list(map(int, ids))


def _is_per_prompt(name: str, value: list | tuple) -> bool:
    if name in ("stop", "choice"):
        return isinstance(value, list) and any(item is None or isinstance(item, (list, tuple, set)) for item in value)
    return not callable(value)  # Transformers' LogitsProcessorList is a list and callable


def _mistake(options: DecodingOptions, name: str, expected: str) -> ValueError:
    return ValueError(f"{name} = {shown(getattr(options, name))}: expected {expected}")


def shown(value: Any) -> str:
    """A value as text for an error message, cut to one line."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of thousands of digits"


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_stop(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, str) and value != "")


def _is_bias(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(map(_is_int, value)):
        return False
    numbers = [bias for bias in value.values() if isinstance(bias, Real) and not isinstance(bias, (bool, Fraction))]
    return len(numbers) == len(value) and all(b == -math.inf or -1e308 <= b <= MAX_BIAS for b in numbers)
