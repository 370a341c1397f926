"""Prompts that are too long are cut with `truncate`: texts, ids, dialogs, streams, rows."""

import pytest
from conftest import DEMO

from llama import Llama
from llama.datasets import run_batch
from llama.rejection_sampling import rejection_sample

LONG = "The fox and the owl went into the forest. " * 20
END = "So they met Zoë 🌙."
TEXT = LONG + END
GREEDY = {"temperature": 0, "max_gen_len": 5}


@pytest.fixture(scope="module")
def small() -> Llama:
    return Llama.build(DEMO, max_seq_len=64, max_batch_size=4, device="cpu", dtype="float32")


@pytest.fixture
def prompts(small, monkeypatch) -> list[list[int]]:
    """The prompts that the engine is given."""
    given, add = [], small._engine.add

    def noted(sequence):
        given.append(list(sequence.prompt))
        add(sequence)

    monkeypatch.setattr(small._engine, "add", noted)
    return given


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_and_ids_keep_the_beginning_of_text_and_as_much_as_leaves_room(small, prompts, side):
    bos, *ids = small.tokenizer.encode(TEXT, bos=True)
    kept = [bos, *(ids[-58:] if side == "left" else ids[:58])]
    (cut,) = small.text_completion([TEXT], truncate=side, **GREEDY)
    assert cut["truncated"] == len(ids) - 58
    assert small.generate([[bos, *ids]], truncate=side, **GREEDY)[0] == small.generate([kept], **GREEDY)[0]
    assert "".join(small.stream_text(TEXT, truncate=side, **GREEDY)) == cut["generation"]
    (record,) = run_batch(small, [{"prompt": TEXT, "truncate": side, **GREEDY}])
    assert (record["text"], record["prompt_tokens"], record["truncated"]) == (cut["generation"], 59, cut["truncated"])
    (drawn,) = rejection_sample(small, [TEXT], "logprob", n=1, truncate=side, **GREEDY)
    assert drawn["best"] == cut["generation"]
    assert prompts == [kept] * 6


def test_room_is_left_for_the_answer_and_never_more_than_a_quarter(small, prompts):
    ids = [5] * 100
    budgets = [None, 0, 3, 1000]
    small.generate([ids] * 4, budgets, 0, truncate="right")
    assert sorted(map(len, prompts)) == [48, 48, 61, 64]
    prompts.clear()
    (fits,) = small.text_completion(["The fox"], truncate="left", **GREEDY)
    assert "truncated" not in fits and small.text_completion(["The fox"], **GREEDY) == [fits]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("end", ["", "🌙" * 30])
def test_of_a_dialog_the_longest_message_is_cut_and_the_format_is_whole(small, prompts, side, end):
    dialog = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT + end}]
    (cut,) = small.chat_completion([dialog], truncate=side, **GREEDY)
    (prompt,) = prompts
    _, after = small.tokenizer.decode(prompt).split("Be brief.")
    content = after.split("<|end_header_id|>\n\n")[1].removesuffix("<|eot_id|><|start_header_id|>assistant")
    whole = dialog[1]["content"]
    assert whole.endswith(content) if side == "left" else whole.startswith(content)
    assert 55 <= len(prompt) <= 59 and "\ufffd" not in content
    alone = [dialog[0], {"role": "user", "content": content}]
    assert small.formatter.encode_dialog_prompt(alone) == prompt
    assert cut["truncated"] == len(small.formatter.encode_dialog_prompt(dialog)) - len(prompt)
    assert "".join(small.stream_chat(dialog, truncate=side, **GREEDY)) == cut["generation"]["content"]
    (record,) = run_batch(small, [{"messages": dialog}], truncate=side, **GREEDY)
    assert (record["text"], record["truncated"]) == (cut["generation"]["content"], cut["truncated"])


def test_each_open_turn_is_cut_for_itself(small):
    P = {"role": "assistant", "content": "<PLACEHOLDER>"}
    dialog = [{"role": "user", "content": TEXT}, P, {"role": "user", "content": "And then?"}, P]
    (record,) = run_batch(small, [{"messages": dialog}], truncate="left", **GREEDY)
    first, second = record["turns"]
    assert second["truncated"] > first["truncated"] > 0 and record["messages"][0]["content"] == TEXT


def test_what_cannot_be_cut_is_an_error(small):
    for call in (
        lambda **options: small.text_completion([TEXT], **options),
        lambda **options: small.chat_completion([TEXT], **options),
        lambda **options: small.stream_text(TEXT, **options),
    ):
        with pytest.raises(ValueError, match=r"has \d+ tokens: expected at most max_seq_len = 64; truncate = 'left'"):
            call()
        with pytest.raises(ValueError, match="truncate = 'middle': expected 'left' or 'right', or None"):
            call(truncate="middle")
    many = [{"role": role, "content": "The fox and the owl."} for role in ("user", "assistant") * 6 + ("user",)]
    with pytest.raises(ValueError, match=r"dialog 0: the dialog has \d+ tokens without its longest message: expected"):
        small.chat_completion([many], truncate="left")
