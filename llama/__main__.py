"""`python -m llama COMMAND`."""

from llama.cli.commands import main

main()
