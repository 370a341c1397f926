"""Text to token ids and back, with any tokenizer file of a Llama model.

The contents of a file tell its format: a tiktoken rank file or a tokenizer.json for Llama 3, a SentencePiece model for
Llama 2. Knows nothing of dialogs, tensors, models or sampling.
"""

import functools
import hashlib
import operator
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

import tiktoken

from llama.tokenizer.chat_template import ChatTemplate
from llama.tokenizer.rank_file import LLAMA3_PATTERN, LLAMA3_SPECIAL_TOKENS, RankFile, parse_ranks
from llama.tokenizer.sentencepiece_file import SentencePieceFile
from llama.tokenizer.tokenizer_json import read_tokenizer_json

MAX_FILE_BYTES = 64 << 20  # Llama 3's tokenizer.json has 17 MB


class Tokenizer:
    """Text to token ids and back, for Llama 3 (tiktoken) and Llama 2 (SentencePiece).

    `model_path` is a `tokenizer.model`, or Hugging Face's `tokenizer.json` of Llama 3; the contents tell which.

    Attributes:
        path: its file.
        kind: `"llama3"` or `"llama2"`.
        n_words: size of the vocabulary, special tokens included (128,256 and 32,000 for Meta's files).
        bos_id, eos_id: ids that begin and end a text.
        pad_id: Llama 3: `<|finetune_right_pad_id|>`, -1 for none; Llama 2: what the file says, -1 in Meta's.
        eot_id: Llama 3: the id that ends a turn of a chat; Llama 2: None.
        stop_tokens: the ids at which an answer ends: end of text, of turn and of message; Llama 2: `eos_id` alone.
        special_tokens: the ids, by name, of the tokens that plain text is never encoded to.
        ranks: Llama 3: the ids of the other tokens, by their bytes; Llama 2: None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of neither kind, or is damaged.
        ImportError: it is a SentencePiece model and the sentencepiece package is not installed.
    """

    def __init__(self, model_path: str | os.PathLike):
        self.path = Path(model_path)
        self._model = _read_model(self.path)
        self.kind: Literal["llama3", "llama2"] = self._model.kind
        self.special_tokens: dict[str, int] = self._model.special_tokens
        self.ranks: dict[bytes, int] | None = getattr(self._model, "ranks", None)
        self.n_words: int = len(self._model.token_bytes)
        self.bos_id, self.eos_id, self.pad_id = self._model.bos_id, self._model.eos_id, self._model.pad_id
        self.eot_id: int | None = self.special_tokens.get("<|eot_id|>")
        ends = (self.eos_id, self.eot_id, self.special_tokens.get("<|eom_id|>"))
        self.stop_tokens: set[int] = {end for end in ends if end is not None}
        self.chat_template: ChatTemplate | None = None  # a directory's: see `read_chat_files`

    @property
    def digest(self) -> str:
        """The vocabulary's fingerprint, 16 hexadecimal digits. Both file formats of Llama 3 have the same."""
        return hashlib.sha256(self._model.content()).hexdigest()[:16]

    @functools.cached_property
    def model(self) -> tiktoken.Encoding:
        """Llama 3: tiktoken's encoding, special tokens included. Meta's code has it under this name."""
        if self.ranks is None:
            raise AttributeError("a Llama 2 tokenizer has no `model`: SentencePiece's is `sp_model`")
        return tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
        )

    @property
    def sp_model(self) -> Any:
        """Llama 2: the SentencePieceProcessor. Meta's code has it under this name."""
        if self.kind != "llama2":
            raise AttributeError("a Llama 3 tokenizer has no `sp_model`: tiktoken's is `model`")
        return self._model.processor

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

        The name of a special token in the text is plain characters unless `allowed_special` has it. The ids are those
        of tiktoken and sentencepiece, except in one case: a stretch of a Llama 3 text that has more than 25,000
        characters and that the format does not cut (one letter 30,000 times) is cut all the same.

        Args:
            bos, eos: put `bos_id` first, `eos_id` last.
            allowed_special: names that are encoded as their special tokens, or `"all"`. The text between two of them
                is encoded separately.
            disallowed_special: strings that the text must not have; `"all"`: every special token not allowed.

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
        ids = [self.bos_id] if bos else []
        if not allowed_special and not disallowed_special:
            ids += self._model.encode(s)
        else:
            allowed = _names("allowed_special", allowed_special, self.special_tokens)
            if unknown := sorted(allowed - self.special_tokens.keys()):
                raise ValueError(f"allowed_special names {unknown}, which this tokenizer's special_tokens do not have")
            disallowed = _names("disallowed_special", disallowed_special, self.special_tokens.keys() - allowed)
            if disallowed and (found := _any_of(disallowed).search(s)):
                where = f"{found[0]!r} at character {found.start()}"
                raise ValueError(f"the text has {where}, which is in disallowed_special")
            # Special tokens are split off before any other cut, so that no cut falls inside one.
            for part in _any_of(allowed).split(s) if allowed else [s]:
                ids += [self.special_tokens[part]] if part in allowed else self._model.encode(part)
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int] | int) -> str:
        """The text of `ids` (a list, one id, or a one-dimensional tensor).

        It is `decode_bytes(ids)` read as UTF-8; invalid bytes become U+FFFD. As in tiktoken and sentencepiece, Llama
        3's special tokens appear by name and Llama 2's do not appear. Raises as `decode_bytes` does.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int] | int) -> bytes:
        """The bytes of `ids`: `token_bytes` of each, joined.

        A Llama 2 text is encoded with a space before it, so the space of its first word is left out here, as in
        sentencepiece. The bytes of the first ids are always a prefix of the bytes of all ids, so a text can be
        streamed. Raises TypeError if an id is not an integer, and ValueError if it is outside [0, n_words).
        """
        if hasattr(ids, "tolist"):  # a tensor or an array
            ids = ids.tolist()
        ids = [ids] if isinstance(ids, int) else list(ids)
        parts = list(map(self.token_bytes, ids))
        data = b"".join(parts)
        if not self._model.word_starts or not data:
            return data
        first = next(token_id for token_id, part in zip(ids, parts) if part)
        return data[1:] if operator.index(first) in self._model.word_starts else data

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id adds to a text, its leading space included. Raises as `decode_bytes` does."""
        try:
            index = operator.index(token_id)
        except TypeError:
            raise TypeError(f"a token id is an integer, not {type(token_id).__name__}") from None
        if not 0 <= index < self.n_words:
            raise ValueError(f"token id {index} is out of range: this tokenizer has n_words = {self.n_words}")
        return self._model.token_bytes[index]


