"""The terminal: `python -m llama COMMAND`, the chat, and lm-evaluation-harness. No other house imports this one."""

from llama.cli.commands import main

__all__ = ["main"]
