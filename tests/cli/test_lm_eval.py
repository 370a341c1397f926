"""Our model for lm-evaluation-harness against the harness's own `hf`, on tasks made here; nothing is downloaded."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ranks, run_python

from llama import Llama
from llama.checkpoint.convert import convert

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

STORY = "One day, a little fox found a red boat near the old bridge. The fox was happy and ran home to tell a friend. "
CHOICES = ["a red boat", "the moon and the stars", "boat", "a friend", "7", "happy"]

TASKS = {
    "choice": """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "greedy": """
task: local_greedy
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "until": """
task: local_until
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n", ". The"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tasks, and the embedded checkpoint in Hugging Face's format with a tokenizer that Transformers opens."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'")
    root = tmp_path_factory.mktemp("evaluation")
    convert(DEMO, root / "hf", "hf", dtype="float32")
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (root / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    llama = Llama.build(DEMO, max_seq_len=256, device="cpu", dtype="float32")
    starts = [STORY[: 20 + 7 * i] for i in range(12)]
    going_on = [p["generation"] for p in llama.text_completion(starts, 0, max_gen_len=8)]
    rows = {
        # Contexts that end in a space, an empty one, and one longer than max_length.
        "choice": [
            {"context": c, "choices": [f" {x}" for x in CHOICES] + ["\n"], "gold": i % 7}
            for i, c in enumerate([*starts, "What is in it? ", "", STORY * 6])
        ],
        "rolling": [{"text": text} for text in (STORY, STORY * 5, "x", "Un été, 12 + 34 = 46?")],
        "greedy": [
            {"context": c, "target": t if i % 3 else " boat and more"}
            for i, (c, t) in enumerate(zip(starts, going_on, strict=True))
        ],
        "until": [
            {"context": c, "target": (t + " ").split("\n")[0].split(". The")[0]}
            for c, t in zip([*starts, STORY * 6], [*going_on, "?"], strict=True)
        ],
    }
    (root / "tasks").mkdir()
    for name, text in TASKS.items():
        data = root / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (root / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return root


def evaluate(folder: Path, model: str, **model_args) -> tuple[dict, dict]:
    """The harness's metrics, and the answers to the requests of each task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model,
        model_args,
        tasks=[f"local_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    samples = {name: [sample["resps"] for sample in rows] for name, rows in found["samples"].items()}
    return metrics(found), samples


def metrics(found: dict) -> dict:
    return {
        (task, name): value
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }


@pytest.fixture(scope="module")
def theirs(folder) -> tuple[dict, dict]:
    pytest.importorskip("accelerate", reason="the harness's hf model is not whole: pip install 'lm-eval[hf]'")
    return evaluate(folder, "hf", pretrained=str(folder / "hf"), dtype="float32", max_length=128)


def numbers(value) -> list:
    return [x for item in value for x in numbers(item)] if isinstance(value, (list, tuple)) else [value]


@pytest.fixture(scope="module")
def ours(folder) -> tuple[dict, dict]:
    import llama.evaluation

    assert llama.evaluation.LlamaLM
    return evaluate(folder, "llama", ckpt_dir=str(DEMO), dtype="float32", max_length=128)


def test_on_replicas_every_metric_and_every_answer_is_that_of_one_process(folder, ours):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    ray.init("local", num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    try:
        found, samples = evaluate(folder, "llama", ckpt_dir=str(DEMO), dtype="float32", max_length=128, replicas=2)
    finally:
        ray.shutdown()
    assert found == pytest.approx(ours[0], rel=1e-5)
    for task, answers in ours[1].items():
        for a, b in zip(numbers(answers), numbers(samples[task]), strict=True):
            assert b == (pytest.approx(a, abs=1e-4) if isinstance(a, float) else a), task


def test_every_metric_and_every_answer_equals_the_hf_models(ours, theirs):
    found, samples = ours
    expected, expected_samples = theirs
    assert len(expected) == 8
    for name, value in expected.items():
        exact = name[1].startswith(("acc", "exact_match"))
        assert found[name] == (value if exact else pytest.approx(value, rel=1e-5)), name
    for task, answers in expected_samples.items():
        for a, b in zip(numbers(answers), numbers(samples[task]), strict=True):
            assert b == (pytest.approx(a, abs=1e-3) if isinstance(a, float) else a), task
    assert 0 < expected["local_greedy", "acc,none"] < 1
    assert 0 < expected["local_until", "exact_match,none"] < 1


def test_the_command_under_torchrun_gives_the_same_metrics(folder, theirs, tmp_path):
    (tmp_path / "command.py").write_text("from llama.cli.lm_eval import main\nmain()\n")
    arguments = ["--model", "llama", "--model_args", f"ckpt_dir={DEMO},dtype=float32,max_length=128", "--device", "cpu"]
    arguments += ["--include_path", folder / "tasks", "--tasks", ",".join(f"local_{name}" for name in TASKS)]
    result = ranks(2, tmp_path / "command.py", *arguments, "--batch_size", 4, "--output_path", tmp_path / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("|local_choice") == 1  # the table, once
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = metrics(json.loads(written.read_text()))
    for name, value in theirs[0].items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_without_the_harness_the_error_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; import llama.cli.lm_eval"
    result = run_python(code)
    assert "pip install '.[eval]'" in result.stderr.splitlines()[-1]


def test_a_mistake_in_the_models_arguments_is_one_line(folder, monkeypatch):
    from llama.cli import lm_eval as evaluation

    arguments = ["--model", "llama", "--model_args", "ckpt_dir=/nowhere", "--include_path", str(folder / "tasks")]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--tasks", "local_rolling"])
    with pytest.raises(SystemExit, match=r"llama.evaluation: .*/nowhere"):
        evaluation.main()


def test_a_dialog_as_text_is_read_back_as_its_ids(folder):
    from llama.cli.lm_eval import LlamaLM

    lm = LlamaLM(str(DEMO), device="cpu", max_length=128)
    dialog = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Who are you?"}]
    assert lm.tok_encode(lm.apply_chat_template(dialog)) == lm.llama.formatter.encode_dialog_prompt(dialog)
    begun = [*dialog, {"role": "assistant", "content": "I am"}]
    expected = [*lm.llama.formatter.encode_dialog_prompt(dialog), *lm.llama.tokenizer.encode("I am")]
    assert lm.tok_encode(lm.apply_chat_template(begun, add_generation_prompt=False)) == expected


# Without the harness: the log-probabilities of continuations.


def continuation_logprobs(llama: Llama, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """The log-probability of each, and whether it is the greedy one, as the harness's model computes them."""
    scored = llama.score_tokens([(context + ids, len(context)) for context, ids in pairs], shared=True)
    return [(math.fsum(scores.logprobs), scores.is_greedy) for scores in scored]


def test_continuations_equal_scoring_the_whole(demo):
    encode = demo.tokenizer.encode
    contexts = [encode(STORY[:n], bos=True) for n in (5, 40, 90, 120)]
    endings = [encode(text) for text in (" a boat", " a boat and", " fox", " home", " home and then home")]
    pairs = [(c, e) for e in endings for c in contexts] + [(contexts[0], encode(STORY) * 12)]
    before = demo._engine.counters.prefilled
    found = continuation_logprobs(demo, pairs)
    prefilled = demo._engine.counters.prefilled - before
    assert prefilled <= sum(map(len, contexts)) + sum(len(ending) for _, ending in pairs)  # each context once
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        (score,) = demo.score([context + continuation])
        assert logprob == pytest.approx(math.fsum(score["logprobs"][len(context) :]), abs=1e-3)
        greedy, _ = demo.generate([context], len(continuation), temperature=0)
        assert is_greedy == (greedy[0] == continuation)
    (last,) = demo.generate([contexts[2]], 3, temperature=0)[0]
    assert continuation_logprobs(demo, [(contexts[2], last)])[0][1]


def test_pairs_that_cannot_be_scored_are_refused(demo):
    with pytest.raises(ValueError, match="a context of 1 tokens and a continuation of 0: expected a continuation"):
        continuation_logprobs(demo, [([1], [2]), ([1], [])])
    with pytest.raises(ValueError, match="513 together at most"):
        continuation_logprobs(demo, [([1] * 500, [2] * 14)])
    with pytest.raises(ValueError, match="has 99999 among its ids"):
        continuation_logprobs(demo, [([1], [99999])])


def test_continuations_are_scored_while_a_stream_holds_the_only_slot(demo):
    llama = Llama.build(DEMO, max_seq_len=64, max_batch_size=1, device="cpu", dtype="float32")
    expected = "".join(llama.stream_text("Once upon a time", temperature=0))
    stream = llama.stream_text("Once upon a time", temperature=0)
    beginning = next(stream)
    ((logprob, _),) = continuation_logprobs(llama, [([1], [2])])
    assert logprob == pytest.approx(continuation_logprobs(demo, [([1], [2])])[0][0], abs=1e-3)
    assert beginning + "".join(stream) == expected


def test_a_text_that_fills_the_context_leaves_one_token_unread(demo):
    ids = torch.randint(0, 3000, (513,), generator=torch.Generator().manual_seed(0)).tolist()
    ((logprob, _),) = continuation_logprobs(demo, [(ids[:1], ids[1:])])
    logits = demo.model(torch.tensor([ids[:-1]]))[0]
    expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:])[:, None]).double().sum().item()
    assert logprob == pytest.approx(expected, rel=1e-5)
