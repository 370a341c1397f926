"""A user's mistakes are refused before the first step, or counted, with what was found."""

import copy
import json
from pathlib import Path

import pytest
import torch
from training_helpers import run, write_rows

from llama import Llama, Tokenizer
from llama.checkpoint.convert import quantize
from llama.datasets.fingerprint import fingerprint
from llama.datasets.rows import Rows, row_of
from llama.tokenizer.chat_template import ChatTemplate
from llama.training import Options, finetune
from llama.training.examples import Example, Reader
from llama.training.sft import COLUMNS_AS_JSON

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def read(write_checkpoint, tmp_path):
    """Reads rows; returns the examples and what was skipped."""
    tokenizer = Tokenizer(write_checkpoint() / "tokenizer.model")

    def of(*rows: dict, **options):
        reader = Reader(tokenizer, **{"max_seq_len": 60} | options)
        examples = reader.read(Rows(write(tmp_path / "rows.jsonl", *rows)))
        return examples, reader.skipped.lines(), tokenizer

    return of


def learned(example, tokenizer) -> str:
    (document,) = example.documents
    return tokenizer.decode([i for i, ok in zip(document.ids, document.learned) if ok])


def test_from_each_form_of_a_row_the_right_tokens_are_learned(read):
    dialog = [USER, ANSWER, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"}, USER]
    answers = [{"text": "a", "score": 0.2}, {"text": "b", "score": 0.9}, {"text": "c", "score": None}]
    rows = [{"messages": dialog}, {"prompt": "one", "completion": " two"}, {"text": "three"}]
    rows += [{"messages": [USER], "answers": answers, "scores": [0.2, 0.9]}, {"prompt": "four", "answers": answers}]
    examples, skipped, tokenizer = read(*rows)
    eot, end = "<|eot_id|>", "<|end_of_text|>"
    assert not skipped
    texts = [learned(e, tokenizer) for e in examples]
    assert texts == [f"yes{eot}no{eot}", f" two{end}", f"three{end}", f"b{eot}", f"b{end}"]
    assert learned(read(rows[0], learn="last")[0][0], tokenizer) == f"no{eot}"
    whole = learned(read(rows[0], learn="all", max_seq_len=100)[0][0], tokenizer)
    assert whole.startswith("<|start_header_id|>user") and whole.endswith(f"hi{eot}")
    assert len(read(rows[3], threshold=0.1)[0]) == 2  # all answers with that score
    assert all(not document.learned[0] for e in examples for document in e.documents)


def test_a_whole_rollout_is_learned_and_a_row_with_open_turns_is_skipped(read):
    asked = [USER, {"role": "assistant", "content": "<PLACEHOLDER>"}, {"role": "user", "content": "and?"}]
    drawn = [USER, ANSWER, asked[2], {"role": "assistant", "content": "no"}]
    best, broken_off = ({"text": "no", "score": 1, "messages": drawn, "finish_reason": f} for f in ("stop", "length"))
    rows = [{"messages": asked, "answers": [best]}, {"messages": asked, "answers": [broken_off]}]
    rows += [{"messages": "hi", "answers": [{"text": "yes", "score": 1}]}]  # a dialog of one turn, as in `sample`
    examples, skipped, tokenizer = read(*rows, {"messages": [*asked, ANSWER]}, {"text": "yes", "finish_reason": "stop"})
    texts = [learned(e, tokenizer) for e in examples]
    assert texts == ["yes<|eot_id|>no<|eot_id|>", "yes<|eot_id|>no", "yes<|eot_id|>"]
    assert "PLACEHOLDER" not in tokenizer.decode(examples[0].documents[0].ids)
    assert skipped[0] == "1 row has open turns: expected answers in their places (the first is line 4)"
    assert skipped[1].startswith("1 row is broken (the first is line 5: found 'text', 'finish_reason': expected")


TEMPLATE = """{% for m in messages %}{{ '<|start_header_id|>' + m.role + ':' + m.content + '<|eot_id|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant:' }}{% endif %}"""


def test_dialogs_are_learned_in_the_format_of_the_checkpoints_template(write_checkpoint):
    tokenizer = Tokenizer(write_checkpoint() / "tokenizer.model")
    tokenizer.chat_template = ChatTemplate(TEMPLATE, Path("tokenizer_config.json"), {})
    reader = Reader(tokenizer, 100)
    document = reader.dialog([USER, ANSWER, USER, ANSWER])
    prompt = reader.formatter.encode_dialog_prompt([USER, ANSWER, USER])
    assert document.ids[: len(prompt)] == prompt and not any(document.learned[len(prompt) - 1 : len(prompt)])
    assert learned(Example((document,)), tokenizer) == "yes<|eot_id|>\n" * 2
    (sampled,) = reader.read(map(row_of, [1], [{"messages": [USER], "answers": [{"text": "yes", "score": 1}]}]))
    assert sampled.documents[0] == reader.dialog([USER, ANSWER])
    (pair,) = Reader(tokenizer, 100, pairs=True).read(
        map(row_of, [1], [{"messages": [USER], "chosen": "yes", "rejected": "no"}])
    )
    assert pair.documents[0].ids == sampled.documents[0].ids
    # This template opens an answer with text that is not in a whole dialog: the model would never draw what it learned.
    tokenizer.chat_template = ChatTemplate(TEMPLATE.replace("assistant:", "assistant:<think>"), Path("x"), {})
    reader = Reader(tokenizer, 100)
    assert not reader.read(map(row_of, [1], [{"messages": [USER, ANSWER]}]))
    assert reader.skipped.lines()[0].startswith("1 row has an answer that the chat template does not write after")


def test_rows_without_an_answer_and_rows_too_long_are_skipped_or_cut_and_counted(read):
    long, none = {"prompt": "p", "completion": "x" * 100}, {"messages": [USER]}
    examples, skipped, _ = read({"text": "ok"}, none, long, none, {"what": 1}, {"messages": "hi"})
    assert len(examples) == 1 and skipped == [
        "2 rows have no turn of the assistant (the first is line 2)",
        "1 row is longer than max_seq_len = 60: skipped (the first is line 3)",
        "2 rows are broken (the first is line 5: found 'what': expected `messages`, `prompt` and `completion`, `text`, "
        "`answers` as `llama sample` writes them)",
    ]
    examples, skipped, _ = read(long, {"prompt": "p" * 100, "completion": "x"}, cut=True)
    assert [len(e.documents[0].ids) for e in examples] == [60]
    assert [line.split(" (")[0] for line in skipped] == [
        "1 row is longer than max_seq_len = 60: cut",
        "1 row is longer than max_seq_len = 60, with nothing to learn before the cut: skipped",
    ]
    _, skipped, _ = read({"messages": [USER], "answers": [{"text": "a", "score": 0.2}]}, threshold=0.5)
    assert skipped[0].startswith("1 row has no answer with a score of at least 0.5")


def test_a_number_in_a_csv_file_is_text(write_checkpoint, tmp_path):
    (tmp_path / "sums.csv").write_text("prompt,completion\n1 + 1 =,2\n[1],[2]\n")
    tokenizer = Tokenizer(write_checkpoint() / "tokenizer.model")
    reader = Reader(tokenizer, 60)
    examples = reader.read(Rows(tmp_path / "sums.csv", COLUMNS_AS_JSON))
    assert [learned(e, tokenizer) for e in examples] == ["2<|end_of_text|>", "[2]<|end_of_text|>"]


def test_ids_outside_the_vocabulary_are_refused(read):
    _, skipped, _ = read({"tokens": [1, 512], "answers": [{"text": "a", "score": 1}]})
    assert "tokens: expected a list of ids from 0 to 511" in skipped[0]


def test_a_data_set_with_nothing_to_learn_from_is_refused(write_checkpoint, tmp_path):
    ckpt = write_checkpoint()
    with pytest.raises(ValueError, match="has nothing to learn from: it has no rows"):
        run(write(tmp_path / "empty.jsonl"), tmp_path / "out", ckpt)
    with pytest.raises(ValueError, match="nothing to learn from: 1 row has no turn of the assistant"):
        run(write(tmp_path / "users.jsonl", {"messages": [USER]}), tmp_path / "out", ckpt)
    with pytest.raises(ValueError, match=r"epochs = 0.01 of 3 examples is less than one example"):
        run(write(tmp_path / "few.jsonl", *[{"text": "a"}] * 3), tmp_path / "out", ckpt, epochs=0.01)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "lora_rank = 0: expected an integer of at least 1"),
        ({"epochs": 0}, "epochs = 0: expected a number above 0"),
        ({"lr": float("nan")}, "lr = nan: expected a number above 0"),
        ({"learn": "some"}, "learn = 'some': expected one of 'answers', 'last', 'all'"),
        ({"warmup": 1}, "warmup = 1: expected a number of at least 0 and below 1"),
        ({"lora_rank": 2, "lora_targets": "wq,up"}, "lora_targets has 'up': expected some of wq, wk"),
        ({"lora_targets": "wq"}, "expected lora_rank with them"),
        ({"dtype": "int8"}, "dtype = 'int8': expected one of 'float32'"),
        ({"pack": 3}, "pack = 3: expected True or False"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_an_adapter_larger_than_the_model_is_refused(write_checkpoint, tmp_path):
    ckpt, data = write_checkpoint(), write_rows(tmp_path / "rows.jsonl", n=4)
    with pytest.raises(ValueError, match="lora_rank = 65: expected at most 64, the model's dim"):
        run(data, tmp_path / "out", ckpt, lora_rank=65)


def test_an_adapter_for_another_base_is_refused(write_checkpoint, tmp_path):
    ckpt, data = write_checkpoint(), write_rows(tmp_path / "rows.jsonl")
    run(data, tmp_path / "out", ckpt, lora_rank=2, steps=2)
    with pytest.raises(ValueError, match=r"an adapter for another base: its norms had the digest \w+, this one's have"):
        Llama.build(write_checkpoint("same_shape", seed=1), max_seq_len=64, adapter=tmp_path / "out")
    with pytest.raises(ValueError, match=r"changes layers.0.attention.wk.weight of \[32, 64\], and this has one of"):
        Llama.build(write_checkpoint("other_shape", n_kv_heads=2), max_seq_len=64, adapter=tmp_path / "out")
    with pytest.raises(ValueError, match=r"14 unexpected tensors, such as base_model.*in the 1 layers of the base"):
        Llama.build(write_checkpoint("shallow", n_layers=1), max_seq_len=64, adapter=tmp_path / "out")
    config = tmp_path / "out" / "adapter_config.json"
    for key, value, message in [
        ("use_dora", True, "use_dora is True: only False is supported"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa', which changes the base's own weights"),
    ]:
        written = config.read_text()
        config.write_text(json.dumps(json.loads(written) | {key: value}))
        with pytest.raises(ValueError, match=message):
            Llama.build(ckpt, max_seq_len=64, adapter=tmp_path / "out")
        config.write_text(written)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        Llama.build(ckpt, max_seq_len=64, adapter=ckpt)


def test_a_quantised_checkpoint_takes_an_adapter_and_no_full_fine_tuning(write_checkpoint, tmp_path):
    ckpt, data = write_checkpoint(dim=128), write_rows(tmp_path / "rows.jsonl")
    options = {"lora_rank": 4, "lr": 1e-2, "steps": 30, "dtype": "float32"}
    plain = run(data, tmp_path / "plain", ckpt, **options)
    assert plain[-1]["loss"] < plain[0]["loss"] - 0.5
    for kind, tolerance in (("int8", 0.05), ("int4", 0.3)):
        rounded, adapter = tmp_path / kind, tmp_path / f"{kind}-adapter"
        quantize(ckpt, rounded, kind)
        with pytest.raises(ValueError, match=rf"is quantised to {kind}, and rounded matrices cannot learn"):
            run(data, adapter, rounded)
        with pytest.raises(ValueError, match="rounded matrices cannot learn"):
            Llama.build(rounded, max_seq_len=64, train=True)
        # The adapter learns nearly the same as on the plain weights, so the gradients through the codes are right.
        log = run(data, adapter, rounded, **options)
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(log, plain)) < tolerance
        check_an_adapter_beside_codes(rounded, kind, adapter)


def check_an_adapter_beside_codes(rounded: Path, kind: str, adapter: Path) -> None:
    ids = torch.randint(512, (1, 20), generator=torch.Generator().manual_seed(0))
    beside, without = (Llama.build(rounded, max_seq_len=64, dtype="float32", adapter=path) for path in (adapter, None))
    with torch.inference_mode():
        assert (beside.model(ids) - without.model(ids)).abs().max() > 0.1
    copied = copy.deepcopy(beside.model)
    assert torch.equal(copied(ids), beside.model(ids))  # none of its parameters requires gradients
    with pytest.raises(ValueError, match="compile = True with an adapter beside quantised weights"):
        Llama.build(rounded, max_seq_len=64, adapter=adapter, compile=True)
    assert fingerprint(beside) != fingerprint(without)  # so no journal goes on with the other
    with pytest.raises(ValueError, match=f"the weights are in {kind}: expected a model that was built without"):
        without.save(rounded.with_name("saved"))


def test_a_forward_pass_that_would_need_gradients_of_codes_is_an_error(write_checkpoint):
    model = Llama.build(write_checkpoint(), max_seq_len=64, quantize="int8", dtype="float32").model
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        model(ids)
    model.tok_embeddings.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="gradient"):
        model(ids)


def test_an_existing_result_or_missing_data_is_refused_before_anything_runs(write_checkpoint, tmp_path):
    ckpt, data = write_checkpoint(), write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        finetune(tmp_path / "none.jsonl", tmp_path / "out", ckpt, Options())
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        finetune(data, data, ckpt, Options())
    with pytest.raises(FileNotFoundError, match=r"ckpt_dir .* does not exist"):
        finetune(data, tmp_path / "out", tmp_path / "nowhere", Options())
