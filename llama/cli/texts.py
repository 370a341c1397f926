"""The commands about one text or one conversation: chat, complete, score."""

import sys

import torch.distributed as dist
from tyro.conf import Positional

from llama import Llama
from llama.cli.arguments import Loading, OneAnswer
from llama.cli.chat import Conversation
from llama.cli.terminal import Keyboard, set_up_editing, show, talk
from llama.decoding.scoring import least_certain, perplexity


def chat(loading: Loading, decoding: OneAnswer, *, system: str | None = None) -> None:
    """Talks with a model in the terminal. /help there lists the commands.

    Args:
        system: the system prompt.
    """
    llama = loading.build(decoding)
    keyboard = Keyboard()
    if keyboard.tty:
        set_up_editing()
        show("/help lists the commands, /quit leaves.\n")
    talk(Conversation(llama, system, **decoding.given()), keyboard)
    _report_speculation(llama)


def complete(text: Positional[str], loading: Loading, decoding: OneAnswer) -> None:
    """Continues a text, and shows the new text while it is generated.

    The same command gives the same text again, even without a seed. Another seed gives another text.

    Args:
        text: the beginning; "-" reads it from standard input, without the newline at its end.
    """
    llama = loading.build(decoding)
    piece = None
    for piece in llama.stream_text(_read(text), **decoding.given()):
        show(piece)
    show("\n")
    if piece is None:
        print("(the model adds nothing, or there is no room for more)", file=sys.stderr)
    _report_speculation(llama)


def score(text: Positional[str], loading: Loading) -> None:
    """Shows the log-probability of each token of a text, in nats, the text's perplexity, and its least likely tokens.

    Args:
        text: of any length; "-" reads it from standard input, without the newline at its end.
    """
    llama = loading.build()
    (result,) = llama.score([_read(text)])
    logprobs = result["logprobs"][1:]  # the first is the begin-of-text token
    if not logprobs:
        raise ValueError("the text is empty: expected a text to score")
    for logprob, token in zip(logprobs, result["tokens"][1:]):
        show(f"{logprob:9.4f}  {token!r}\n")
    tokens = "1 token" if len(logprobs) == 1 else f"{len(logprobs)} tokens"
    show(f"{tokens}, perplexity {perplexity(result):.4f}\nleast certain:\n{least_certain(result)}\n")


def _read(text: str) -> str:
    """The text of an argument: the argument itself, or standard input for "-"."""
    return Keyboard().read_all() if text == "-" else text


def _report_speculation(llama: Llama) -> None:
    """Prints on stderr how many tokens a draft saved, if there is one."""
    counters = llama._engine.counters
    counts = counters.speculation
    if counts.steps and dist.get_rank() == 0:
        per_step = counters.decoded / counts.steps
        print(
            f"({per_step:.2f} tokens a step: {counts.accepted} of {counts.proposed} proposals accepted)",
            file=sys.stderr,
        )
