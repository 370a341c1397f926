"""Every answer of a given shape fits it, masks are what trying every token gives, and drafts change nothing."""

import json
import os
import random
import re

import pytest
import torch

llguidance = pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
jsonschema = pytest.importorskip("jsonschema")

from conftest import DEMO, shared  # noqa: E402

from llama import GenerationError, Llama  # noqa: E402
from llama.decoding.grammar import Grammars  # noqa: E402
from llama.options import DecodingOptions, per_prompt  # noqa: E402
from llama.tokenizer import Tokenizer  # noqa: E402

N_SCHEMAS = int(os.environ.get("LLAMA_SCHEMAS", 150))  # 2,000 take some minutes
SUM = [{"role": "user", "content": "What is 21 + 34?"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 60}, "b": {"enum": ["x", "y z"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def random_schema(rng: random.Random, depth: int = 0, defs: tuple[str, ...] = ()) -> dict:
    """A schema of objects, arrays, enums, bounded numbers, `$ref`, nested up to three deep."""
    kinds = ["integer", "number", "enum", "boolean", "null", "string"]
    kind = rng.choice(kinds + (["object", "array"] * 3 if depth < 3 else []) + (["ref"] if defs else []))
    if kind == "ref":
        return {"$ref": f"#/$defs/{rng.choice(defs)}"}
    if kind == "integer":
        low = rng.randint(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
    if kind == "number":
        low = rng.randint(-100, 100)
        return {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 50)}
    if kind == "enum":
        return {"enum": rng.sample(["a", "b c", 1, 2.5, None, True, "é", 'x"y'], rng.randint(1, 4))}
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(1, 8)}
    if kind == "array":
        low = rng.randint(0, 2)
        items = random_schema(rng, depth + 1, defs)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if kind == "object":
        names = rng.sample(["id", "name", "a b", "ß", "x"], rng.randint(1, 3))
        properties = {name: random_schema(rng, depth + 1, defs) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def schemas(n: int) -> list[dict]:
    made = []
    for seed in range(n):
        rng = random.Random(seed)
        defs = {"p": random_schema(rng, 2), "q": random_schema(rng, 3)} if seed % 2 else {}
        made.append({**random_schema(rng, 0, tuple(defs)), **({"$defs": defs} if defs else {})})
    return made


def test_every_answer_that_ends_by_itself_fits_its_schema(demo):
    wanted = schemas(N_SCHEMAS)
    answers = demo.answer(
        [demo.formatter.encode_dialog_prompt(SUM)] * len(wanted),
        json_schema=wanted,
        temperature=1.0,
        top_p=1.0,
        seed=1,
        max_gen_len=200,
    )
    n_ended = 0
    for schema, (answer,) in zip(wanted, answers):
        if answer.finish_reason == "stop":
            n_ended += 1
            jsonschema.validate(json.loads(answer.text), schema)
    assert n_ended > 0.9 * len(wanted)


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
    assert matcher.is_whole(ids) and not matcher.is_whole(ids[:-1])
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


def test_a_draft_and_other_rows_change_no_answer_of_a_shape(demo):
    dialogs = [SUM, [{"role": "user", "content": "Tell me a story."}]] * 2
    given = {"temperature": 1.0, "top_p": 1.0, "seed": 5, "max_gen_len": 40}
    shapes = {"json_schema": [SCHEMA, None, None, {"type": "array", "items": {"type": "integer"}}]}
    together = demo.chat_completion(dialogs, **given, **shapes)
    drafted = Llama.build(DEMO, max_seq_len=512, max_batch_size=2, device="cpu", dtype="float32", draft="ngram")
    assert [p["generation"] for p in drafted.chat_completion(dialogs, **given, **shapes)] == [
        p["generation"] for p in together
    ]
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
    assert matcher.is_whole(ids)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"json_schema": {"type": "foo"}}, "json_schema cannot be compiled"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "json_schema cannot be compiled"),
        ({"json_schema": "[1]"}, "expected a JSON schema"),
        ({"json_schema": "{'a': 1}"}, "json_schema = .* is not JSON"),
        ({"json_schema": {"a": float("nan")}}, "is not JSON"),
        ({"json_schema": 5}, "expected a JSON schema"),
        ({"regex": ""}, "regex = '': expected a text"),
        ({"regex": 5}, "regex = 5: expected a text"),
        ({"grammar": b"start: X"}, "grammar = b'start: X': expected a text"),
        ({"regex": "(a"}, "regex cannot be compiled"),
        ({"grammar": "start: nothing"}, "grammar cannot be compiled"),
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


def test_a_shape_with_no_way_on_ends_the_answer_with_its_reason(demo):
    banned = {token: -float("inf") for token in range(256, demo.args.vocab_size)} | {ord("7"): -float("inf")}
    with pytest.raises(GenerationError, match="logit_bias and regex left no token to choose, after 0 tokens"):
        demo.chat_completion(
            [SUM], regex="777", temperature=0, logit_bias=banned | {t: -float("inf") for t in range(256)}
        )


def test_lists_of_choices_are_one_for_each_prompt():
    first, second = per_prompt(2, choice=[["a", "b"], None])
    assert first.choice == ["a", "b"] and second.choice is None
    assert all(option.choice == ["a", "b"] for option in per_prompt(2, choice=["a", "b"]))
