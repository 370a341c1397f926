"""How an answer is decoded: every keyword of `generate` in one checked record, one for each prompt.

Knows nothing of models or text. The names are those of Transformers and vLLM.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch

# (ids so far [1, T], logits [1, vocab_size]) -> logits [1, vocab_size]: the face of Transformers' LogitsProcessor.
LogitsProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

PENALTIES = ("logit_bias", "repetition_penalty", "no_repeat_ngram_size", "logits_processor")
PENALTIES += ("presence_penalty", "frequency_penalty")

# The options that give the answer its shape; at most one of them.
SHAPES = ("json_schema", "regex", "choice", "grammar")

# The most answers to one prompt. They are all set up at once: with no such limit a slip of the pen in one line of a
# data set takes all the memory there is.
MAX_SEQUENCES = 10_000


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
        presence_penalty: subtracted from the logits of every token of the answer so far, -2 to 2.
        frequency_penalty: subtracted from them as often as the token has occurred in the answer, -2 to 2.
        num_return_sequences: answers to each prompt, at most 10,000.
        num_beams: beam search with so many beams if more than 1; needs temperature 0.
        length_penalty: a beam's score is its log-probability / length ** length_penalty.
        early_stopping: when a beam search ends: True, False or "never", as in Transformers.
        stop: strings that end the answer where they begin, and ids of tokens that do; neither is part of it.
        logit_bias: added to the logits of the ids it names.
        seed: makes the answers reproducible.
        json_schema: the answer is JSON that fits this schema, a dictionary or JSON text (json-schema.org).
        regex: the whole answer matches this regular expression (the syntax of Rust's regex).
        choice: the answer is one of these strings.
        grammar: the answer fits this grammar, in Lark's notation (`llama.decoding.grammar`).
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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop: str | int | list[str | int] | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
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
        for name in ("presence_penalty", "frequency_penalty"):
            _require(self, name, "a number from -2 to 2", lambda v: number(v) and -2 <= v <= 2)
        _check_shape(self)
        for name in ("no_repeat_ngram_size", "top_logprobs"):
            _require(self, name, "an integer of at least 0", lambda v: integer(v) and v >= 0)
        for name in ("num_return_sequences", "num_beams"):
            _require(self, name, "an integer of at least 1", lambda v: integer(v) and v >= 1)
        _require(self, "num_return_sequences", f"at most {MAX_SEQUENCES:,}", lambda v: v <= MAX_SEQUENCES)
        _require(self, "length_penalty", "a number from -50 to 50", lambda v: number(v) and -50 <= v <= 50)
        _require(self, "early_stopping", "True, False or 'never'", lambda v: v is True or v is False or v == "never")
        _require(self, "seed", "an integer, or None", lambda v: v is None or integer(v))
        _require(self, "logits_processor", "a callable, or None", lambda v: v is None or callable(v))
        _require(self, "stop", "strings that are not empty and token ids", lambda _: all(map(_is_stop, self.stops)))
        _require(self, "logit_bias", "a dictionary of token ids to numbers or -inf", lambda v: v is None or _is_bias(v))
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
        none = none and self.presence_penalty == 0 and self.frequency_penalty == 0
        return bool(self.logit_bias) or not none or self.logits_processor is not None

    @property
    def shape(self) -> tuple[str, str] | None:
        """The shape that the answer is to have: which of `SHAPES`, and its text; JSON of a dictionary or a list."""
        for name in SHAPES:
            if (value := getattr(self, name)) is not None:
                return name, value if isinstance(value, str) else json.dumps(value)
        return None

    @property
    def penalties(self) -> dict[str, Any]:
        """What the logits depend on besides the model, as `sampling.process_logits` takes it."""
        return {name: getattr(self, name) for name in PENALTIES}

    @property
    def penalty_names(self) -> str:
        """Those of them that are in use."""
        return " and ".join(n for n in PENALTIES if getattr(self, n) != self.__dataclass_fields__[n].default)

    def check_model(self, vocab_size: int, max_batch_size: int, name: str = "") -> None:
        """Raises ValueError, its message begun by `name`, if an option asks for what the model does not have.

        Args:
            vocab_size: how many tokens it has.
            max_batch_size: how many rows its cache has, one for each beam.
        """
        for option, ids in (("stop", [s for s in self.stops if _is_int(s)]), ("logit_bias", self.logit_bias or ())):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise ValueError(f"{name}{option} names token {token}: expected ids from 0 to {vocab_size - 1}")
        if self.top_logprobs > vocab_size:
            found = f"top_logprobs = {self.top_logprobs}"
            raise ValueError(f"{name}{found}: expected at most the {vocab_size} tokens there are")
        if self.num_beams > max_batch_size:
            found = f"num_beams = {self.num_beams}: expected at most max_batch_size = {max_batch_size}"
            raise ValueError(f"{name}{found}, which `Llama.build` sets")


NAMES = tuple(field.name for field in fields(DecodingOptions))


def per_prompt(n_prompts: int, **options: Any) -> list[DecodingOptions]:
    """The options of each prompt; a list among the values holds one value for each prompt.

    For `stop` and `choice`, whose values may be lists, that is a list with a list or None in it.

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


