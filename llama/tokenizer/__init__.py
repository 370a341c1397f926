"""Text to token ids and back: the tokenizers, the chat formats, dialogs with open turns, the text of a growing answer.

Knows nothing of tensors, models or sampling.
"""

from llama.tokenizer.chat_format import ChatFormat, Dialog, Message, Role
from llama.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatFormat", "Dialog", "Message", "Role", "Tokenizer"]
