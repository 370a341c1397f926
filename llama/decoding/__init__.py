"""Turns prompts of ids into answers: sampling, speculative decoding, beam search, scoring.

Knows nothing of dialogs, data sets or files.
"""
