"""Text to token ids and back, and a dialog to the ids of its prompt.

Knows the two tokenizer files Llama models come with (a tiktoken rank file for Llama 3, a SentencePiece model for
Llama 2) and the two chat formats. Knows nothing of tensors, models or sampling.
"""

import base64
import hashlib
import operator
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import tiktoken

from llama.tokenizer.tokenizer_json import read_tokenizer_json

# How Llama 3 cuts text into the stretches inside which byte pairs are merged: as fixed a part of it as the ranks.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Ids after the last rank, in this order (Llama 3.1's names; in 3.0 the four that 3.1 added were reserved ones).
# An eom_id ends a message of the assistant but not its turn: it waits for a tool's result.
LLAMA3_SPECIAL_TOKENS = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{n}|>" for n in range(2, 247)),
]

# tiktoken panics on strings of some 400,000 characters, and may take quadratic time in a long stretch that the pattern
# does not cut: it never gets more than this at once.
MAX_PIECE_CHARS = 25_000


class Tokenizer:
    """Text to token ids and back, for Llama 3 (tiktoken) and Llama 2 (SentencePiece) files behind one face.

    Args:
        model_path: a `tokenizer.model`, or Llama 3's `tokenizer.json` of Hugging Face. Which kind it is, is read from
            its contents, not from its name.

    Attributes:
        kind: `"llama3"` or `"llama2"`.
        n_words: size of the vocabulary, special tokens included (128,256 and 32,000 for Meta's files).
        bos_id, eos_id: ids that begin and end a text.
        pad_id: Llama 3: `<|finetune_right_pad_id|>`, -1 for none; Llama 2: what the file says, -1 in Meta's.
        eot_id: Llama 3: the id that ends a turn of a chat; Llama 2: None.
        stop_tokens: the ids at which an answer ends: end of text, of turn and of message; Llama 2: `eos_id` alone.
        special_tokens: name to id of each token that text never becomes by itself.
        ranks: Llama 3: the bytes of the other tokens to their ids; Llama 2: None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither kind, or is damaged; says what was found.
        ImportError: it is a SentencePiece model and the sentencepiece package is not installed.

    Formats: github.com/openai/tiktoken; SentencePiece, arXiv:1808.06226.
    """

    def __init__(self, model_path: str | os.PathLike):
        self._model = _read_model(Path(model_path))
        self.kind: Literal["llama3", "llama2"] = self._model.kind
        self.special_tokens: dict[str, int] = self._model.special_tokens
        self.ranks: dict[bytes, int] | None = getattr(self._model, "ranks", None)
        self.n_words: int = len(self._model.token_bytes)
        self.bos_id, self.eos_id, self.pad_id = self._model.bos_id, self._model.eos_id, self._model.pad_id
        self.eot_id: int | None = self.special_tokens.get("<|eot_id|>")
        ends = (self.eos_id, self.eot_id, self.special_tokens.get("<|eom_id|>"))
        self.stop_tokens: set[int] = {end for end in ends if end is not None}

    @property
    def digest(self) -> str:
        """What the vocabulary is known by: 16 hexadecimal digits, for Llama 3 the same in whichever format it came."""
        return hashlib.sha256(self._model.content()).hexdigest()[:16]

    def encode(
        self,
        s: str,
        bos: bool = False,
        eos: bool = False,
        *,
        allowed_special: Literal["all"] | Collection[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Token ids of a text of any length.

        The names of special tokens in the text are plain characters, unless they are allowed to be more. Ids are those
        that tiktoken and sentencepiece give by themselves, but for one case: in a Llama 3 text with over 25,000
        characters without any change that the format cuts at (one letter 30,000 times), such a stretch is cut there.

        Args:
            s: the text. It must be encodable as UTF-8.
            bos: put `bos_id` first.
            eos: put `eos_id` last.
            allowed_special: names of special tokens which become their id where they stand in the text, or `"all"`.
                What stands between two of them is encoded as a text of its own.
            disallowed_special: strings that are an error in the text; `"all"` is each special token not allowed.

        Raises:
            TypeError: `s` is not a str.
            ValueError: `s` holds a disallowed string, or a lone surrogate (half of a character, left by a broken
                decoding of the text); an allowed name is not one of `special_tokens`.
        """
        if not isinstance(s, str):
            raise TypeError(f"encode takes a str, not {type(s).__name__}")
        try:
            s.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"its character {error.start} is the lone surrogate {s[error.start]!a}"
            raise ValueError(f"the text cannot be encoded: {found}; read it with errors='replace'") from None
        allowed = _names("allowed_special", allowed_special, self.special_tokens)
        if unknown := sorted(allowed - self.special_tokens.keys()):
            raise ValueError(f"allowed_special names {unknown}, which this tokenizer's special_tokens do not have")
        disallowed = _names("disallowed_special", disallowed_special, self.special_tokens.keys() - allowed)
        if disallowed and (found := _any_of(disallowed).search(s)):
            raise ValueError(f"the text has {found[0]!r} at character {found.start()}, which is in disallowed_special")
        ids = [self.bos_id] if bos else []
        # Special tokens are taken out before any other cut, so that no cut can fall inside one.
        for part in _any_of(allowed).split(s) if allowed else [s]:
            ids += [self.special_tokens[part]] if part in allowed else self._model.encode(part)
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int] | int) -> str:
        """The text of `ids` (a list, one id, or a one-dimensional tensor).

        It is `decode_bytes(ids)` read as UTF-8, with U+FFFD where it is none. Llama 3's special tokens appear by their
        names, Llama 2's do not appear, as in tiktoken and sentencepiece. Raises as `decode_bytes` does.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int] | int) -> bytes:
        """The bytes of `ids`: `token_bytes` of each, joined.

        A Llama 2 text is encoded with a space put before it, so there the space of a first word is left out, as by
        sentencepiece. The bytes of the first ids are always a prefix of those of all, so a stream can be cut from them.

        Raises:
            TypeError: an id is not an integer.
            ValueError: an id is outside [0, n_words).
        """
        if hasattr(ids, "tolist"):  # a tensor or an array
            ids = ids.tolist()
        ids = [self._checked(i) for i in ([ids] if isinstance(ids, int) else ids)]
        table = self._model.token_bytes
        data = b"".join(table[i] for i in ids)
        first = next((i for i in ids if table[i]), None)
        return data[1:] if first in self._model.word_starts else data

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id adds to a text, its leading space included. Raises as `decode_bytes` does."""
        return self._model.token_bytes[self._checked(token_id)]

    def _checked(self, token_id: int) -> int:
        try:
            index = operator.index(token_id)
        except TypeError:
            raise TypeError(f"a token id is an integer, not {type(token_id).__name__}") from None
        if not 0 <= index < self.n_words:
            raise ValueError(f"token id {index} is out of range: this tokenizer has n_words = {self.n_words}")
        return index


def _names(argument: str, names: str | Collection[str] | None, all_names: Collection[str]) -> set[str]:
    if isinstance(names, str) and names != "all":  # would be taken as a collection of its letters
        raise ValueError(f'{argument} is "all" or a collection of strings, not the string {names!r}')
    return set(all_names) if names == "all" else set(names or ())


def _any_of(strings: Iterable[str]) -> re.Pattern:
    return re.compile("(" + "|".join(map(re.escape, strings)) + ")")


def _read_model(path: Path) -> "_RankFile | _SentencePieceFile":
    if path.is_dir():
        raise ValueError(f"{path} is a directory, expected a tokenizer file (such as {path / 'tokenizer.model'})")
    if not path.exists():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    with path.open("rb") as file:
        head = file.read(4096)  # enough to tell: a checkpoint given by mistake is not read whole
        if re.match(rb"\S+ \d+\s*?(\n|$)", head):
            ranks = _parse_ranks(head + file.read(), path)
            return _RankFile(ranks, {name: len(ranks) + k for k, name in enumerate(LLAMA3_SPECIAL_TOKENS)}, path)
        if head.lstrip().startswith(b"{"):
            return _RankFile(*read_tokenizer_json(head + file.read(), path, LLAMA3_PATTERN), path)
        if re.match(rb"\n[\x04-\x7f]\n", head):  # field 1 (the first piece), whose field 1 is its text
            return _SentencePieceFile(head + file.read(), path)
    start = head.lstrip().lower()
    if not head:
        found = "is empty"
    elif start.startswith(b"version https://git-lfs"):
        found = "is a git-lfs pointer, not the file it points to (`git lfs pull` fetches that)"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        found = "is a web page (an error page saved by a download?)"
    else:
        found = f"begins with {head[:24]!r}"
    raise ValueError(f"{path} {found}; expected a tiktoken rank file (Llama 3) or a SentencePiece model (Llama 2)")


def _parse_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """The ranks of a file with a line `base64(token) rank` for each token of a byte-pair encoding.

    Read here, and not by tiktoken's `load_tiktoken_bpe`: that one caches by path and may return another file's bytes.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.rstrip().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:  # of b64decode, of int, or not two words
            raise ValueError(f"{path}, line {number}: expected 'base64 rank', found {line[:60]!r}") from None
    return ranks


class _RankFile:
    """Llama 3: the tokens of a byte-pair encoding with their ranks, and special tokens after them, for tiktoken."""

    kind = "llama3"
    word_starts = frozenset()

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int], path: Path):
        by_rank = sorted(ranks.items(), key=operator.itemgetter(1))
        for expected, (token, rank) in enumerate(by_rank):
            if rank != expected:
                found = f"found {rank} (of {token!r}) where {expected} was expected"
                raise ValueError(f"{path}: the ranks must be 0 to n - 1, each once and each of another token; {found}")
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(
                f"{path}: {len(missing)} of the 256 single bytes have no rank (the first is 0x{missing[0]:02x}), "
                "so not every text could be encoded; is the file cut off?"
            )
        self.ranks, self.special_tokens = ranks, special_tokens
        self.token_bytes = [token for token, _ in by_rank] + [name.encode() for name in special_tokens]
        self.bos_id, self.eos_id = special_tokens["<|begin_of_text|>"], special_tokens["<|end_of_text|>"]
        self.pad_id = special_tokens.get("<|finetune_right_pad_id|>", -1)  # a name that came with Llama 3.1
        # tiktoken is not told of the special tokens: what it is given is text.
        self._bpe = tiktoken.Encoding(path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def content(self) -> bytes:
        """All that it was made of."""
        return repr((self.token_bytes, self.special_tokens)).encode()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _pieces(text):
            ids += self._bpe.encode_ordinary(piece)
        return ids


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text into pieces of at most `MAX_PIECE_CHARS`, where `LLAMA3_PATTERN` would cut it too if it can."""
    start = 0
    while len(text) - start > MAX_PIECE_CHARS:
        end = start + MAX_PIECE_CHARS
        cuts = (i for i in range(end, start, -1) if _char_kind(text[i]) in _CUT_BEFORE[_char_kind(text[i - 1])])
        cut = next(cuts, end)
        if _char_kind(text[cut]) == "N":  # a number is cut in threes from its first digit on
            digits = 0
            while digits < cut - start and _char_kind(text[cut - 1 - digits]) == "N":
                digits += 1
            cut -= digits % 3
        yield text[start:cut]
        start = cut
    yield text[start:]


@lru_cache(maxsize=4096)
def _char_kind(char: str) -> str:
    """Letter, Number, Other visible, space (`_`), newline; or `?`: control and unassigned ones, best left alone."""
    if char in "\r\n":
        return "\n"
    return {"L": "L", "N": "N", "P": "O", "S": "O", "M": "O", "Z": "_"}.get(unicodedata.category(char)[0], "?")


# After a character of this kind, `LLAMA3_PATTERN` cuts before one of those kinds, whatever stands around the two: no
# alternative of it goes on from the one to the other. Its only look-ahead is in a run of spaces, after which we never
# cut; it never looks back. So both sides are cut further as they would be together.
_CUT_BEFORE = {"L": "NO_\n", "N": "LO_\n", "O": "N_", "\n": "LNO", "_": "", "?": ""}


class _SentencePieceFile:
    """Llama 2: a SentencePiece model, a protobuf of pieces with their scores."""

    kind = "llama2"

    def __init__(self, data: bytes, path: Path):
        try:
            import sentencepiece  # an optional extra: Llama 3 does without
        except ImportError:
            raise ImportError(
                f"{path} is a SentencePiece model (Llama 2), and the sentencepiece package is not installed: "
                "pip install sentencepiece (or this package's extra `llama2`: pip install '.[llama2]' in its directory)"
            ) from None
        try:
            self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            found = f"{path} begins as a SentencePiece model, but its {len(data)} bytes cannot be read as a whole one"
            raise ValueError(f"{found}; is the file cut off?") from None
        self.bos_id, self.eos_id, self.pad_id = sp.bos_id(), sp.eos_id(), sp.pad_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{path}: a SentencePiece model without <s> or </s>; expected Llama 2's, which has both")
        ids = range(sp.vocab_size())
        self.special_tokens = {sp.id_to_piece(i): i for i in ids if sp.is_control(i) or sp.is_unknown(i)}
        self.token_bytes = [self._bytes_of(i) for i in ids]
        starts = frozenset(i for i in ids if sp.id_to_piece(i).startswith("▁"))
        # What encoding puts before a text, decoding takes off; a few models are made to put nothing.
        self.word_starts = starts if starts.intersection(sp.encode("a")[:1]) else frozenset()

    def _bytes_of(self, token_id: int) -> bytes:
        piece = self._sp.id_to_piece(token_id)
        if self._sp.is_control(token_id):
            return b""
        if self._sp.is_byte(token_id):  # such as "<0x0A>"
            return bytes([int(piece[1:-1], 16)])
        if self._sp.is_unknown(token_id):
            return self._sp.decode([token_id]).encode()
        return piece.replace("▁", " ").encode()

    def content(self) -> bytes:
        return self._sp.serialized_model_proto()

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(text)
