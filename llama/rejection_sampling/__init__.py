"""n answers to a prompt, a score for each, the best kept.

Knows nothing of how rows are read or records kept.
"""
