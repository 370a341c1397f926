"""Reward models: the scores of Transformers, and directories that are no reward models."""

import json
import random

import pytest
import torch
from conftest import DEMO, random_model, ranks, shared, write_byte_tokenizer
from test_huggingface import SHAPE, VARIANTS, change_config
from test_model import transformers_model

from llama import Llama, Tokenizer
from llama.rejection_sampling.reward_model import RewardModel

transformers = pytest.importorskip("transformers", reason="pip install transformers to compare with it")
pytest.importorskip("safetensors", reason="pip install safetensors to read its files")

PAD = 511
TOLERANCE = 1e-4


def write_reward_model(folder, n_labels=1, tokenizer=True, pad_token_id=PAD, **shape):
    """A random reward model, as Transformers saves it; returns its model."""
    policy = transformers_model(random_model(**SHAPE | shape))
    config = transformers.LlamaConfig.from_dict(policy.config.to_dict())
    config.num_labels, config.pad_token_id, config.architectures = n_labels, pad_token_id, None
    torch.manual_seed(0)
    theirs = transformers.LlamaForSequenceClassification(config).eval()
    theirs.model.load_state_dict(policy.model.state_dict())
    theirs.score.weight.data.normal_(std=0.3)
    theirs.save_pretrained(folder)
    if tokenizer:
        write_byte_tokenizer(folder / "tokenizer.model", SHAPE["vocab_size"] - 256)
    return theirs


def texts(n=9, longest=200):
    rng = random.Random(0)
    return [[rng.randrange(500) for _ in range(rng.randint(1, longest))] for _ in range(n)]


@torch.no_grad()
def their_scores(theirs, rows, pad=PAD):
    width = max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return theirs(tokens, attention_mask=mask).logits[:, 0].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_unequal_lengths_are_those_of_transformers(tmp_path, variant):
    theirs = write_reward_model(tmp_path / "rm", **{"max_seq_len": 256} | VARIANTS[variant])
    model = RewardModel.build(tmp_path / "rm", device="cpu")
    rows = texts()
    expected = their_scores(theirs, rows)
    assert max(expected) - min(expected) > 0.5  # the scores are not all alike
    assert model.score(rows) == pytest.approx(expected, abs=TOLERANCE)
    assert [model.score([row])[0] for row in rows] == pytest.approx(expected, abs=TOLERANCE)


def test_batches_are_cut_and_scores_stay_in_order(tmp_path, monkeypatch):
    theirs = write_reward_model(tmp_path / "rm", max_seq_len=256)
    model = RewardModel.build(tmp_path / "rm", device="cpu")
    rows, shapes = texts(), []
    forward = model.model.rewards
    monkeypatch.setattr(model.model, "rewards", lambda t, last: shapes.append(t.shape) or forward(t, last))
    monkeypatch.setattr("llama.rejection_sampling.reward_model.BATCH_TOKENS", 400)
    assert model.score(rows) == pytest.approx(their_scores(theirs, rows), abs=TOLERANCE)
    assert len(shapes) > 2 and all(n * width <= 400 for n, width in shapes)
    assert model.score([]) == []


def test_padding_ids_at_the_end_of_a_text_are_no_part_of_it_as_in_transformers(tmp_path):
    theirs = write_reward_model(tmp_path / "rm", max_seq_len=256)
    model = RewardModel.build(tmp_path / "rm", device="cpu")
    row = texts()[0]
    expected = their_scores(theirs, [row])
    assert their_scores(theirs, [[*row, PAD, PAD]]) == pytest.approx(expected, abs=TOLERANCE)
    assert model.score([[*row, PAD, PAD]]) == model.score([row]) == pytest.approx(expected, abs=TOLERANCE)


def test_half_precision_is_that_of_the_files(tmp_path):
    write_reward_model(tmp_path / "rm", max_seq_len=256).bfloat16().save_pretrained(tmp_path / "rm")
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    model, rows = RewardModel.build(tmp_path / "rm", device="cpu"), texts()
    assert model.model.score.weight.dtype == torch.bfloat16
    wide = RewardModel.build(tmp_path / "rm", device="cpu", dtype=torch.float32)
    expected = their_scores(theirs, rows)
    assert wide.score(rows) == pytest.approx(expected, abs=TOLERANCE)
    assert model.score(rows) == pytest.approx(expected, abs=0.05 * (max(expected) - min(expected)))


SCRIPT = """
import json, sys
from llama.rejection_sampling.reward_model import RewardModel
folder, rows = sys.argv[1], json.loads(sys.argv[2])
model = RewardModel.build(folder, device="cpu")
import torch.distributed as dist
every = [None] * dist.get_world_size()
dist.all_gather_object(every, model.score(rows))
if dist.get_rank() == 0:
    print(json.dumps(every))
"""


