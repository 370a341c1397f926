"""Rows of a data file to what a model learns from: ids, and which of them are learned.

Knows the forms of a row; nothing of batches, models or files. What cannot be used is counted with its reason.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from llama.datasets.rows import Row
from llama.tokenizer import ChatFormat, Dialog, Tokenizer
from llama.tokenizer.open_turns import as_dialog, has_open_turns

FORMS = "`messages`, `prompt` and `completion`, `text`, `answers` as `llama sample` writes them"
PAIR_FORM = "`chosen` and `rejected`, with a `prompt` or `messages` before them or as whole dialogs"


@dataclass(frozen=True)
class Document:
    """A text that a model reads from its first position on.

    Attributes:
        ids: at least two where something is learned.
        learned: for each id whether predicting it is in the loss; never the first.
    """

    ids: list[int]
    learned: list[bool]

    @property
    def n_learned(self) -> int:
        return sum(self.learned)


@dataclass(frozen=True)
class Example:
    """What one row teaches: a document; or two, the chosen answer's and the rejected one's."""

    documents: tuple[Document, ...]

    @property
    def n_tokens(self) -> int:
        return sum(len(document.ids) for document in self.documents)


@dataclass
class Skipped:
    """Rows that were not used, or not wholly: how many for each reason, and the first line of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, reason: str, row: Row, detail: str = "") -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, f"line {row.number}" + (f": {detail}" if detail else ""))

    def lines(self) -> list[str]:
        one = {"are": "is", "have": "has"}
        lines = []
        for reason, n in self.counts.items():
            verb, _, rest = reason.partition(" ")
            rows = f"1 row {one.get(verb, verb)}" if n == 1 else f"{n} rows {verb}"
            lines.append(f"{rows} {rest} (the first is {self.first[reason]})")
        return lines


class NothingToLearn(ValueError):
    """A row in a known form without anything to learn; the message is the reason it is counted under."""


