"""Constrains answers to a JSON schema, a regular expression, a list of texts or a grammar. Knows nothing of models.

Each option of this kind is called a shape. llguidance (github.com/guidance-ai/llguidance, the extra `grammar`) reads
the answer so far and computes one bit for each token: whether it may come next. The bits are a mask over the logits. A
stop token may come next once the answer is complete. JSON has one space after commas and colons and no other white
space, so that a model cannot go on writing blanks.

The mask depends only on the shape and on the answer so far. So drafts and batches change nothing, and every rank
computes the same mask.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from operator import attrgetter
from types import ModuleType
from typing import Any

import numpy as np
import torch

from llama.options import DecodingOptions, shown
from llama.tokenizer import Tokenizer

# The options that constrain an answer, of which a prompt may have one.
SHAPES = ("json_schema", "regex", "choice", "grammar")
shapes_of, NO_SHAPE = attrgetter(*SHAPES), (None,) * len(SHAPES)
# How many compiled shapes are kept for later calls.
N_KEPT = 64
# Where only one text is possible, llguidance would force one split into tokens. This lets the model choose the split.
NO_FORCING = '%llguidance {"no_forcing": true}\n'
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Compiles the shapes of one model's answers. Any number of threads may use it.

    Args:
        tokenizer: the model's.
        vocab_size: the number of logits.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._vocabulary: Any = None  # llguidance's tokenizer, created when first needed
        self._unspaced: torch.Tensor | None = None
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def belong_to(self, tokenizer: Tokenizer, vocab_size: int) -> bool:
        return self._tokenizer is tokenizer and self._vocab_size == vocab_size

    def check(self, option: DecodingOptions, name: str = "") -> None:
        """Compiles the shape of an answer.

        Raises:
            ValueError: there are two shapes, or it cannot be compiled. The message begins with `name`.
            ImportError: llguidance is not installed.
        """
        try:
            self._compile(shape_of(option))
        except ValueError as error:
            raise ValueError(f"{name}{error}") from None

    def start(self, option: DecodingOptions) -> "Matcher":
        """Returns a matcher for one answer. Raises as `check`."""
        shape = shape_of(option)
        return Matcher(self._compile(shape), shape[0], self._vocab_size, self._unspaced)

    def _compile(self, shape: tuple[str, str]) -> Any:
        """Returns a matcher of llguidance at the beginning of an answer."""
        llguidance = _import()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary, self._unspaced = _vocabulary(self._tokenizer, self._vocab_size)
            if shape in self._compiled:
                self._compiled.move_to_end(shape)
                return self._compiled[shape].deep_copy()
        try:  # without the lock, because a large shape takes a while
            grammar = _grammar(llguidance.LLMatcher, *shape)
        except ValueError as error:
            raise ValueError(f"{shape[0]} cannot be compiled: {error}") from None
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            found = _first_lines(matcher.get_error())
            if shape[0] != "grammar":  # line numbers mean nothing to users of other shapes
                found = re.sub(r"^(at )?\d+\(\d+\): ", "", found)
            raise ValueError(f"{shape[0]} cannot be compiled: {found}")
        with self._lock:
            self._compiled[shape] = matcher
            if len(self._compiled) > N_KEPT:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()


class Matcher:
    """Tells which tokens may come next in one answer. Remembers the tokens of the last call and continues from there.

    Args:
        matcher: llguidance's, at the beginning, not shared with another answer.
        name: of the option, for errors.
        vocab_size: of the model.
        unspaced: the tokens whose leading space is dropped at the beginning of a text, bool [vocab_size].
    """

    def __init__(self, matcher: Any, name: str, vocab_size: int, unspaced: torch.Tensor | None):
        self._matcher, self._name, self._vocab_size, self._unspaced = matcher, name, vocab_size, unspaced
        self._tokens: list[int] = []

    def mask(self, logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """Returns the logits, float32 [vocab_size], with -inf for each token that cannot come after `tokens`.

        Raises ValueError if the shape becomes too complex for llguidance.
        """
        if not self._follow(tokens):
            return torch.full_like(logits, -torch.inf)
        bits = np.zeros((self._vocab_size + 31) // 32, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            raise ValueError(f"the {self._name} went wrong: {_first_lines(self._matcher.get_error())}")
        allowed = torch.from_numpy(np.unpackbits(bits.view(np.uint8), bitorder="little")[: self._vocab_size]).bool()
        if not tokens and self._unspaced is not None:
            allowed &= ~self._unspaced
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def is_complete(self, tokens: list[int]) -> bool:
        """Whether `tokens` fit the shape and nothing may follow them."""
        return self._follow(tokens) and self._matcher.is_stopped() and not self._matcher.is_error()

    def _follow(self, tokens: list[int]) -> bool:
        """Brings llguidance's matcher to the state after `tokens`. Returns False if they do not fit."""
        seen = self._tokens
        if tokens[: len(seen)] != seen:
            n_same = next(i for i, (a, b) in enumerate(zip([*tokens, None], seen)) if a != b)
            self._matcher.rollback(len(seen) - n_same)
            del seen[n_same:]
        new = tokens[len(seen) :]
        seen += new[: self._matcher.try_consume_tokens(new)] if new else []
        return len(seen) == len(tokens)


