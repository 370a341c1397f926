"""The terminal: `python -m llama COMMAND`, the chat, and lm-evaluation-harness.

Knows nothing of how the other houses work; none of them imports it.
"""

from llama.cli.commands import main

__all__ = ["main"]
