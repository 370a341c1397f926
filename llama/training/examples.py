"""Turns the rows of a data file into examples: ids, and which of them are learned.

Rows that cannot be used are counted by reason. Knows the forms of a row, and nothing of batches, models or files.
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
        ids: at least two if something is learned.
        learned: for each id, whether predicting it is in the loss; never true for the first.
    """

    ids: list[int]
    learned: list[bool]

    @property
    def n_learned(self) -> int:
        return sum(self.learned)


@dataclass(frozen=True)
class Example:
    """One document, or for a reward model two: with the chosen answer, and with the rejected one."""

    documents: tuple[Document, ...]

    @property
    def n_tokens(self) -> int:
        return sum(len(document.ids) for document in self.documents)


@dataclass
class Skipped:
    """Rows that were skipped or cut: how many for each reason, and the first line with that reason."""

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
    """A row has a right form, but nothing to learn; the message is the reason under which it is counted."""


class Reader:
    """Makes examples of rows.

    Args:
        tokenizer: the model's.
        max_seq_len: the most ids of a document.
        learn: which turns of a dialog are learned: "answers" (every turn of the assistant), "last" or "all".
        threshold: learn every answer of a `llama sample` row with at least this score; None: only the best answer.
        cut: whether longer documents are cut to max_seq_len, or else skipped. Both are counted.
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
        """The examples of the rows, in order; `skipped` counts the rows that are not used."""
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
        """The example, cut if it is too long; None if it is skipped."""
        if all(len(document.ids) <= self.max_seq_len for document in example.documents):
            return example
        limit = f"are longer than max_seq_len = {self.max_seq_len}"
        if self.pairs or not self.cut:  # pairs are never cut: a reward model reads the end of an answer
            self.skipped.note(f"{limit}: skipped", row)
            return None
        (document,) = example.documents
        document = Document(document.ids[: self.max_seq_len], document.learned[: self.max_seq_len])
        if not document.n_learned:
            self.skipped.note(f"{limit}, with nothing to learn before the cut: skipped", row)
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
        else:  # such as a row of `llama batch`, whose `text` lacks its prompt
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
        """A prompt of any kind and an answer to it. The end is learned too, unless the answer was cut off."""
        text, ends = answer["text"], answer.get("finish_reason") != "length"
        if answer.get("messages") is not None:  # the prompt had open turns: the whole dialog, which ends in the answer
            document = self.dialog(answer["messages"])
            n_kept = len(document.ids if ends else self._reply(answer["messages"][:-1], text, ends=False).ids)
            return Document(document.ids[:n_kept], document.learned[:n_kept])
        if fields.get("messages") is not None:
            return self._reply(_refuse_open_turns(as_dialog(fields["messages"])), text, ends)
        if fields.get("tokens") is not None:
            return self._continued(self._checked(fields["tokens"]), text, ends)
        return self._continued(self.tokenizer.encode(_text("prompt", fields.get("prompt")), bos=True), text, ends)

    def _continued(self, prompt: list[int], answer: str, ends: bool = True) -> Document:
        return _learn_after(prompt, prompt + self.tokenizer.encode(answer) + ([self.tokenizer.eos_id] if ends else []))

    def _reply(self, dialog: Dialog, answer: str, ends: bool = True) -> Document:
        """A dialog and the answer to it, with the end of its turn if the answer `ends`."""
        prompt = self.formatter.encode_dialog_prompt(dialog)
        if not ends:
            return _learn_after(prompt, prompt + self.tokenizer.encode(answer.strip()))
        return _learn_after(prompt, self.formatter.encode_answered(dialog, answer))

    def _completed(self, prompt: Any, completion: Any) -> Document:
        if isinstance(prompt, list) and isinstance(completion, list):  # as dialogs
            return self.dialog([*prompt, *completion])
        ids = self.tokenizer.encode(_text("prompt", prompt), bos=True)
        return self._continued(ids, _text("completion", completion))

    def text(self, text: str) -> Document:
        """A text between its begin and end tokens; all but the begin token is learned."""
        ids = self.tokenizer.encode(_text("text", text), bos=True, eos=True)
        return _learn_after(ids[:1], ids)

    def dialog(self, messages: Any) -> Document:
        """A dialog up to its last answer; with `learn="all"`, the whole dialog."""
        self.formatter.check_messages(messages)
        _refuse_open_turns(messages)
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
        else:  # Llama 2's format cannot write a message without an answer
            ids = self.formatter.encode_answered(messages[: n_answered - 1], messages[n_answered - 1]["content"])
        return _learn_after(ids[:1], ids)

    def _messages_and_answers(self, messages: Dialog, turns: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a dialog in Llama 3's format, and the span of each answer, with the end of its turn."""
        ids, answers = [self.tokenizer.bos_id], []
        for index, message in enumerate(messages):
            start = len(ids) + len(self.formatter.encode_header(message))
            ids += self.formatter.encode_message(message)
            if index in turns:
                answers.append((start, len(ids)))
        return ids, answers

    def _rendered_and_answers(self, messages: Dialog, turns: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The same in Llama 2's format or a template's: an answer is what follows its prompt in the whole dialog."""
        *_, last = wholes = [self.formatter.encode_answered(messages[:t], messages[t]["content"]) for t in turns]
        answers = []
        for turn, whole in zip(turns, wholes):
            start = _prefix_length(self.formatter.encode_dialog_prompt(messages[:turn]), last)
            if self.formatter.template is None:  # Llama 2's format adds a space to an answer before the next turn
                stop = last.index(self.tokenizer.eos_id, start) + 1
            else:
                stop = _prefix_length(whole, last)
            answers.append((start, stop))
        return last, answers

    def _pair(self, fields: dict[str, Any]) -> Example:
        """The chosen and the rejected answer, each after its prompt. The reward is read at the last token."""
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
                ids = self._reply(_refuse_open_turns(messages)[:-1], messages[-1]["content"]).ids
            elif isinstance(before, list):
                ids = self._reply(_refuse_open_turns(before), _text(key, answer)).ids
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


def _prefix_length(prefix: list[int], whole: list[int]) -> int:
    """len(prefix), with which `whole` must begin: else an answer would be learned after ids that no prompt has."""
    if whole[: len(prefix)] != prefix:
        raise NothingToLearn("have an answer that the chat template does not write after its prompt")
    return len(prefix)


def _learn_after(prompt: list[int], whole: list[int]) -> Document:
    n_prompt = _prefix_length(prompt, whole)
    return Document(whole, [False] * n_prompt + [True] * (len(whole) - n_prompt))


def _refuse_open_turns(messages: Dialog) -> Dialog:
    if has_open_turns(messages):
        raise NothingToLearn("have open turns: expected answers in their places")
    return messages


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} = {value!r}: expected a text that is not empty")
    return value
