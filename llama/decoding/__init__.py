"""Prompts of ids to answers: sampled, speculated, searched by beams, scored.

Knows nothing of dialogs, data sets or files.
"""
