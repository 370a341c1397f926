"""The terminal: `python -m llama COMMAND`, the chat, and lm-evaluation-harness.

Knows only how to call the other houses; none of them imports it.
"""

from llama.cli.commands import main

__all__ = ["main"]
