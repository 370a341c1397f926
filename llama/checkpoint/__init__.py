"""Directories to tensors and back: Meta's, Hugging Face's and quantised ones.

Knows nothing of decoding; the engine knows nothing of it.
"""