class Reader:
    """Makes examples of rows.

    Args:
        tokenizer: of the model.
        max_seq_len: the most ids of a document.
        learn: what of a dialog is in the loss: "answers" (every turn of the assistant), "last" or "all".
        threshold: of a row of `llama sample`, all answers with at least this score; its best answer when None.
        cut: whether longer documents are cut to max_seq_len; else they are skipped. Both are counted.
        pairs: whether rows are pairs for a reward model.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_seq_len: int,
        learn: str = "answers",
        threshold: float | None = None,
        cut: bool = False,
        pairs: bool = False,
    ):
        self.tokenizer, self.formatter = tokenizer, ChatFormat(tokenizer)
        self.max_seq_len, self.learn, self.threshold, self.cut, self.pairs = max_seq_len, learn, threshold, cut, pairs
        self.skipped = Skipped()

    def read(self, rows: Iterable[Row]) -> list[Example]:
        """The examples of rows, in their order; `skipped` says what became of the others."""
        examples = []
        for row in rows:
            try:
                if row.error is not None:
                    raise ValueError(row.error)
                found = [self._pair(row.fields)] if self.pairs else self._examples(row.fields)
            except NothingToLearn as error:
                self.skipped.note(str(error), row)
            except (ValueError, TypeError) as error:
                self.skipped.note("are broken", row, str(error))
            else:
                examples += [fitted for example in found if (fitted := self._fitted(example, row)) is not None]
        return examples

    def _fitted(self, example: Example, row: Row) -> Example | None:
        """The example if it is short enough, or what is left of it; None if nothing is."""
        if all(len(document.ids) <= self.max_seq_len for document in example.documents):
            return example
        limit = f"are longer than max_seq_len = {self.max_seq_len}"
        if self.pairs or not self.cut:  # the end of an answer is what a reward model judges
            self.skipped.note(f"{limit}: skipped", row)
            return None
        (document,) = example.documents
        document = Document(document.ids[: self.max_seq_len], document.learned[: self.max_seq_len])
        if not document.n_learned:
            self.skipped.note(f"{limit}, and nothing learned is in their beginning: skipped", row)
            return None
        self.skipped.note(f"{limit}: cut", row)
        return Example((document,))

    def _examples(self, fields: dict[str, Any]) -> list[Example]:
        if fields.get("error") is not None:
            raise NothingToLearn("have an error in place of an answer")
        if "answers" in fields:
            documents = [self._answered(fields, answer) for answer in self._chosen_answers(fields)]
        elif fields.get("messages") is not None:
            documents = [self.dialog(fields["messages"])]
        elif fields.get("completion") is not None:
            documents = [self._completed(fields.get("prompt"), fields["completion"])]
        elif fields.get("text") is not None and fields.get("prompt") is None and "finish_reason" not in fields:
            documents = [self.text(fields["text"])]
        else:  # `llama batch` writes a `text` without its prompt
            raise ValueError(f"found {', '.join(map(repr, fields)) or 'nothing'}: expected {FORMS}")
        if not any(document.n_learned for document in documents):
            raise NothingToLearn("have an empty answer")
        return [Example((document,)) for document in documents if document.n_learned]

    def _chosen_answers(self, fields: dict[str, Any]) -> list[dict[str, Any]]:
        answers = fields["answers"]
        is_list = isinstance(answers, list) and all(isinstance(a, dict) for a in answers)
        if not is_list or not all(isinstance(a.get("text"), str) for a in answers):
            raise ValueError("expected `answers`, a list of objects with a `text` and a `score`")
        scored = [a for a in answers if isinstance(a.get("score"), (int, float)) and math.isfinite(a["score"])]
        if self.threshold is not None:
            scored = [a for a in scored if a["score"] >= self.threshold]
            if not scored:
                raise NothingToLearn(f"have no answer with a score of at least {self.threshold}")
            return scored
        if not scored:
            raise NothingToLearn("have no answer with a score")
        return [max(scored, key=lambda a: a["score"])]

    def _answered(self, fields: dict[str, Any], answer: dict[str, Any]) -> Document:
        """A prompt of any kind and an answer to it, which has an end unless it was broken off."""
        text, ends = answer["text"], answer.get("finish_reason") != "length"
        if answer.get("messages") is not None:  # the prompt had open turns: this is the dialog that the answer ends
            document = self.dialog(answer["messages"])
            n_kept = len(document.ids if ends else self._reply(answer["messages"][:-1], text, ends=False).ids)
            return Document(document.ids[:n_kept], document.learned[:n_kept])
        if fields.get("messages") is not None:
            return self._reply(_closed(as_dialog(fields["messages"])), text, ends)
        if fields.get("tokens") is not None:
            return self._continued(self._checked(fields["tokens"]), text, ends)
        return self._continued(self.tokenizer.encode(_text("prompt", fields.get("prompt")), bos=True), text, ends)

    def _continued(self, prompt: list[int], answer: str, ends: bool = True) -> Document:
        return _behind(prompt, prompt + self.tokenizer.encode(answer) + ([self.tokenizer.eos_id] if ends else []))

    def _reply(self, dialog: Dialog, answer: str, ends: bool = True) -> Document:
        """The answer to a dialog, with the end of its turn."""
        prompt = self.formatter.encode_dialog_prompt(dialog)
        if not ends:
            return _behind(prompt, prompt + self.tokenizer.encode(answer.strip()))
        return _behind(prompt, self.formatter.encode_answered(dialog, answer))

    def _completed(self, prompt: Any, completion: Any) -> Document:
        if isinstance(prompt, list) and isinstance(completion, list):  # as dialogs
            return self.dialog([*prompt, *completion])
        ids = self.tokenizer.encode(_text("prompt", prompt), bos=True)
        return self._continued(ids, _text("completion", completion))

    def text(self, text: str) -> Document:
        """A text between its begin and end tokens; all but the begin token is learned."""
        ids = self.tokenizer.encode(_text("text", text), bos=True, eos=True)
        return _behind(ids[:1], ids)

    def dialog(self, messages: Any) -> Document:
        """A dialog up to its last answer (all of it, where all is learned)."""
        self.formatter.check_messages(messages)
        _closed(messages)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise NothingToLearn("have no turn of the assistant")
        is_built_in = self.tokenizer.kind == "llama3" and self.formatter.template is None
        if self.learn == "all":
            return self._whole_dialog(messages, turns[-1] + 1, is_built_in)
        spans_of = self._messages_and_answers if is_built_in else self._rendered_and_answers
        ids, answers = spans_of(messages[: turns[-1] + 1], turns)
        learned = [False] * len(ids)
        for start, stop in answers if self.learn == "answers" else answers[-1:]:
            learned[start:stop] = [True] * (stop - start)
        return Document(ids, learned)

    def _whole_dialog(self, messages: Dialog, n_answered: int, is_built_in: bool) -> Document:
        if is_built_in:
            ids, _ = self._messages_and_answers(messages, [])
        elif self.formatter.template is not None:
            ids = self.formatter.template.ids(messages, self.tokenizer, add_generation_prompt=False)
        else:  # Llama 2 has no form for a message that is not answered
            ids = self.formatter.encode_answered(messages[: n_answered - 1], messages[n_answered - 1]["content"])
        return _behind(ids[:1], ids)

    def _messages_and_answers(self, messages: Dialog, turns: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a dialog in Llama 3's format, and where its answers lie, each with the end of its turn."""
        ids, answers = [self.tokenizer.bos_id], []
        for index, message in enumerate(messages):
            start = len(ids) + len(self.formatter.encode_header(message))
            ids += self.formatter.encode_message(message)
            if index in turns:
                answers.append((start, len(ids)))
        return ids, answers

    def _rendered_and_answers(self, messages: Dialog, turns: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The same in Llama 2's format or a template's: an answer is what its prompt lacks of the dialog it ends."""
        *_, last = wholes = [self.formatter.encode_answered(messages[:t], messages[t]["content"]) for t in turns]
        answers = []
        for turn, whole in zip(turns, wholes):
            start = _beginning(self.formatter.encode_dialog_prompt(messages[:turn]), last)
            if self.formatter.template is None:  # with an answer after it, one of Llama 2's ends with a space more
                stop = last.index(self.tokenizer.eos_id, start) + 1
            else:
                stop = _beginning(whole, last)
            answers.append((start, stop))
        return last, answers

    def _pair(self, fields: dict[str, Any]) -> Example:
        """The chosen and the rejected answer, each behind what it answers. A reward is read at its last token."""
        if any(fields.get(key) is None for key in ("chosen", "rejected")):
            raise ValueError(f"found {', '.join(map(repr, fields)) or 'nothing'}: expected {PAIR_FORM}")
        documents = []
        for key in ("chosen", "rejected"):
            answer, before = fields[key], fields.get("prompt")
            before = before if fields.get("messages") is None else as_dialog(fields["messages"])
            if isinstance(answer, list):
                messages = [*before, *answer] if isinstance(before, list) else answer
                self.formatter.check_messages(messages)
                if messages[-1]["role"] != "assistant":
                    raise NothingToLearn("have no turn of the assistant")
                ids = self._reply(_closed(messages)[:-1], messages[-1]["content"]).ids
            elif isinstance(before, list):
                ids = self._reply(_closed(before), _text(key, answer)).ids
            else:
                whole = ("" if before is None else _text("prompt", before)) + _text(key, answer)
                ids = self.tokenizer.encode(whole, bos=True)
            documents.append(Document(ids, [False] * len(ids)))
        if documents[0].ids == documents[1].ids:
            raise NothingToLearn("have the same text as chosen and rejected")
        return Example(tuple(documents))

    def _checked(self, ids: Any) -> list[int]:
        n_words = self.tokenizer.n_words
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < n_words for i in ids):
            raise ValueError(f"tokens: expected a list of ids from 0 to {n_words - 1}")
        return ids


def _beginning(part: list[int], whole: list[int]) -> int:
    """How many ids a part has; `whole` must begin with them, or an answer is learned where none will be drawn."""
    if whole[: len(part)] != part:
        raise NothingToLearn("have an answer that the chat template writes otherwise than behind its prompt")
    return len(part)


def _behind(prompt: list[int], whole: list[int]) -> Document:
    n_given = _beginning(prompt, whole)
    return Document(whole, [False] * n_given + [True] * (len(whole) - n_given))


def _closed(messages: Dialog) -> Dialog:
    if has_open_turns(messages):
        raise NothingToLearn("have open turns: expected what was answered in their places")
    return messages


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} = {value!r}: expected a text that is not empty")
    return value
