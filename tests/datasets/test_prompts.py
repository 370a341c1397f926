"""The ids of a row's prompt, and the same message for a wrong prompt everywhere."""

import json
import re

import pytest

from llama.datasets.batch import run_batch
from llama.datasets.prompts import kind_of, prompt_ids
from llama.rejection_sampling.draw import Plan, rejection_sample
from llama.rejection_sampling.files import sample_files

DIALOG = [{"role": "user", "content": "What is 21 + 34?"}]

NO_PROMPTS = [
    ({}, "found none of prompt, messages, tokens: expected one of them"),
    ({"prompt": "x", "tokens": [1]}, "found prompt and tokens of prompt, messages, tokens: expected one of them"),
    ({"prompt": ""}, "prompt = '': expected a text that is not empty"),
    ({"prompt": 5}, "prompt = 5: expected a text that is not empty"),
    ({"messages": 5}, "a dialog is a list of one or more messages, the last of them the user's; found int"),
    ({"messages": [5]}, "message 0 of the dialog is a int, expected a dict with 'role' and 'content'"),
    ({"tokens": 5}, "the prompt is a int: expected a list of token ids"),
    ({"tokens": []}, "the prompt is empty: expected at least one token id"),
    ({"prompt": "word " * 600}, "expected at most max_seq_len = 512"),
]


def test_a_prompt_is_its_kinds_ids(demo):
    assert prompt_ids(demo, {"messages": DIALOG}) == demo.formatter.encode_dialog_prompt(DIALOG)
    assert prompt_ids(demo, {"prompt": "One day", "sum": 3}) == demo.tokenizer.encode("One day", bos=True)
    assert prompt_ids(demo, {"tokens": (5, 6), "prompt": None}) == [5, 6]
    assert [kind_of({name: 1}) for name in ("prompt", "messages", "tokens")] == ["prompt", "messages", "tokens"]


def test_all_that_take_rows_refuse_a_wrong_prompt_with_the_same_message(demo, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _ in NO_PROMPTS))
    files = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    sample_files(demo, *files, lambda row, answers: [0.0] * len(answers), Plan(1), "none")
    sampled = {record["line"]: record for record in map(json.loads, files[1].read_text().splitlines())}
    answered = {record["line"]: record for record in run_batch(demo, [row for row, _ in NO_PROMPTS])}
    for line, (row, message) in enumerate(NO_PROMPTS, 1):
        assert message in sampled[line]["error"] and sampled[line]["error"] == answered[line]["error"]
        with pytest.raises((ValueError, TypeError), match=re.escape(f"prompt 0: {sampled[line]['error']}")):
            rejection_sample(demo, [row], len)
