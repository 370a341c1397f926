"""Answers in a given shape: which tokens may come next, so that the answer fits a JSON schema, a regex or a grammar.

The automata are llguidance's (github.com/guidance-ai/llguidance, the extra `grammar`): it knows the bytes of every
token, reads the answer so far, and gives a bit for each token that may follow. The bits are a mask over the logits. End
tokens may follow where the answer is whole. JSON has one space after commas and colons and no other white space, so
that an answer cannot wander off into blanks.

A mask depends on the shape and the answer so far alone, so drafts and batches change nothing, and every rank makes the
same. Knows nothing of models.
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

# The options that say what an answer must fit; at most one of them.
SHAPES = ("json_schema", "regex", "choice", "grammar")
shapes_of, NO_SHAPE = attrgetter(*SHAPES), (None,) * len(SHAPES)
# Compiled shapes that are kept for the next call.
N_KEPT = 64
# Where only one text is possible, llguidance would allow a single way to cut it into tokens, and cuts it as a text that
# stands alone. Here the model chooses among all ways.
FREE = '%llguidance {"no_forcing": true}\n'
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """The shapes that answers of one model may be asked for. Any number of threads may use it.

    Args:
        tokenizer: the model's.
        vocab_size: how many logits it gives.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._vocabulary: Any = None  # llguidance's, made when first needed
        self._unspaced: torch.Tensor | None = None
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def belong_to(self, tokenizer: Tokenizer, vocab_size: int) -> bool:
        return self._tokenizer is tokenizer and self._vocab_size == vocab_size

    def check(self, option: DecodingOptions, name: str = "") -> None:
        """Compiles the shape that an answer is to have.

        Raises:
            ValueError: there are two, or it cannot be compiled; begun by `name`.
            ImportError: llguidance is not installed.
        """
        try:
            self._compile(shape_of(option))
        except ValueError as error:
            raise ValueError(f"{name}{error}") from None

    def start(self, option: DecodingOptions) -> "Matcher":
        """What tells which tokens may come next in one answer. Raises as `check`."""
        shape = shape_of(option)
        return Matcher(self._compile(shape), shape[0], self._vocab_size, self._unspaced)

    def _compile(self, shape: tuple[str, str]) -> Any:
        """A matcher of llguidance, at the beginning of an answer."""
        llguidance = _import()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary, self._unspaced = _vocabulary(self._tokenizer, self._vocab_size)
            if shape in self._compiled:
                self._compiled.move_to_end(shape)
                return self._compiled[shape].deep_copy()
        try:  # without the lock: a large one takes a while
            grammar = _grammar(llguidance.LLMatcher, *shape)
        except ValueError as error:
            raise ValueError(f"{shape[0]} cannot be compiled: {error}") from None
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            found = _first_lines(matcher.get_error())
            if shape[0] != "grammar":  # the others have no lines
                found = re.sub(r"^(at )?\d+\(\d+\): ", "", found)
            raise ValueError(f"{shape[0]} cannot be compiled: {found}")
        with self._lock:
            self._compiled[shape] = matcher
            if len(self._compiled) > N_KEPT:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()


class Matcher:
    """Which tokens may come next in one answer, after any beginning of it.

    It remembers the beginning that it was last asked about, and goes back or on from there.

    Args:
        matcher: llguidance's, at the beginning, not shared with another answer.
        name: of the option that gave the shape, for errors.
        vocab_size: of the model.
        unspaced: the tokens whose leading space is not part of the text if they are its first, bool [vocab_size].
    """

    def __init__(self, matcher: Any, name: str, vocab_size: int, unspaced: torch.Tensor | None):
        self._matcher, self._name, self._vocab_size, self._unspaced = matcher, name, vocab_size, unspaced
        self._tokens: list[int] = []

    def mask(self, logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """The logits, float32 [vocab_size], -inf for each token that cannot come after `tokens`.

        Raises ValueError if the shape has become too complex to follow.
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

    def is_whole(self, tokens: list[int]) -> bool:
        """Whether `tokens` fit, and nothing may follow them."""
        return self._follow(tokens) and self._matcher.is_stopped() and not self._matcher.is_error()

    def _follow(self, tokens: list[int]) -> bool:
        """Has llguidance take `tokens`; False if they do not fit."""
        held = self._tokens
        if tokens[: len(held)] != held:
            n_same = next(i for i, (a, b) in enumerate(zip([*tokens, None], held)) if a != b)
            self._matcher.rollback(len(held) - n_same)
            del held[n_same:]
        new = tokens[len(held) :]
        held += new[: self._matcher.try_consume_tokens(new)] if new else []
        return len(held) == len(tokens)


def shape_of(option: DecodingOptions) -> tuple[str, str]:
    """What an answer must fit, the one of SHAPES that is given, and its text.

    Raises:
        ValueError: there are two, or it is of the wrong type.
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
    """A tokenizer as llguidance wants to see one."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.n_words)]
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        # Bytes that no text has are special to llguidance as well: Llama 2's tokens without text.
        without_text = [token for token, text in enumerate(self.tokens) if not text]
        self.special_token_ids = sorted({*tokenizer.special_tokens.values(), *without_text})
        for token in without_text:
            self.tokens[token] = b"<%d>" % token
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> tuple[Any, torch.Tensor | None]:
    """llguidance's tokenizer, and the tokens that lose a space when they come first, None if there are none."""
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
    """A shape as a Lark grammar with llguidance's extensions."""
    if name == "grammar":
        return text if "%llguidance" in text else f"{text}\n{FREE}"  # behind it, for errors have numbers of lines
    if name == "json_schema":
        return FREE + "start: %json " + json.dumps({**json.loads(text), "x-guidance": JSON_OPTIONS})
    if name == "choice":
        return FREE + "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, json.loads(text)))
    return FREE + json.loads(matcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]


def _first_lines(error: str) -> str:
    """What an error of llguidance says, without what it says of itself, and the text that we made of the shape."""
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
