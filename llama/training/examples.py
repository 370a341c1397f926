"""Rows of a data file to what a model learns from: ids, and which of them are learned.

Knows the forms of a row; nothing of batches, models or files. What cannot be used is counted with its reason.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from llama.datasets.rows import Row
from llama.tokenizer import ChatFormat, Tokenizer

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
        return [f"{n} rows {reason} (the first is {self.first[reason]})" for reason, n in self.counts.items()]


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
        if "answers" in fields:
            return [Example((self._answered(fields, answer),)) for answer in self._chosen_answers(fields)]
        if fields.get("messages") is not None:
            return [Example((self.dialog(fields["messages"]),))]
        if fields.get("completion") is not None:
            return [Example((self._completed(fields.get("prompt"), fields["completion"]),))]
        if fields.get("text") is not None:
            return [Example((self.text(fields["text"]),))]
        if "error" in fields:
            raise NothingToLearn("have an error in place of an answer")
        raise ValueError(f"found {', '.join(map(repr, fields)) or 'nothing'}: expected {FORMS}")

    def _chosen_answers(self, fields: dict[str, Any]) -> list[dict[str, Any]]:
        answers = fields["answers"]
        is_list = isinstance(answers, list) and all(isinstance(a, dict) for a in answers)
        if not is_list or not all(isinstance(a.get("text"), str) for a in answers):
            raise ValueError("expected `answers`, a list of objects with a `text` and a `score`")
        scored = [a for a in answers if isinstance(a.get("score"), (int, float))]
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
        ends = answer.get("finish_reason") != "length"
        return self._continued(self._prompt(fields), answer["text"], fields.get("messages") is not None, ends)

    def _prompt(self, fields: dict[str, Any]) -> list[int]:
        if fields.get("messages") is not None:
            return self.formatter.encode_dialog_prompt(fields["messages"])
        if fields.get("tokens") is not None:
            return self._checked(fields["tokens"])
        return self.tokenizer.encode(_text("prompt", fields.get("prompt")), bos=True)

    def _continued(self, prompt: list[int], answer: str, is_dialog: bool, ends: bool = True) -> Document:
        end = self.tokenizer.eot_id if is_dialog and self.tokenizer.kind == "llama3" else self.tokenizer.eos_id
        ids = self.tokenizer.encode(answer.strip() if is_dialog else answer) + ([end] if ends else [])
        return Document([*prompt, *ids], [False] * len(prompt) + [True] * len(ids))

    def _completed(self, prompt: Any, completion: Any) -> Document:
        if isinstance(prompt, list) and isinstance(completion, list):  # as dialogs
            return self.dialog([*prompt, *completion])
        ids = self.tokenizer.encode(_text("prompt", prompt), bos=True)
        return self._continued(ids, _text("completion", completion), is_dialog=False)

    def text(self, text: str) -> Document:
        """A text between its begin and end tokens; all but the begin token is learned."""
        ids = self.tokenizer.encode(_text("text", text), bos=True, eos=True)
        return Document(ids, [False] + [True] * (len(ids) - 1))

    def dialog(self, messages: Any) -> Document:
        """A dialog up to its last answer (all of it, where all is learned)."""
        self.formatter.check_messages(messages)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise NothingToLearn("have no turn of the assistant")
        if self.tokenizer.kind == "llama2":
            ids, answers = self._llama2_dialog(messages[: turns[-1] + 1], turns)
        else:
            ids, answers = self._llama3_dialog(messages if self.learn == "all" else messages[: turns[-1] + 1], turns)
        if self.learn == "all":
            return Document(ids, [False] + [True] * (len(ids) - 1))
        learned = [False] * len(ids)
        for start, stop in answers if self.learn == "answers" else answers[-1:]:
            learned[start:stop] = [True] * (stop - start)
        return Document(ids, learned)

    def _llama3_dialog(self, messages: list, turns: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a dialog, and where its answers lie, each with the end of its turn."""
        ids, answers = [self.tokenizer.bos_id], []
        for index, message in enumerate(messages):
            start = len(ids) + len(self.formatter.encode_header(message))
            ids += self.formatter.encode_message(message)
            if index in turns:
                answers.append((start, len(ids)))
        return ids, answers

    def _llama2_dialog(self, messages: list, turns: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """As `_llama3_dialog`; each answer is what the next prompt has after this one's."""
        answers = []
        for index, turn in enumerate(turns):
            prompt = self.formatter.encode_dialog_prompt(messages[:turn])
            if index + 1 == len(turns):
                ids = prompt + self.tokenizer.encode(messages[turn]["content"].strip()) + [self.tokenizer.eos_id]
                answers.append((len(prompt), len(ids)))
            else:
                following = self.formatter.encode_dialog_prompt(messages[: turns[index + 1]])
                answers.append((len(prompt), following.index(self.tokenizer.eos_id, len(prompt)) + 1))
        return ids, answers

    def _pair(self, fields: dict[str, Any]) -> Example:
        """The chosen and the rejected answer, each behind what it answers. A reward is read at its last token."""
        if any(fields.get(key) is None for key in ("chosen", "rejected")):
            raise ValueError(f"found {', '.join(map(repr, fields)) or 'nothing'}: expected {PAIR_FORM}")
        documents = []
        for key in ("chosen", "rejected"):
            answer, before = fields[key], fields.get("messages", fields.get("prompt"))
            if isinstance(answer, list):
                messages = [*before, *answer] if isinstance(before, list) else answer
                self.formatter.check_messages(messages)
                if messages[-1]["role"] != "assistant":
                    raise NothingToLearn("have no turn of the assistant")
                prompt, answer, is_dialog = messages[:-1], messages[-1]["content"], True
            else:
                prompt, is_dialog = before, isinstance(before, list)
            if is_dialog:
                ids = self._continued(self.formatter.encode_dialog_prompt(prompt), answer, True).ids
            else:
                whole = ("" if prompt is None else _text("prompt", prompt)) + _text(key, answer)
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


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} = {value!r}: expected a text that is not empty")
    return value
