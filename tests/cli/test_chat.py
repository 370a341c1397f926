"""The conversation by itself: how each line changes it.

The models have random weights and a tokenizer of bytes; a logit_bias chooses what they say.
"""

import json

import pytest

from llama import Llama
from llama.cli.chat import NO_ANSWER, Conversation

A, EOT = ord("a"), 256 + 9


@pytest.fixture
def small(write_checkpoint) -> Llama:
    return Llama.build(write_checkpoint(), max_seq_len=256, max_batch_size=1, device="cpu")


def says(letter: int, length: int = 5) -> dict:
    """Options that make a model repeat one token."""
    return {"logit_bias": {letter: 1e9}, "max_gen_len": length}


def respond(conversation: Conversation, line: str) -> str:
    return "".join(conversation.respond(line))


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def test_each_answer_is_to_the_whole_dialog_so_far(small):
    conversation = Conversation(small, "Be brief.", temperature=0, max_gen_len=8)
    dialog = [{"role": "system", "content": "Be brief."}]
    for question in ("Hello", "And then?"):
        dialog.append(user(question))
        expected = small.chat_completion([dialog], temperature=0, max_gen_len=8)[0]["generation"]
        assert respond(conversation, question) == expected["content"] + "\n"
        dialog.append(expected)
    assert conversation.dialog() == dialog


def test_a_second_turn_prefills_only_what_is_new(small):
    conversation = Conversation(small, "x" * 100, **says(A, 20))
    respond(conversation, "Hello")
    before = small._engine.counters.prefilled
    assert respond(conversation, "again") == "a" * 20 + "\n"
    new = "useragainassistant"  # a byte is a token; two for the ends of turns, and two headers of 4 with their \n\n
    assert small._engine.counters.prefilled - before <= len(new) + 2 + 2 * 4 + 1  # and the last of the answer


def test_the_beginning_of_a_stopped_answer_is_kept(small):
    conversation = Conversation(small, **says(A, 100))
    answer = conversation.respond("Hello")
    beginning = next(answer) + next(answer)
    answer.close()
    assert beginning in ("aa", "aaa")
    assert conversation.turns == [user("Hello"), assistant(beginning)]
    assert not small._engine.running
    conversation.options = says(ord("b"))
    assert respond(conversation, "go on") == "bbbbb\n"


def test_an_empty_answer_gets_a_polite_line_and_is_not_kept(small):
    conversation = Conversation(small, **says(EOT))
    assert respond(conversation, "Hello") == NO_ANSWER
    assert conversation.turns == []
    conversation.options = says(ord("\n"))  # blank
    assert respond(conversation, "Hello").endswith(NO_ANSWER)
    assert conversation.turns == []
    conversation.options = says(A)
    respond(conversation, "Hello")
    assert conversation.turns == [user("Hello"), assistant("aaaaa")]


def test_a_full_context_forgets_the_oldest_turns_and_says_so(small):
    conversation = Conversation(small, "S", **says(A))
    n_forgotten_before = 0
    notes, questions = [], [str(n) * length for n, length in enumerate([30, 40, 30, 30, 3, 5, 7, 60, 2, 4])]
    for n, question in enumerate(questions):
        shown = respond(conversation, question)
        notes.append("full" in shown)
        assert shown.endswith("aaaaa\n")
        assert conversation.dialog()[0] == {"role": "system", "content": "S"}
        kept = [turn["content"] for turn in conversation.turns[::2]]
        assert kept == questions[n + 1 - len(kept) : n + 1]
        # It keeps as many turns as leave room for the answer.
        older = [m for q in questions[n - len(kept) : n] for m in (user(q), assistant("aaaaa"))]
        dialog = [conversation.dialog()[0], *older, user(question)]
        if len(kept) <= n:
            assert len(small.formatter.encode_dialog_prompt(dialog)) + 5 > 256
        assert len(small.formatter.encode_dialog_prompt(conversation.dialog()[:-1])) + 5 <= 256
        assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * len(kept)
        n_forgotten = n + 1 - len(kept) - n_forgotten_before
        oldest = "oldest turn is" if n_forgotten == 1 else f"{n_forgotten} oldest turns are"
        assert (
            (f"(the context of 256 tokens is full: the {oldest} forgotten)" in shown) == notes[-1] == (n_forgotten > 0)
        )
        n_forgotten_before += n_forgotten
    assert not notes[0] and sum(notes) > 2


def test_a_message_too_long_is_refused_with_the_numbers_and_changes_nothing(small):
    conversation = Conversation(small, **says(A))
    respond(conversation, "Hello")
    dialog = conversation.dialog()
    with pytest.raises(ValueError, match=r"a prompt of 3\d\d tokens .* expected at most 255, .* max_seq_len = 256"):
        respond(conversation, "x" * 300)
    with pytest.raises(ValueError, match="surrogate"):
        respond(conversation, "\ud800")
    assert conversation.dialog() == dialog
    assert respond(conversation, "short") == "aaaaa\n"


def test_the_commands(small, tmp_path):
    conversation = Conversation(small, **says(A))
    assert "no system prompt" in respond(conversation, "/system")
    respond(conversation, "Hello")
    assert "new conversation" in respond(conversation, "/system  Speak up. ")
    assert conversation.dialog() == [{"role": "system", "content": "Speak up."}]
    assert respond(conversation, "/system") == "Speak up.\n"
    respond(conversation, "Hallå")
    file = tmp_path / "my dialog.json"
    assert "saved 3 messages" in respond(conversation, f"/save {file}")
    assert json.loads(file.read_text(encoding="utf-8")) == conversation.dialog()
    assert "exists" in respond(conversation, f"/save {file}")
    assert "not saved" in respond(conversation, f"/save {tmp_path / 'none' / 'x'}")
    assert "not saved" in respond(conversation, "/save ~nobody-of-that-name/x")
    assert "which file" in respond(conversation, "/save")
    assert len(conversation.turns) == 2
    assert "new conversation" in respond(conversation, "/reset")
    assert conversation.dialog() == [{"role": "system", "content": "Speak up."}]
    assert "saved 1 message in" in respond(conversation, f"/save {tmp_path / 'one'}")
    assert "no command /resett" in respond(conversation, "/resett now")
    assert "/save FILE" in respond(conversation, "/help")
    assert respond(conversation, "   ") == ""
    assert respond(conversation, " /quit") == "aaaaa\n"  # a message
    assert not conversation.ended
    assert respond(conversation, "/quit") == ""
    assert conversation.ended


@pytest.mark.parametrize("line", ["/quit", "quit", "exit", "exit "])
def test_these_lines_end_it(small, line):
    conversation = Conversation(small, **says(A))
    assert respond(conversation, line) == ""
    assert conversation.ended and conversation.turns == []


def test_with_a_space_before_it_or_more_text_after_it_such_a_line_is_a_message(small):
    conversation = Conversation(small, **says(A))
    for line in (" exit", " /quit", "quit smoking?", "exit\nnow"):
        assert respond(conversation, line) == "aaaaa\n"
    assert not conversation.ended
    assert [turn["content"] for turn in conversation.turns[::2]] == ["exit", "/quit", "quit smoking?", "exit\nnow"]
