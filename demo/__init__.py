"""The embedded checkpoint and the programs that make it: corpus, tokenizer, training, held-out scores."""
