"""Tokenizer files damaged at random: each is read, or refused with one clear error, quickly and in little memory."""

import base64
import json
import os
import random
from pathlib import Path

import pytest
from conftest import shared, write_byte_tokenizer
from mutate import count_refused, damaged, damaged_json, is_refused, memory_limit
from test_tokenizer_json import small_content

from llama.tokenizer import Tokenizer

TEXT = "Hello  wörld, it's 1234567!\n\n the end 👍 the the"


def read(path: Path) -> None:
    """Reads a tokenizer. If it is read, it must encode and decode a text, and decode all its ids."""
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode(TEXT, bos=True, eos=True)
    if tokenizer.kind == "llama3":
        assert tokenizer.decode(ids[1:-1]) == TEXT
    tokenizer.decode(range(tokenizer.n_words))
    assert len(tokenizer.digest) == 16


def test_a_damaged_rank_file(tmp_path):
    path = tmp_path / "tokenizer.model"
    write_byte_tokenizer(path, 400)
    assert 100 < count_refused(path, damaged, lambda: read(path), 600) < 600


def test_a_damaged_tokenizer_json(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(small_content()))
    assert 100 < count_refused(path, damaged_json, lambda: read(path), 400) < 400


def test_a_damaged_sentencepiece_model(tmp_path):
    pytest.importorskip("sentencepiece")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(shared("checkpoints", "stories260K", "tokenizer.model").read_bytes())

    def damaged_somewhere(rng: random.Random, data: bytes) -> bytes:
        n = rng.choice((600, len(data)))  # what is not a list of pieces is at the end
        return data[:-n] + damaged(rng, data[-n:])

    assert 100 < count_refused(path, damaged_somewhere, lambda: read(path), 800) < 800


def with_model(**changes: object) -> dict:
    return small_content() | {"model": small_content()["model"] | changes}


NOT_A_TOKENIZER = {
    "a list for a vocabulary": with_model(vocab=[["a", 0]]),
    "no vocabulary": with_model(vocab=None),
    "ids that are no integers": with_model(vocab={t: float(i) for t, i in small_content()["model"]["vocab"].items()}),
    "ids that are true and false": with_model(vocab=small_content()["model"]["vocab"] | {"!": False, '"': True}),
    "merges of one": with_model(merges=["th"]),
    "merges of numbers": with_model(merges=[[1, 2]]),
    "a long token": with_model(vocab=small_content()["model"]["vocab"] | {"a" * 2000: 260}),
    "a pattern of another kind": small_content() | {"pre_tokenizer": "ByteLevel"},
    "steps of another kind": small_content() | {"pre_tokenizer": {"pretokenizers": [1, 2]}},
    "an added token without a name": small_content() | {"added_tokens": [{"content": "", "id": 260}]},
    "an added token that is half a character": small_content() | {"added_tokens": [{"content": "\ud800", "id": 260}]},
    "an added token that is a number": small_content() | {"added_tokens": [{"content": 5, "id": 260}]},
    "a number": 5 * 10**18,
    "too deep": None,
}


@pytest.mark.parametrize("name", NOT_A_TOKENIZER)
def test_a_tokenizer_json_of_another_form_is_refused(tmp_path, name):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": ' + "[" * 10**6 if name == "too deep" else json.dumps(NOT_A_TOKENIZER[name]))
    assert is_refused(lambda: read(path), [str(path)], (ValueError,), seconds=5)


def test_the_sentencepiece_form_is_recognised_whatever_its_vocabulary(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(with_model(type="Unigram", vocab=[["<unk>", 0.0]])))
    with pytest.raises(ValueError, match=r"JSON form of a SentencePiece model.*put the tokenizer.model"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("start", [b"IQ== 0\n", b'{"model": ', b"\n\x0e\n\x05<unk>\x15"])
def test_a_file_far_too_large_for_a_tokenizer_is_not_read_whole(tmp_path, start):
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(20_000_000_000)  # takes no room on the disk
    with memory_limit(200_000_000), pytest.raises(ValueError, match="has more than 67,108,864 bytes"):
        Tokenizer(path)


def test_long_tokens_are_refused_before_their_merges_are_searched(tmp_path):
    long = [f"{'x' * 1000}{i}" for i in range(5000)]
    ranks = [*(bytes([i]) for i in range(256)), *(token.encode() for token in long)]
    path = tmp_path / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks)))
    with pytest.raises(ValueError, match=r"has tokens of 1 to 1,004 bytes, .* at most 4,000,000"):
        Tokenizer(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.model")
    assert is_refused(lambda: read(tmp_path / "tokenizer.model"), ["tokenizer.model"], (FileNotFoundError,), seconds=5)