def shape_of(option: DecodingOptions) -> tuple[str, str]:
    """Returns the name and the text of the shape that an option record has.

    Raises:
        ValueError: there are two shapes, or it has the wrong type.
    """
    given = {name: value for name in SHAPES if (value := getattr(option, name)) is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} together: expected at most one shape of an answer")
    ((name, value),) = given.items()
    if name == "choice":
        is_texts = isinstance(value, (list, tuple)) and all(isinstance(text, str) and text for text in value)
        if not is_texts or not value:
            raise ValueError(f"choice = {shown(value)}: expected a list of texts that are not empty, or None")
        return name, json.dumps(list(value))
    if name == "json_schema":
        try:
            schema = json.loads(value) if isinstance(value, str) else value
            text = json.dumps(schema, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"json_schema = {shown(value)} is not JSON: {error}") from None
        if not isinstance(schema, Mapping):
            raise ValueError(f"json_schema = {shown(value)}: expected a JSON schema, which is an object")
        return name, text
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} = {shown(value)}: expected a text that is not empty, or None")
    return name, value


class _Vocabulary:
    """A tokenizer with the interface that llguidance needs."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.n_words)]
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        # Llama 2's tokens without text are special tokens for llguidance, and need distinct bytes.
        without_text = [token for token, text in enumerate(self.tokens) if not text]
        self.special_token_ids = sorted({*tokenizer.special_tokens.values(), *without_text})
        for token in without_text:
            self.tokens[token] = b"<%d>" % token
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> tuple[Any, torch.Tensor | None]:
    """Returns llguidance's tokenizer, and the tokens that lose a space at the beginning; None if there are none."""
    llguidance = _import()
    wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
    ends = sorted(tokenizer.stop_tokens)
    made = llguidance.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=ends)
    if tokenizer.kind != "llama2":
        return made, None
    unspaced = torch.zeros(vocab_size, dtype=torch.bool)
    for token in range(tokenizer.n_words):
        unspaced[token] = tokenizer.decode_bytes([token]) != tokenizer.token_bytes(token)
    return made, unspaced


def _grammar(matcher: Any, name: str, text: str) -> str:
    """Returns a shape as a Lark grammar with llguidance's extensions."""
    if name == "grammar":
        return text if "%llguidance" in text else f"{text}\n{NO_FORCING}"  # last, to keep line numbers in errors right
    if name == "json_schema":
        return NO_FORCING + "start: %json " + json.dumps({**json.loads(text), "x-guidance": JSON_OPTIONS})
    if name == "choice":
        return NO_FORCING + "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, json.loads(text)))
    return NO_FORCING + json.loads(matcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]


def _first_lines(error: str) -> str:
    """Returns the first lines of llguidance's error, without its internal state and the grammar we generated."""
    lines = []
    for line in error.strip().splitlines():
        if re.match(r" *1 \| |<state>", line):
            break
        if line.strip(" ^"):
            lines.append(line.strip())
    return " ".join(lines[:6])[:500]


def _import() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise ImportError(
            "answers of a given shape need llguidance: pip install '.[grammar]' (or llguidance)"
        ) from None
    return llguidance
