"""Hugging Face's `tokenizer.json` and back, for the byte-pair encodings of Llama 3.

Knows how that file writes ranks and special tokens; nothing of encoding a text. It reads only files that a rank file
can express: with any other, the ids would silently differ from those in training.

Format: github.com/huggingface/tokenizers; its byte-level alphabet is that of GPT-2 (Radford et al. 2019).
"""

import json
from collections.abc import Collection, Iterator
from itertools import pairwise
from pathlib import Path

# The most bytes of a token, and of all tokens together; Llama 3's have 128 and 831,311. `_splits` tries to cut a token
# at each of its bytes, so without limits a strange file would take hours.
MAX_TOKEN_BYTES = 1024
MAX_VOCABULARY_BYTES = 4_000_000

# Settings of a BPE model that change its tokens: none of them may be set.
SETTINGS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")

# For str.translate. The file writes a byte as the character of the same number if that is visible, else as the next
# character from U+0100 on. `_BYTES` maps back; it maps other characters below U+0100 to U+FFFF, which is no byte.
_VISIBLE, _OTHERS = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}, iter(range(0x100, 0x200))
_CHARS = {byte: chr(byte if byte in _VISIBLE else next(_OTHERS)) for byte in range(256)}
_BYTES = dict.fromkeys(range(0x100), 0xFFFF) | {ord(char): byte for byte, char in _CHARS.items()}


def check_lengths(tokens: Collection[bytes], path: Path) -> None:
    """Raises ValueError if a token is empty or too long, or if all together are."""
    lengths = [len(token) for token in tokens]
    if lengths and (min(lengths) < 1 or max(lengths) > MAX_TOKEN_BYTES or sum(lengths) > MAX_VOCABULARY_BYTES):
        raise ValueError(
            f"{path} has tokens of {min(lengths):,} to {max(lengths):,} bytes, {sum(lengths):,} together: "
            f"expected 1 to {MAX_TOKEN_BYTES:,} each, and at most {MAX_VOCABULARY_BYTES:,}"
        )


def read_tokenizer_json(data: bytes, path: Path, pattern: str) -> tuple[dict[bytes, int], dict[str, int]]:
    """The ranks of the tokens, by their bytes, and the ids of the special tokens, by name.

    Every added token counts as special, even one that Hugging Face finds in plain text. Raises ValueError if it is not
    a byte-level BPE, if it cuts a text by another `pattern`, or if no rank file can express its merges or ids.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} begins as JSON, but is not whole ({error}); is the file cut off?") from None
    try:
        model, added = content["model"], {token["content"]: token["id"] for token in content["added_tokens"]}
        vocab, merges, kind = model["vocab"], model["merges"], model["type"]
        is_sentencepiece = bool(model.get("byte_fallback")) or kind == "Unigram"
        pieces = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        cut_by = _cut_pattern(content)
        if not all(name and name.encode() for name in added):  # a lone surrogate cannot be encoded
            raise ValueError("an added token without a name")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        expected = "expected Hugging Face's tokenizer.json, with a BPE model and added_tokens"
        raise ValueError(f"{path} is JSON, but {type(error).__name__} ({str(error)[:100]}): {expected}") from None
    if is_sentencepiece:
        raise ValueError(
            f"{path} is the JSON form of a SentencePiece model (Llama 2), which is not supported: "
            "put the tokenizer.model of the same model next to it, or pass its path as tokenizer_path"
        )
    if kind != "BPE" or cut_by != pattern:
        found = f"a {str(kind)[:50]} model" if kind != "BPE" else f"the pattern {repr(cut_by)[:200]}"
        raise ValueError(f"{path} has {found}: expected Llama 3's byte-level BPE, cut by {pattern!r}")
    if settings := [key for key in SETTINGS if model.get(key)]:
        raise ValueError(f"{path} has {settings[0]} = {repr(model[settings[0]])[:50]}: expected null, as Llama 3's")
    try:
        # Vocab and merges are compared as the file writes them, one character for each byte.
        vocab = {token: rank for token, rank in vocab.items() if added.get(token) != rank}
        merged = [vocab[left + right] for left, right in pieces]
        ranks = {token.translate(_BYTES).encode("latin-1"): rank for token, rank in vocab.items()}
        if not all(type(i) is int for i in (*ranks.values(), *added.values())):
            raise TypeError("an id is not an integer")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        found = repr(error)[:200]
        raise ValueError(f"{path}: its vocab and merges are not those of a byte-level BPE: {found}") from None
    check_lengths(ranks, path)
    ids, added_ids = sorted(ranks.values()), sorted(added.values())
    if ids != list(range(len(ids))):
        raise ValueError(f"{path}: the {len(ids)} ids of its vocab are not 0 to {len(ids) - 1}, each once")
    # A rank file has no merges: of all pairs whose result is a token, tiktoken merges the one with the lowest rank.
    if any(first > second for first, second in pairwise(merged)):
        raise ValueError(f"{path}: its merges are not in the order of the ids: no rank file gives the same tokens")
    expected = sum(1 for token in vocab for _ in _splits(token, vocab))
    found = len({(left, right) for left, right in pieces if left in vocab and right in vocab})
    if not found == len(pieces) == expected:
        raise ValueError(
            f"{path}: {found} of its {len(pieces)} merges are pairs of tokens; {expected} pairs of tokens make a "
            "token: expected each of these, once; no rank file gives the same tokens"
        )
    if added_ids != list(range(len(ids), len(ids) + len(added_ids))):
        found = f"{added_ids[:3]}… ({len(added_ids)} ids)"
        raise ValueError(f"{path}: its added_tokens have {found}: expected ids from {len(ids)} on, after the vocab's")
    if missing := [name for name in ("<|begin_of_text|>", "<|end_of_text|>") if name not in added]:
        raise ValueError(f"{path} has no {missing[0]} among its added_tokens: expected Llama 3's")
    return ranks, dict(sorted(added.items(), key=lambda item: item[1]))


def tokenizer_json(ranks: dict[bytes, int], special_tokens: dict[str, int], bos: str, pattern: str) -> str:
    """The text of a tokenizer.json that encodes as tiktoken does with these ranks, and puts `bos` before each text."""
    vocab = {token.decode("latin-1").translate(_CHARS): rank for token, rank in ranks.items()}
    merges = [
        pair
        for token in sorted(vocab, key=vocab.__getitem__)
        for pair in sorted(_splits(token, vocab), key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    first, second = (
        [{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": name, "type_id": i}}]
        for i, name in enumerate("AB")
    )
    template = {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {bos: {"id": bos, "ids": [special_tokens[bos]], "tokens": [bos]}},
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name} | flags for name, i in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {"type": "Sequence", "processors": [byte_level, template]},
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a stretch that is a token is that token, as in tiktoken
            "vocab": vocab,
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _cut_pattern(content: dict) -> str | None:
    """The regular expression that cuts a text; None if there is none, or if the text is changed in another way too."""
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers", [])
    if content.get("normalizer") is not None or [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = steps
    changes = split.get("invert") or byte_level.get("add_prefix_space") or byte_level.get("use_regex") is not False
    return split.get("pattern", {}).get("Regex") if split.get("behavior") == "Isolated" and not changes else None


def _splits(token: str, vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs of tokens that make a token."""
    for i in range(1, len(token)):
        if token[:i] in vocab and token[i:] in vocab:
            yield token[:i], token[i:]
