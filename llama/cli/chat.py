"""A conversation with a model: its messages, and the commands that change it. Knows nothing of terminals or tensors."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama import Llama
from llama.tokenizer import Dialog, Message

HELP = """\
/reset        forget the conversation; the system prompt stays
/system TEXT  set the system prompt and start a new conversation; without TEXT, show it
/save FILE    write the conversation to a new file, as a JSON list of messages
/help         show this
/quit         leave, as exit, quit and Ctrl-D do
A line that ends in \\ goes on in the next line; pasted lines are one message.
Ctrl-C stops an answer; its text so far stays in the conversation.
"""
NO_ANSWER = "(I have no answer to that. Please put it another way.)\n"  # the turn is then not kept


class Conversation:
    """The messages so far, and how each new line changes them.

    Args:
        llama: the model that answers.
        system: the system prompt.
        options: how the answers are decoded, as in `Llama.stream_chat`.
    """

    def __init__(self, llama: Llama, system: str | None = None, **options: Any):
        self.llama, self.system, self.options = llama, system, options
        self.turns: list[Message] = []  # user and assistant alternate; the assistant is last
        self.ended = False  # by /quit, exit or quit

    def dialog(self, *more: Message) -> Dialog:
        """The system prompt, the turns, and `more`."""
        start: Dialog = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*start, *self.turns, *more]

    def respond(self, line: str) -> Iterator[str]:
        """Yields the text to show for a line; an answer comes in pieces. Closing the iterator stops the answer.

        If an answer is stopped or fails, its text so far is kept with the question; if it has no text, neither is kept,
        so that user and assistant always alternate. A ValueError about the message changes nothing. A line that begins
        with a space is always a message.
        """
        command, argument = [*line.strip().split(maxsplit=1), "", ""][:2]
        if line.rstrip() in ("exit", "quit"):
            self.ended = True
        elif not line.startswith("/"):
            if line.strip():
                yield from self._answer({"role": "user", "content": line.strip()})
        elif command == "/reset":
            self.turns = []
            yield "(a new conversation)\n"
        elif command == "/system" and argument:
            self.system, self.turns = argument, []  # the turns so far had another one
            yield "(the system prompt is set: a new conversation)\n"
        elif command == "/system":
            yield "(no system prompt)\n" if self.system is None else f"{self.system}\n"
        elif command == "/save":
            yield self._save(argument)
        elif command == "/help":
            yield HELP
        elif command == "/quit":
            self.ended = True
        else:
            yield f"(no command {command}: /help lists them; with a space before it, it is a message)\n"

    def _answer(self, message: Message) -> Iterator[str]:
        if n_forgotten := self._make_room(message):
            oldest = "oldest turn is" if n_forgotten == 1 else f"{n_forgotten} oldest turns are"
            yield f"(the context of {self.llama.args.max_seq_len:,} tokens is full: the {oldest} forgotten)\n"
        answer = ""
        try:
            with closing(self.llama.stream_chat(self.dialog(message), **self.options)) as pieces:
                for piece in pieces:
                    answer += piece
                    yield piece
        finally:
            if answer.strip():
                self.turns += [message, {"role": "assistant", "content": answer}]
        yield "\n" if answer.strip() else NO_ANSWER

    def _make_room(self, message: Message) -> int:
        """Forgets the oldest turns until a quarter of the context, or max_gen_len, is free. Returns how many."""
        limit = self.llama.args.max_seq_len
        room = max(1, min(limit // 4, self.options.get("max_gen_len") or limit))
        before = self.turns
        while (n := len(self.llama.formatter.encode_dialog_prompt(self.dialog(message)))) + room > limit and self.turns:
            self.turns = self.turns[2:]
        if n >= limit and self.options.get("truncate") is None:
            self.turns = before
            raise ValueError(
                f"the message makes a prompt of {n:,} tokens without any earlier turn: expected at most {limit - 1:,}, "
                f"to leave room for an answer in max_seq_len = {limit:,}"
            )
        return (len(before) - len(self.turns)) // 2

    def _save(self, name: str) -> str:
        """Writes the dialog to a new file, on rank 0."""
        if not name:
            return "(/save FILE: which file?)\n"
        if dist.get_rank() > 0:
            return ""
        dialog = self.dialog()
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps(dialog, ensure_ascii=False, indent=2) + "\n")
        except (OSError, ValueError, RuntimeError) as error:  # the file exists; a null byte in the name; no such ~user
            return f"(not saved: {error})\n"
        return f"(saved {len(dialog)} message{'' if len(dialog) == 1 else 's'} in {name})\n"
