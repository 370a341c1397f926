"""Data sets: the rows of a file in, a record of each out, by runs that can be killed and go on where they were.

`run_batch` and `run_batch_files` answer rows (their fields are those of `llama.datasets.batch`); a `Run` does anything
else with them. Knows nothing of how an answer is decoded, or of what it is worth.
"""

from llama.datasets.batch import run_batch, run_batch_files
from llama.datasets.fingerprint import fingerprint
from llama.datasets.journal import Journal
from llama.datasets.rows import Row, Rows
from llama.datasets.runs import Run, Summary

__all__ = ["Journal", "Row", "Rows", "Run", "Summary", "fingerprint", "run_batch", "run_batch_files"]
