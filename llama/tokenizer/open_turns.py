"""Dialogs with open turns: the user's turns are fixed, and the model fills in its own.

An assistant's message whose content is `<PLACEHOLDER>` is open: the model generates it from all the turns before it. A
dialog that ends with the user's message has one open turn, after its end. Knows nothing of tokens.
"""

from llama.tokenizer import ChatFormat, Dialog, Message

PLACEHOLDER = "<PLACEHOLDER>"


class OpenDialog:
    """A dialog, and which of its turns are still open.

    Args:
        dialog: the messages; not changed.
        formatter: checks which dialogs can be prompts.

    Attributes:
        messages: those of the dialog, with the answers in their places.
        has_placeholders: whether it had an open turn other than the one at its end.

    Raises:
        ValueError: a message is not one, or an open turn does not follow a turn of the user.
    """

    def __init__(self, dialog: Dialog, formatter: ChatFormat):
        is_list = isinstance(dialog, (list, tuple))
        self.messages: Dialog = list(dialog) if is_list else dialog
        self._open = [index for index, m in enumerate(dialog) if is_open(m)] if is_list else []
        self.has_placeholders = bool(self._open)
        if not self._open or self._open[-1] < len(self.messages) - 1:
            formatter.check(self.messages)
            self._open.append(len(self.messages))
            self.messages.append({"role": "assistant", "content": PLACEHOLDER})
        for index in self._open:
            try:
                formatter.check(self.messages[:index])
            except ValueError as error:
                raise ValueError(f"message {index} is open: {error}") from None

    @property
    def is_done(self) -> bool:
        return not self._open

    @property
    def prompt(self) -> Dialog:
        """The messages before the next open turn."""
        return self.messages[: self._open[0]]

    def fill(self, text: str) -> Message:
        """Puts an answer into the next open turn."""
        index = self._open.pop(0)
        self.messages[index] = {**self.messages[index], "content": text}
        return self.messages[index]


def has_open_turns(dialog: object) -> bool:
    """Whether a message of a dialog is to be generated. False if it is not a dialog."""
    return isinstance(dialog, (list, tuple)) and any(map(is_open, dialog))


def is_open(message: object) -> bool:
    """Whether a message is to be generated."""
    is_assistants = isinstance(message, dict) and message.get("role") == "assistant"
    return is_assistants and message.get("content") == PLACEHOLDER
