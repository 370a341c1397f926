"""Llama inference: `from llama import Llama`."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  # what is imported below is no Python to an older one
    found = ".".join(map(str, sys.version_info[:3]))
    raise ImportError(f"llama needs Python 3.10 or newer, and this is {found}: use another one, such as python3.12")

from llama.decoding.answering import Answer, GenerationError
from llama.generation import ChatPrediction, CompletionPrediction, Llama
from llama.meta_names import sample_top_p
from llama.model import ModelArgs, Transformer
from llama.options import DecodingOptions
from llama.tokenizer import ChatFormat, Dialog, Message, Role, Tokenizer

__version__ = "0.2.0"

__all__ = [
    "Answer",
    "ChatFormat",
    "ChatPrediction",
    "CompletionPrediction",
    "DecodingOptions",
    "Dialog",
    "GenerationError",
    "Llama",
    "Message",
    "ModelArgs",
    "Role",
    "Tokenizer",
    "Transformer",
    "sample_top_p",
]
