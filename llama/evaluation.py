"""`python -m llama.evaluation`: lm-evaluation-harness with the model "llama" (see `llama.cli.lm_eval`)."""

from llama.cli.lm_eval import LlamaLM, main

__all__ = ["LlamaLM", "main"]

if __name__ == "__main__":
    main()
