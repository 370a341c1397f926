"""Work handed out to replicas: what cannot be handed out ends the run, and leaves no process waiting."""

import pytest
from conftest import torchrun

# Rank 0 takes nothing, so that every task goes through the connection to the replica beside it.
SCRIPT = """
import datetime, sys
import torch, torch.distributed as dist
from llama import parallel
from llama.datasets.task_queue import TaskQueue
parallel.initialize(1, torch.device("cpu"))
def tasks():
    yield {"line": 1}
    if sys.argv[1] == "raises":
        raise KeyError("of the input")
    yield {"line": 2, "day": datetime.date(2024, 2, 29)}
with parallel.fail_at_once(), TaskQueue(tasks()) as queue:
    if dist.get_rank() == 0:
        for result in queue.results(wait=True):
            print("result", result, flush=True)
    else:
        while (task := queue.take()) is not None:
            queue.give(task["line"])
"""


@pytest.mark.parametrize(
    ("what", "error"), [("raises", "KeyError: 'of the input'"), ("date", "TypeError: Object of type date is not JSON")]
)
def test_what_cannot_be_handed_to_a_replica_is_raised_on_rank_0(tmp_path, what, error):
    (tmp_path / "script.py").write_text(SCRIPT)
    result = torchrun(2, tmp_path / "script.py", what, timeout=60)
    assert result.returncode == 1 and error in result.stderr, result.stderr
    assert result.stdout == "result 1\n"
