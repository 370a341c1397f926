"""The terminal: `python -m llama COMMAND`, the chat, and lm-evaluation-harness.

It knows nothing of how things are done; no other house imports it.
"""

from llama.cli.commands import main

__all__ = ["main"]
