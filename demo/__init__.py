"""The embedded checkpoint and the program that makes it: corpus, tokenizer, training, held-out scores."""
