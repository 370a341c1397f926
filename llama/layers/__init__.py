"""The matrices of a model: split over ranks, packed or quantised for fast decoding.

Knows nothing of Llama, of files or of text.
"""
