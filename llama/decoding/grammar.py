"""Answers in a given shape: which tokens may come next, so that the answer fits a JSON schema, a regex or a grammar.

The automata are llguidance's (github.com/guidance-ai/llguidance, the extra `grammar`): it knows the bytes of every
token, reads the answer so far, and gives a bit for each token that may follow. The bits are a mask over the logits. End
tokens may follow where the answer is whole. JSON has one space after commas and colons and no other white space, so
that an answer cannot wander off into blanks.

A matcher takes only the tokens that its answer has taken, so drafts and batches change nothing. Every rank makes the
same masks. Knows nothing of models.
"""

import json
import threading
from collections import OrderedDict
from types import ModuleType
from typing import Any

import numpy as np
import torch

from llama.tokenizer import Tokenizer

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

    def check(self, shape: tuple[str, str], name: str = "") -> None:
        """Compiles a shape, which is one of `llama.options.SHAPES` and its text.

        Raises:
            ValueError: it cannot be compiled; begun by `name`.
            ImportError: llguidance is not installed.
        """
        try:
            self._matcher(shape)
        except ValueError as error:
            raise ValueError(f"{name}{error}") from None

    def start(self, shape: tuple[str, str]) -> "Matcher":
        """The state of an answer of this shape that has no token yet. Raises as `check`."""
        return Matcher(self._matcher(shape, copy=True), shape[0], self._vocab_size, self._unspaced)

    def _matcher(self, shape: tuple[str, str], copy: bool = False) -> Any:
        with self._lock:
            return self._compile(shape).deep_copy() if copy else self._compile(shape)

    def _compile(self, shape: tuple[str, str]) -> Any:
        if shape in self._compiled:
            self._compiled.move_to_end(shape)
            return self._compiled[shape]
        llguidance = _import()
        if self._vocabulary is None:
            self._vocabulary, self._unspaced = _vocabulary(self._tokenizer, self._vocab_size)
        try:
            grammar = _grammar(llguidance.LLMatcher, *shape)
        except ValueError as error:
            raise ValueError(f"{shape[0]} cannot be compiled: {error}") from None
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"{shape[0]} cannot be compiled: {_first_lines(matcher.get_error())}")
        self._compiled[shape] = matcher
        if len(self._compiled) > N_KEPT:
            self._compiled.popitem(last=False)
        return matcher


class Matcher:
    """How far one answer is in its shape: a `llama.sequence.Constraint`.

    Args:
        matcher: llguidance's, not shared with another answer.
        name: of the option that gave the shape, for errors.
        vocab_size: of the model.
        unspaced: the tokens whose leading space is not part of the text if they are its first, bool [vocab_size].
    """

    def __init__(self, matcher: Any, name: str, vocab_size: int, unspaced: torch.Tensor | None):
        self._matcher, self._name, self._vocab_size, self._unspaced = matcher, name, vocab_size, unspaced
        self._n_tokens = 0

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """As `llama.sequence.Constraint` has it."""
        bits = np.zeros((self._vocab_size + 31) // 32, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            raise ValueError(f"the {self._name} went wrong: {_first_lines(self._matcher.get_error())}")
        allowed = torch.from_numpy(np.unpackbits(bits.view(np.uint8), bitorder="little")[: self._vocab_size]).bool()
        if self._n_tokens == 0 and self._unspaced is not None:
            allowed &= ~self._unspaced
        if not allowed.any():
            raise ValueError(
                f"the {self._name} has no way on after {self._n_tokens} tokens of the answer: "
                f"no token of the vocabulary can follow ({self._matcher.stop_reason()})"
            )
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        """As `llama.sequence.Constraint` has it. A shape that became too complex shows at the next `mask`."""
        self._matcher.consume_token(token)
        self._n_tokens += 1

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def copy(self) -> "Matcher":
        """As `llama.sequence.Constraint` has it."""
        other = Matcher(self._matcher.deep_copy(), self._name, self._vocab_size, self._unspaced)
        other._n_tokens = self._n_tokens
        return other


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
        return text if "%llguidance" in text else FREE + text
    if name == "json_schema":
        return FREE + "start: %json " + json.dumps({**json.loads(text), "x-guidance": JSON_OPTIONS})
    if name == "choice":
        return FREE + "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, json.loads(text)))
    return FREE + json.loads(matcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]


def _first_lines(error: str) -> str:
    """What an error of llguidance says, without what it says of itself."""
    lines = [line for line in error.strip().splitlines() if line.strip() and not line.startswith("<state>")]
    return " ".join(lines[:3])[:500]


def _import() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise ImportError(
            "answers of a given shape need llguidance: pip install 'llama[grammar]' (or llguidance)"
        ) from None
    return llguidance
