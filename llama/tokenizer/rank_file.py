"""Llama 3's byte-pair encoding: a tiktoken rank file, and text of any length to its ids.

Knows nothing of chat formats, or of what the special tokens mean.

Format: github.com/openai/tiktoken.
"""

import base64
import operator
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import tiktoken

from llama.tokenizer.tokenizer_json import check_lengths

# Llama 3 cuts text by this pattern, and merges byte pairs within each piece. The pattern is part of the vocabulary.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Ids after the last rank, in this order (Llama 3.1's names; the four that 3.1 added were reserved tokens in 3.0).
# An eom_id ends a message of the assistant but not its turn: it waits for a tool's result.
LLAMA3_SPECIAL_TOKENS = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{n}|>" for n in range(2, 247)),
]

# tiktoken panics on strings of some 400,000 characters, and may take quadratic time in a long stretch that the pattern
# does not cut, so it never gets more than this at once.
MAX_PIECE_CHARS = 25_000


def parse_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """The ranks of a file with a line `base64(token) rank` for each token of a byte-pair encoding.

    tiktoken's own `load_tiktoken_bpe` caches by path, and may return the bytes of another file. Raises ValueError if a
    line is something else.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.rstrip().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:  # from b64decode or int, or because the line is not two words
            raise ValueError(f"{path}, line {number}: expected 'base64 rank', found {line[:60]!r}") from None
    return ranks


class RankFile:
    """The tokens of a byte-pair encoding with their ranks, and special tokens after them, for tiktoken.

    Args:
        ranks: the id of each token, by its bytes.
        special_tokens: the id of each special token, by its name, in the order of the ids.
        path: where they are from, for messages.

    Raises ValueError if the ranks are not 0 to n - 1, a single byte has none, or a token is empty or too long.
    """

    kind = "llama3"
    word_starts = frozenset()

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int], path: Path):
        by_rank = sorted(ranks.items(), key=operator.itemgetter(1))
        for expected, (token, rank) in enumerate(by_rank):
            if rank != expected:
                found = f"found {rank} (of {token!r}) where {expected} was expected"
                raise ValueError(f"{path}: the ranks must be 0 to n - 1, one for each token; {found}")
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(
                f"{path}: {len(missing)} of the 256 single bytes have no rank (the first is 0x{missing[0]:02x}), "
                "so not every text could be encoded; is the file cut off?"
            )
        check_lengths(ranks, path)
        self.ranks, self.special_tokens = ranks, special_tokens
        self.token_bytes = [token for token, _ in by_rank] + [name.encode() for name in special_tokens]
        self.bos_id, self.eos_id = special_tokens["<|begin_of_text|>"], special_tokens["<|end_of_text|>"]
        self.pad_id = special_tokens.get("<|finetune_right_pad_id|>", -1)  # a name that came with Llama 3.1
        # tiktoken gets no special tokens: it encodes only text.
        self._bpe = tiktoken.Encoding(path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def content(self) -> bytes:
        """Everything that the ids depend on, for a fingerprint."""
        return repr((self.token_bytes, self.special_tokens)).encode()

    def encode(self, text: str) -> list[int]:
        if len(text) <= MAX_PIECE_CHARS:
            return self._bpe.encode_ordinary(text)
        return [token for piece in _pieces(text) for token in self._bpe.encode_ordinary(piece)]


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text into pieces of at most `MAX_PIECE_CHARS`, if possible where `LLAMA3_PATTERN` cuts too."""
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
    """Letter, Number, Other visible, space (`_`), newline, or `?` for control and unassigned characters."""
    if char in "\r\n":
        return "\n"
    return {"L": "L", "N": "N", "P": "O", "S": "O", "M": "O", "Z": "_"}.get(unicodedata.category(char)[0], "?")


# Between a character of the first kind and one of the second kinds `LLAMA3_PATTERN` always cuts: none of its
# alternatives matches across them. It never looks back, and looks ahead only in a run of spaces, after which we never
# cut. So it cuts each side as it would in the whole text.
_CUT_BEFORE = {"L": "NO_\n", "N": "LO_\n", "O": "N_", "\n": "LNO", "_": "", "?": ""}