@pytest.mark.parametrize("n_processes", [1, 2])
def test_the_scores_on_any_number_of_processes_are_those_of_transformers(tmp_path, n_processes):
    theirs, rows = write_reward_model(tmp_path / "rm", max_seq_len=256), texts()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = ranks(n_processes, script, tmp_path / "rm", json.dumps(rows))
    assert result.returncode == 0, result.stderr
    every = json.loads(result.stdout)
    assert len(every) == n_processes and all(scores == every[0] for scores in every)  # the same bits on each rank
    assert every[0] == pytest.approx(their_scores(theirs, rows), abs=TOLERANCE)


# The chat template in the tokenizer_config.json of Meta-Llama-3-8B-Instruct.
TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
)


def test_a_dialog_and_its_answer_are_the_ids_of_the_chat_template(tmp_path):
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(hf_tokenizer(tmp_path))
    theirs.chat_template = TEMPLATE
    model = RewardModel(None, Tokenizer(shared("tokenizers", "llama3", "tokenizer.model")))
    dialog = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": " What is 2 + 2? \n"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Née à Zürich?"},
    ]
    expected = theirs.apply_chat_template([*dialog, {"role": "assistant", "content": " Oui, à Zürich.\n"}])
    assert model.encode(dialog, " Oui, à Zürich.\n") == expected["input_ids"]
    assert model.encode("One day", " it rained") == theirs("One day it rained")["input_ids"]


def hf_tokenizer(folder):
    """Llama 3's tokenizer as a Hugging Face directory has it."""
    from llama.tokenizer.tokenizer import LLAMA3_PATTERN
    from llama.tokenizer.tokenizer_json import tokenizer_json

    ours = Tokenizer(shared("tokenizers", "llama3", "tokenizer.model"))
    text = tokenizer_json(ours.ranks, ours.special_tokens, "<|begin_of_text|>", LLAMA3_PATTERN)
    (folder / "tokenizer.json").write_text(text)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_other_directories_are_refused_and_named_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist: expected a directory with config.json"):
        RewardModel.build(tmp_path / "none")
    with pytest.raises(ValueError, match=r"Meta's checkpoint of a language model: expected config.json and model"):
        RewardModel.build(DEMO)
    transformers_model(random_model(**SHAPE)).save_pretrained(tmp_path / "lm")
    write_byte_tokenizer(tmp_path / "lm" / "tokenizer.model")
    with pytest.raises(ValueError, match=r"is a language model \(LlamaForCausalLM\): expected a reward model, which"):
        RewardModel.build(tmp_path / "lm")
    write_reward_model(tmp_path / "three", n_labels=3)
    with pytest.raises(ValueError, match=r"has 3 labels \(num_labels\): expected 1, the reward"):
        RewardModel.build(tmp_path / "three")
    write_reward_model(tmp_path / "rm")
    with pytest.raises(
        ValueError, match=r"rm is a reward model, which scores texts and writes none .*: expected a lan"
    ):
        Llama.build(tmp_path / "rm", device="cpu")


def test_a_vocabulary_other_than_the_tokenizers_is_refused_with_both_sizes(tmp_path):
    write_reward_model(tmp_path / "rm")
    write_byte_tokenizer(tmp_path / "rm" / "tokenizer.model", 300)  # and 256 special ones
    with pytest.raises(ValueError, match="says vocab_size 512, but the tokenizer has 556 tokens"):
        RewardModel.build(tmp_path / "rm")
    (tmp_path / "rm" / "tokenizer.model").unlink()
    policys = Tokenizer(DEMO / "tokenizer.model")
    with pytest.raises(ValueError, match=f"says vocab_size 512, but the tokenizer has {policys.n_words} tokens"):
        RewardModel.build(tmp_path / "rm", policys)
    with pytest.raises(FileNotFoundError, match="there is no tokenizer file"):
        RewardModel.build(tmp_path / "rm")
    write_byte_tokenizer(tmp_path / "tokenizer.model")
    assert RewardModel.build(tmp_path / "rm", Tokenizer(tmp_path / "tokenizer.model")).score([[1, 2]])


def test_a_text_without_tokens_or_too_long_is_refused_before_anything_runs(tmp_path):
    write_reward_model(tmp_path / "rm", max_seq_len=32)
    model = RewardModel.build(tmp_path / "rm")
    with pytest.raises(ValueError, match=r"text 1 has 0 tokens: expected 1 to 32"):
        model.score([[1], []])
    with pytest.raises(ValueError, match=r"text 0 has 33 tokens: expected 1 to 32"):
        model.score([[1] * 33])


def test_a_missing_or_too_wide_score_weight_is_refused(tmp_path):
    write_reward_model(tmp_path / "rm", n_labels=2)
    change_config(tmp_path / "rm", id2label={"0": "LABEL_0"})
    with pytest.raises(ValueError, match=r"score.weight has shape \[2, 64\]: expected \[1, 64\]"):
        RewardModel.build(tmp_path / "rm")
