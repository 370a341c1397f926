"""Rows of a file in, a record for each out, by runs that can be killed and go on.

Knows nothing of how an answer is decoded.
"""
