"""Hugging Face's tokenizer.json: the ids of the tokenizers library, and the files that must be refused."""

import json
import random

import pytest
from conftest import shared

from llama import ChatFormat, Tokenizer
from llama.tokenizer.rank_file import LLAMA3_PATTERN
from llama.tokenizer.tokenizer_json import tokenizer_json


@pytest.fixture(scope="module")
def real_tokenizers(tmp_path_factory):
    """Llama 3's tokenizer from its rank file, and the path of the tokenizer.json made from it."""
    tokenizer = Tokenizer(shared("tokenizers", "llama3", "tokenizer.model"))
    written = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    written.write_text(tokenizer_json(tokenizer.ranks, tokenizer.special_tokens, "<|begin_of_text|>", LLAMA3_PATTERN))
    return tokenizer, written


def test_the_ids_of_a_tokenizer_json_are_those_of_the_tokenizers_library(real_tokenizers):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer, path = real_tokenizers
    ours, theirs = Tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    assert (ours.kind, ours.n_words, ours.stop_tokens) == ("llama3", tokenizer.n_words, tokenizer.stop_tokens)
    assert ours.special_tokens == tokenizer.special_tokens
    chosen = random.Random(0)
    alphabet = "aeinst  \n\t\r'.,-_(){}0123456789éßñ漢字かなक्षि한👩‍👧🇫🇷\u0301\u200f\u00a0שלعم𝔘\x00\x7f<|>"
    words = ["the", " the", "'ll", "  \n\n", "return", "1234567", "antidisestablishment", "<|eot_id|>", "\r\n", "東京"]
    for _ in range(1500):
        pieces = [chosen.choice(words) if chosen.random() < 0.3 else chosen.choice(alphabet) for _ in range(40)]
        text = "".join(pieces).replace("<|eot_id|>", "<|eot_ id|>")  # the library would encode the token
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text
    assert theirs.encode("Hello").ids == ours.encode("Hello", bos=True)
    assert theirs.token_to_id("<|eot_id|>") == ours.eot_id == 128009


def test_it_has_the_merges_of_the_published_file(real_tokenizers):
    merges = json.loads(real_tokenizers[1].read_text())["model"]["merges"]
    assert len(merges) == 280147
    assert merges[:3] == [["Ġ", "Ġ"], ["Ġ", "ĠĠĠ"], ["ĠĠ", "ĠĠ"]]


def small_content() -> dict:
    """A small tokenizer.json."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"he", b"the", b"the the"]
    special = {"<|begin_of_text|>": 260, "<|end_of_text|>": 261, "<|extra|>": 262}
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return json.loads(tokenizer_json(ranks, special, "<|begin_of_text|>", LLAMA3_PATTERN))


def test_a_tokenizer_without_chat_tokens_refuses_a_dialog(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(small_content()))
    tokenizer = Tokenizer(path)
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eot_id, tokenizer.pad_id) == (263, 260, None, -1)
    assert tokenizer.encode("the the") == [258, 32, 258]  # "the the" is cut into words before anything is merged
    with pytest.raises(ValueError, match=r"has no <\|end_header_id\|>, <\|eot_id\|>, .* not made for dialogs"):
        ChatFormat(tokenizer).encode_dialog_prompt([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["model"]["merges"].pop(2), r"merges are pairs of tokens; 4 pairs"),
        (lambda c: c["model"]["merges"].append(c["model"]["merges"][-1]), r"merges are pairs of tokens"),
        (lambda c: c["model"]["merges"].reverse(), r"not in the order of the ids"),
        (lambda c: c["model"]["merges"].append(["q", "q"]), r"not those of a byte-level BPE: KeyError\('qq'\)"),
        (lambda c: c["model"]["vocab"].update({"the": 300}), r"the 260 ids of its vocab are not 0 to 259"),
        (lambda c: c["model"]["vocab"].update({" ": 260}), r"not those of a byte-level BPE"),
        (lambda c: c["model"].update(byte_fallback=True), r"SentencePiece.*tokenizer.model of the same model"),
        (lambda c: c["model"].update(type="WordPiece"), r"has a WordPiece model: expected Llama 3's byte-level BPE"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"), r"the pattern '\\\\w\+'"),
        (lambda c: c.update(normalizer={"type": "NFC"}), r"the pattern None"),
        (lambda c: c["model"].update(dropout=0.1), r"has dropout = 0.1: expected null"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), r"has end_of_word_suffix = '</w>': expected null"),
        (lambda c: c["added_tokens"].pop(1), r"added_tokens have \[260, 262\].*expected ids from 260 on"),
        (lambda c: c["added_tokens"][0].update(content="<s>"), r"has no <\|begin_of_text\|> among its added_tokens"),
        (lambda c: c.pop("added_tokens"), r"is JSON, but KeyError \('added_tokens'\)"),
    ],
)
def test_a_tokenizer_json_that_no_rank_file_can_express_is_refused(tmp_path, edit, message):
    content = small_content()
    edit(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path / "tokenizer.json")