def check_ids(name: str, ids: Any, vocab_size: int, limit: int | None) -> list[int]:
    """Token ids as a list of int, whatever holds them: a list, a tuple, an array or a tensor.

    Args:
        name: what errors call them.
        ids: at least one, each from 0 to vocab_size - 1.
        limit: the most of them, which is max_seq_len; None: any number.

    Raises:
        ValueError, TypeError: they are none, too many, or out of range.
    """
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(ids, (list, tuple)):
        kind = type(ids).__name__
        raise TypeError(f"{name} is a {kind}: expected a list of token ids (`text_completion` takes texts)")
    if len(ids) == 0:
        raise ValueError(f"{name} is empty: expected at least one token id, such as the tokenizer's bos_id")
    if limit is not None and len(ids) > limit:
        found = f"{name} has {len(ids):,} tokens"
        raise ValueError(f"{found}: expected at most max_seq_len = {limit:,}, which `Llama.build` sets")
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= token < vocab_size:
            raise ValueError(f"{name} has {token!r} among its ids: expected integers from 0 to {vocab_size - 1}")
    return [int(token) for token in ids]


def _check_names(options: Iterable[str]) -> None:
    for name in options:
        if name not in NAMES:
            raise TypeError(f"{name!r} is not a decoding option: expected one of {', '.join(sorted(NAMES))}")


def _is_per_prompt(name: str, value: Any) -> bool:
    if name in ("stop", "choice"):
        return isinstance(value, list) and any(item is None or isinstance(item, (list, tuple, set)) for item in value)
    return isinstance(value, (list, tuple)) and not callable(value)  # Transformers' LogitsProcessorList is both


def _require(options: DecodingOptions, name: str, expected: str, is_right: Callable[[Any], bool]) -> None:
    value = getattr(options, name)
    if not is_right(value):
        raise ValueError(f"{name} = {value!r}: expected {expected}")


def _check_shape(options: DecodingOptions) -> None:
    """Raises ValueError if there are two shapes, or one is of the wrong type; compiling it is not tried here."""
    given = [name for name in SHAPES if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: expected one shape of the answer at most")
    for name in ("regex", "grammar"):
        _require(options, name, "a string that is not empty, or None", lambda v: v is None or (v and type(v) is str))
    is_texts = lambda v: isinstance(v, (list, tuple)) and v and all(isinstance(x, str) and x for x in v)  # noqa: E731
    _require(options, "choice", "a list of strings that are not empty, or None", lambda v: v is None or is_texts(v))
    try:
        schema = options.json_schema
        schema = json.loads(schema) if isinstance(schema, str) else schema
        json.dumps(schema, allow_nan=False)
        is_schema = schema is None or isinstance(schema, Mapping)
    except (ValueError, TypeError, RecursionError):
        is_schema = False
    if not is_schema:
        raise ValueError(f"json_schema = {str(options.json_schema)[:200]!r}: expected a JSON schema, an object in JSON")


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_stop(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, str) and value != "")


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_int(token) and (_is_number(bias) or bias == -math.inf) for token, bias in value.items()
    )
