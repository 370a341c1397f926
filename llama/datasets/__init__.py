"""Data sets: reads the rows of a file and writes a record of each. A run that was killed goes on where it was.

`run_batch` and `run_batch_files` answer rows, whose fields `llama.datasets.batch` describes; a `Run` does anything else
with them. Knows nothing of how an answer is decoded, or of how good it is.
"""

from llama.datasets.batch import run_batch, run_batch_files
from llama.datasets.fingerprint import fingerprint
from llama.datasets.journal import Journal
from llama.datasets.rows import Row, Rows
from llama.datasets.runs import Run, Summary

__all__ = ["Journal", "Row", "Rows", "Run", "Summary", "fingerprint", "run_batch", "run_batch_files"]
