"""`python -m llama.cli COMMAND`, the same as `python -m llama COMMAND`."""

from llama.cli.commands import main

main()
