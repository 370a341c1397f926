"""A byte-pair encoding trained on the demo corpus, written as a tiktoken rank file (base64 token, rank; one per line).

Sennrich et al. 2016 (arXiv 1508.07909), on bytes. Llama 3's own pattern cuts text into words. Two kinds of pieces are
never merged, so that a small model can learn from little text: digits (the model reads a number digit by digit), and an
emoji with its neighbour (one emoji is one token).
"""

import base64
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import regex

from llama.tokenizer.tokenizer import LLAMA3_PATTERN

EMOJI = re.compile(
    "[\U0001f1e6-\U0001f1ff]{2}|[^\x00-\u00ff](?:\ufe0f|\u20e3|\u200d.|[\U000e0020-\U000e007f])*|[\x00-\u00ff]+"
)

EMOJI_WEIGHT = 8  # high enough to make every emoji of the lists a token, not three bytes


def count_words(texts: Iterable[str]) -> Counter[bytes]:
    """How often each piece occurs, without numbers, and with each emoji as a piece of its own."""
    pattern = regex.compile(LLAMA3_PATTERN)
    pieces = Counter(piece for text in texts for piece in pattern.findall(text))
    words: Counter[bytes] = Counter()
    for piece, n in pieces.items():
        if any(char.isdigit() for char in piece):
            continue
        has_emoji = any(ord(char) > 0x2000 for char in piece)
        for part in EMOJI.findall(piece) if has_emoji else [piece]:
            words[part.encode()] += n * (EMOJI_WEIGHT if ord(part[0]) > 0x2000 else 1)
    return words


def learn(words: Counter[bytes], n_tokens: int) -> list[bytes]:
    """The tokens in order of rank: the 256 bytes, then the most frequent pair again and again."""
    tokens = [bytes([b]) for b in range(256)]
    spelled = [(list(word), n) for word, n in words.items() if n > 1]
    pairs: Counter[tuple[int, int]] = Counter()
    where: dict[tuple[int, int], set[int]] = defaultdict(set)
    for i, (ids, n) in enumerate(spelled):
        for pair in itertools.pairwise(ids):
            pairs[pair] += n
            where[pair].add(i)
    known = set(tokens)
    while len(tokens) < n_tokens:
        best = max(pairs, key=lambda p: (pairs[p], p))
        token = tokens[best[0]] + tokens[best[1]]
        # Another pair may have the same bytes. tiktoken merges by bytes, so it needs no second rank.
        if token in known:
            new = tokens.index(token)
        else:
            new = len(tokens)
            tokens.append(token)
            known.add(token)
        for i in where.pop(best):
            ids, n = spelled[i]
            for pair in itertools.pairwise(ids):
                pairs[pair] -= n
                if pair != best:
                    where[pair].discard(i)
            merged, at = [], 0
            while at < len(ids):
                if at + 1 < len(ids) and (ids[at], ids[at + 1]) == best:
                    merged.append(new)
                    at += 2
                else:
                    merged.append(ids[at])
                    at += 1
            spelled[i] = (merged, n)
            for pair in itertools.pairwise(merged):
                pairs[pair] += n
                where[pair].add(i)
        del pairs[best]
    return tokens


def write(tokens: list[bytes], path: Path) -> None:
    """Writes the rank file."""
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
