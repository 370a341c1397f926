"""Llama inference: `from llama import Llama`."""

from llama.decoding.answering import Answer, GenerationError
from llama.generation import ChatPrediction, CompletionPrediction, Llama
from llama.meta_names import sample_top_p
from llama.model import ModelArgs, Transformer
from llama.options import DecodingOptions
from llama.tokenizer import ChatFormat, Dialog, Message, Role, Tokenizer

__version__ = "0.1.0"

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
