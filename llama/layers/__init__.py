"""The matrices of a model: split over ranks, and packed or quantised for fast decoding.

Knows nothing of Llama, of files or of text.
"""