def _names(argument: str, names: str | Collection[str] | None, all_names: Collection[str]) -> set[str]:
    if isinstance(names, str) and names != "all":  # a str is also a collection: of its letters
        raise ValueError(f'{argument} is "all" or a collection of strings, not the string {names!r}')
    return set(all_names) if names == "all" else set(names or ())


def _any_of(strings: Iterable[str]) -> re.Pattern:
    return re.compile("(" + "|".join(map(re.escape, strings)) + ")")


def _read_model(path: Path) -> RankFile | SentencePieceFile:
    if path.is_dir():
        raise ValueError(f"{path} is a directory, expected a tokenizer file (such as {path / 'tokenizer.model'})")
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES:,} bytes: expected a tokenizer file")
    data = path.read_bytes()
    head = data[:4096]
    if re.match(rb"\S+ \d+\s*?(\n|$)", head):
        ranks = parse_ranks(data, path)
        return RankFile(ranks, {name: len(ranks) + k for k, name in enumerate(LLAMA3_SPECIAL_TOKENS)}, path)
    if head.lstrip().startswith(b"{"):
        return RankFile(*read_tokenizer_json(data, path, LLAMA3_PATTERN), path)
    if re.match(rb"\n[\x04-\x7f]\n", head):  # field 1 (the first piece), whose field 1 is its text
        return SentencePieceFile(data, path)
    start = head.lstrip().lower()
    if not head:
        found = "is empty"
    elif start.startswith(b"version https://git-lfs"):
        found = "is a git-lfs pointer, not the file it points to (`git lfs pull` fetches that)"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        found = "is a web page (an error page saved by a download?)"
    else:
        found = f"begins with {head[:24]!r}"
    expected = "a tiktoken rank file or a tokenizer.json (Llama 3), or a SentencePiece model (Llama 2)"
    raise ValueError(f"{path} {found}; expected {expected}")
