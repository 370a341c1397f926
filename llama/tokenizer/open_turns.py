"""Dialogs with open turns: the user's turns are fixed, and the model fills in its own.

An assistant's message whose content is `<PLACEHOLDER>` is open: the model generates it from all turns before it. A
dialog that does not end with an open turn gets one at its end. Knows nothing of tokens.
"""

import copy

from llama.tokenizer import ChatFormat, Dialog

PLACEHOLDER = "<PLACEHOLDER>"


class OpenDialog:
    """A dialog, and which of its turns are still open. A string is one turn of the user.

    Attributes:
        messages: a copy of the dialog's messages, with the answers filled in.
        has_placeholders: whether the dialog itself had an open turn.
        is_done: whether all turns are filled.

    Raises ValueError if a message is not valid, or if an open turn does not follow a turn of the user.
    """

    def __init__(self, dialog: Dialog | str, formatter: ChatFormat):
        dialog = as_dialog(dialog) if isinstance(dialog, str) else dialog
        formatter.check_messages(dialog)
        self.messages, self._open, self.is_done = list(dialog), [], False
        for index, message in enumerate(self.messages):
            if message["role"] == "assistant" and message["content"] == PLACEHOLDER:
                self._open.append(index)
        self.has_placeholders = bool(self._open)
        if not self._open or self._open[-1] < len(self.messages) - 1:
            formatter.check(self.messages)
            self._open.append(len(self.messages))
            self.messages.append({"role": "assistant", "content": PLACEHOLDER})
        for index in self._open if self.has_placeholders else ():
            try:
                formatter.check(self.messages[:index])
                if (last := self.messages[index - 1]["role"] if index else "nobody") not in ("user", "ipython", "tool"):
                    raise ValueError(f"a dialog ends with a message of the user (or of ipython/tool), not of {last!r}")
            except ValueError as error:
                raise ValueError(f"message {index} is open: {error}" if index < len(dialog) else str(error)) from None

    @property
    def prompt(self) -> Dialog:
        """The messages before the next open turn."""
        return self.messages[: self._open[0]]

    def copy(self) -> "OpenDialog":
        """A copy that can be filled with other answers."""
        new = copy.copy(self)
        new.messages, new._open = list(self.messages), list(self._open)
        return new

    def fill(self, text: str) -> None:
        """Puts an answer into the next open turn."""
        index = self._open.pop(0)
        self.messages[index] = {**self.messages[index], "content": text}
        self.is_done = not self._open


def as_dialog(dialog: Dialog | str) -> Dialog:
    """The dialog; a string is one turn of the user."""
    return [{"role": "user", "content": dialog}] if isinstance(dialog, str) else dialog


def has_open_turns(dialog: object) -> bool:
    """Whether a dialog has an open turn. False for anything that is not a dialog."""
    messages = [m for m in dialog if isinstance(m, dict)] if isinstance(dialog, (list, tuple)) else []
    return any(m.get("role") == "assistant" and m.get("content") == PLACEHOLDER for m in messages)
