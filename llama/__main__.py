"""`python -m llama COMMAND`."""

from llama.cli import main

main()
