"""The terminal: `python -m llama COMMAND`, the chat, and lm-evaluation-harness.

Nothing else of the package knows of it.
"""

from llama.cli.commands import main

__all__ = ["main"]
