"""Every constrained answer fits its constraint, masks equal those of trying every token, drafts change nothing."""

import json
import re

import pytest
import torch

llguidance = pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
jsonschema = pytest.importorskip("jsonschema")

from conftest import DEMO, shared  # noqa: E402

from benchmarks.server_checks import SUM, check_greedy, check_schemas  # noqa: E402
from llama import GenerationError, Llama  # noqa: E402
from llama.decoding.grammar import Grammars  # noqa: E402
from llama.options import DecodingOptions, per_prompt  # noqa: E402
from llama.tokenizer import Tokenizer  # noqa: E402

N_SCHEMAS = 40  # `python -m benchmarks.server_checks` takes 2,000
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 60}, "b": {"enum": ["x", "y z"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def test_every_answer_that_ends_by_itself_fits_its_schema(demo):
    assert check_schemas(demo, N_SCHEMAS) > 0.9 * N_SCHEMAS


def test_greedy_answers_to_made_up_schemas_are_those_of_trying_every_token(demo):
    assert check_greedy(demo, 4) > 10


FINITE = [  # schemas, and all texts that fit
    ({"enum": ["a", "b c", 1, True, None]}, ['"a"', '"b c"', "1", "true", "null"]),
    ({"type": "integer", "minimum": -3, "maximum": 12}, [*map(str, range(-3, 13))]),
    (SCHEMA, [f'{{"a": {a}, "b": "{b}"}}' for a in range(3, 61) for b in ("x", "y z")]),
    (
        {"type": "array", "items": {"$ref": "#/$defs/p"}, "maxItems": 2, "$defs": {"p": {"type": "boolean"}}},
        ["[]", "[true]", "[false]", "[true, true]", "[true, false]", "[false, true]", "[false, false]"],
    ),
]


@pytest.mark.parametrize(("schema", "texts"), FINITE, ids=["enum", "integer", "object", "array"])
def test_a_greedy_answer_is_that_of_trying_every_token(demo, schema, texts):
    prompt = demo.formatter.encode_dialog_prompt(SUM)
    pieces = [demo.tokenizer.token_bytes(token) for token in range(demo.tokenizer.n_words)]
    special, stops = set(demo.tokenizer.special_tokens.values()), demo.tokenizer.stop_tokens

    def try_every_token(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        so_far = demo.tokenizer.decode_bytes(ids[0, len(prompt) :])
        for token in logits[0].argsort(descending=True).tolist():
            beginning = so_far + pieces[token]
            fits = any(text.encode().startswith(beginning) for text in texts) and token not in special
            if fits or (token in stops and so_far.decode() in texts):
                return torch.full_like(logits, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)
        raise AssertionError("no token fits")

    ((slow,),) = demo.answer([prompt], temperature=0, max_gen_len=40, logits_processor=try_every_token)
    ((fast,),) = demo.answer([prompt], temperature=0, max_gen_len=40, json_schema=schema)
    assert (fast.tokens, fast.finish_reason) == (slow.tokens, slow.finish_reason) and fast.text in texts


def test_the_mask_is_what_trying_every_token_gives(demo):
    grammars = Grammars(demo.tokenizer, demo.args.vocab_size)
    text = '{"a": 21, "b": "y z"}'
    ids = demo.tokenizer.encode(text)
    matcher = grammars.start(DecodingOptions(json_schema=SCHEMA))
    whole = re.compile(r'\{"a": (?:[3-9]|[1-5]\d|60), "b": "(?:x|y z)"\}')
    logits = torch.zeros(demo.args.vocab_size)
    # Every text that fits, to try each token against: the slow obvious way.
    texts = [f'{{"a": {a}, "b": "{b}"}}' for a in range(3, 61) for b in ("x", "y z")]
    assert all(map(whole.fullmatch, texts))
    so_far = b""
    for n in range(len(ids) + 1):
        allowed = {i for i, value in enumerate(matcher.mask(logits, ids[:n]).tolist()) if value == 0}
        fits = set()
        for i in range(demo.tokenizer.n_words):
            if i in demo.tokenizer.stop_tokens:
                if so_far.decode() in texts:
                    fits.add(i)
            elif i not in demo.tokenizer.special_tokens.values():
                beginning = so_far + demo.tokenizer.token_bytes(i)
                if any(full.encode().startswith(beginning) for full in texts):
                    fits.add(i)
        assert allowed == fits
        if n < len(ids):
            so_far += demo.tokenizer.token_bytes(ids[n])
    assert matcher.is_complete(ids) and not matcher.is_complete(ids[:-1])
    n_allowed = lambda tokens: int((matcher.mask(logits, tokens) == 0).sum())  # noqa: E731
    assert n_allowed([]) == n_allowed(ids[:0]) > 0 and n_allowed([0, 0, 0]) == 0  # back, and where no way leads


@pytest.mark.parametrize(
    "options, fits",
    [
        ({"regex": r"\d{3}-\d{2}"}, lambda text: re.fullmatch(r"\d{3}-\d{2}", text)),
        ({"choice": ["yes", "no", 'yes, "maybe"']}, lambda text: text in ("yes", "no", 'yes, "maybe"')),
        ({"grammar": 'start: "a" | "b" start'}, lambda text: re.fullmatch("b*a", text)),
        ({"json_schema": json.dumps(SCHEMA)}, lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None),
    ],
    ids=["regex", "choice", "grammar", "json_schema"],
)
@pytest.mark.parametrize(
    "how", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}, {"temperature": 0, "num_beams": 3}]
)
def test_each_kind_of_shape_is_kept_greedy_sampled_and_by_beams(demo, options, fits, how):
    ((answer,),) = demo.answer([demo.formatter.encode_dialog_prompt(SUM)], max_gen_len=60, **options, **how)
    assert answer.finish_reason == "stop" and fits(answer.text), answer.text


@pytest.mark.parametrize("draft", ["ngram", DEMO], ids=["ngram", "model"])
def test_a_draft_and_other_rows_change_no_answer_of_a_shape(demo, draft):
    dialogs = [SUM, [{"role": "user", "content": "Tell me a story."}]] * 2
    given = {"temperature": 1.0, "top_p": 1.0, "seed": 5, "max_gen_len": 40}
    shapes = {"json_schema": [SCHEMA, None, None, {"type": "array", "items": {"type": "integer"}}]}
    together = demo.chat_completion(dialogs, **given, **shapes)
    drafted = Llama.build(DEMO, max_seq_len=512, max_batch_size=2, device="cpu", dtype="float32", draft=draft)
    assert [p["generation"] for p in drafted.chat_completion(dialogs, **given, **shapes)] == [
        p["generation"] for p in together
    ]
    counts = drafted._engine.counters.speculation
    # The model itself as a draft guesses in shape too; an answer that is whole ends before its last guess is looked at.
    assert draft == "ngram" or 0 < counts.proposed <= counts.accepted + len(dialogs)
    alone = demo.chat_completion([SUM], **given, json_schema=SCHEMA)
    assert alone[0]["generation"] == together[0]["generation"]


def test_a_llama_2_answer_fits_with_its_first_space_taken_off(stories):
    small = Llama.build(stories, max_seq_len=128, max_batch_size=2, device="cpu", dtype="float32")
    for options, pattern in (({"regex": "[a-z]{3,5} [a-z]+"}, "[a-z]{3,5} [a-z]+"), ({"regex": " x+y"}, " x+y")):
        ((answer,),) = small.answer(
            [small.tokenizer.encode("Once", bos=True)], temperature=0, max_gen_len=60, **options
        )
        assert answer.finish_reason != "stop" or re.fullmatch(pattern, answer.text), answer.text


def test_llama_3s_real_vocabulary_is_taken():
    tokenizer = Tokenizer(shared("tokenizers", "llama3") / "tokenizer.model")
    matcher = Grammars(tokenizer, tokenizer.n_words).start(DecodingOptions(json_schema=SCHEMA))
    ids = tokenizer.encode('{"a": 21, "b": "y z"}')
    for n, token in enumerate(ids):
        assert matcher.mask(torch.zeros(tokenizer.n_words), ids[:n])[token] == 0
    assert matcher.is_complete(ids)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"json_schema": {"type": "foo"}}, r"json_schema cannot be compiled: [^|%]*foo$"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "json_schema cannot be compiled"),
        ({"json_schema": "[1]"}, "expected a JSON schema"),
        ({"json_schema": "{'a': 1}"}, "json_schema = .* is not JSON"),
        ({"json_schema": {"a": float("nan")}}, "is not JSON"),
        ({"json_schema": 5}, "expected a JSON schema"),
        ({"regex": ""}, "regex = '': expected a text"),
        ({"regex": 5}, "regex = 5: expected a text"),
        ({"grammar": b"start: X"}, "grammar = b'start: X': expected a text"),
        ({"regex": "(a"}, r"regex cannot be compiled: [^|%]*unclosed group$"),
        ({"grammar": "start: x\nx: nothing"}, r"grammar cannot be compiled: at 2\(4\): [^|%]*nothing\"$"),
        ({"choice": []}, r"choice = \[\]: expected a list of texts"),
        ({"choice": "yes"}, "choice = 'yes': expected a list of texts"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice together: expected at most one shape"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_an_error_before_anything_runs(demo, options, message):
    before = demo._engine.counters.prefilled
    with pytest.raises(ValueError, match=message):
        demo.chat_completion([SUM], **options)
    assert demo._engine.counters.prefilled == before


def test_a_shape_that_allows_no_next_token_ends_the_answer_with_an_error(demo):
    banned = {token: -float("inf") for token in range(256, demo.args.vocab_size)} | {ord("7"): -float("inf")}
    with pytest.raises(GenerationError, match="logit_bias and regex left no token to choose, after 0 tokens"):
        demo.chat_completion(
            [SUM], regex="777", temperature=0, logit_bias=banned | {t: -float("inf") for t in range(256)}
        )


def test_lists_of_choices_are_one_for_each_prompt():
    first, second = per_prompt(2, choice=[["a", "b"], None])
    assert first.choice == ["a", "b"] and second.choice is None
    assert all(option.choice == ["a", "b"] for option in per_prompt(2, choice=["a", "b"]))


def test_after_the_tokenizer_was_exchanged_shapes_are_of_the_new_one(write_checkpoint):
    llama = Llama.build(write_checkpoint(), None, 128, 2, device="cpu")
    before = llama.answerer.grammars
    assert llama.answerer.grammars is before
    llama.tokenizer = Tokenizer(write_checkpoint("other") / "tokenizer.model")
    assert llama.answerer.grammars is not before
