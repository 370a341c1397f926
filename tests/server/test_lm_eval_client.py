"""lm-evaluation-harness's `local-completions` on the server gives the same metrics as our own model for the harness."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("tenacity", reason="lm-eval's extra `api` is not installed")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from conftest import DEMO  # noqa: E402
from running import Server  # noqa: E402

from llama.checkpoint.convert import convert  # noqa: E402

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
# The task of docs/guide.md, and one whose answers are scored.
SUMS = """
output_type: generate_until
doc_to_text: "What is {{a}} + {{b}}?"
doc_to_target: "{{sum}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
filter_list: [{name: number, filter: [{function: regex, regex_pattern: "(\\\\d+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match}]
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "What is {{a}} + {{b}}? It is"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WORDS = """
output_type: loglikelihood
doc_to_text: "Once upon a time, there was a little"
doc_to_target: "{{word}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    rows = []
    for a in range(10, 16):
        words = [" fox", " duck", " bird who", " boat", " girl", " mouse who wanted"]
        choices = [f" {a + 34}", f" {a + 35}", f" {a}"]
        rows.append({"a": a, "b": 34, "sum": str(a + 34), "choices": choices, "word": words[a % 6]})
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("sums", SUMS), ("choice", CHOICE), ("words", WORDS)):
        (root / f"{name}.yaml").write_text(HEAD.format(name=name, data=data) + text)
    convert(DEMO, root / "hf", "hf", dtype="float32")
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (root / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    return root


def evaluate(folder: Path, kind: str, **model_args) -> dict[tuple[str, str], float]:
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        kind,
        model_args,
        tasks=["sums", "choice", "words"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    return {
        (task, name): value
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }


def test_the_harness_finds_the_same_metrics_through_the_server(folder):
    pytest.importorskip("transformers")
    import llama.evaluation  # noqa: F401

    own = {"ckpt_dir": str(DEMO), "max_length": 256, "dtype": "float32", "device": "cpu"}
    expected = evaluate(folder, "llama", **own)
    with Server("--max_seq_len", "257", "--no_web") as server:
        address = {"base_url": server.url + "/v1/completions", "model": "llama-demo", "max_length": 256}
        hf = {"tokenizer_backend": "huggingface", "tokenizer": str(folder / "hf"), "add_bos_token": True}
        assert evaluate(folder, "local-completions", **address, **hf) == pytest.approx(expected, rel=1e-4)
        # With the server's own tokenizer, which adds no begin-of-text token to the ids.
        remote = evaluate(folder, "local-completions", **address, tokenizer_backend="remote")
    assert remote == pytest.approx(evaluate(folder, "llama", **own, add_bos_token=False), rel=1e-4)
    assert len(expected) == 5
