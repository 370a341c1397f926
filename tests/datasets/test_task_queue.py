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
queue = TaskQueue(tasks())
with parallel.fail_at_once():
    if dist.get_rank() == 0:
        for result in queue.results(wait=True):
            print("result", result, flush=True)
    else:
        while (task := queue.take()) is not None:
            queue.give(task["line"])
"""

SHARES = """
import json, sys
import torch, torch.distributed as dist
from llama import parallel
from llama.datasets.task_queue import TaskQueue
parallel.initialize(1, torch.device("cpu"))
for run in range(2):  # one queue after the other
    queue = TaskQueue(({"line": n, "text": "x" * (9 * 2**20 if n == 1 else 3)} for n in range(40)), ahead=2)
    n_taken, found = 0, []
    while (task := queue.take()) is not None:
        n_taken += 1
        queue.give(task)
        found += queue.results()
    found += queue.results(wait=True)
    n_taken = parallel.gather_from_replicas([n_taken])
    if dist.get_rank() == 0:
        lengths = {task["line"]: len(task["text"]) for task in found}
        right = {n: 9 * 2**20 if n == 1 else 3 for n in range(40)}
        print(lengths == right, len(found), sum(n for n, in n_taken), flush=True)
    else:
        assert found == []
"""


def test_each_task_is_taken_once_and_its_result_arrives_however_long_it_is(tmp_path):
    (tmp_path / "script.py").write_text(SHARES)
    result = torchrun(3, tmp_path / "script.py", timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "True 40 40\n" * 2


@pytest.mark.parametrize(
    ("what", "error"), [("raises", "KeyError: 'of the input'"), ("date", "TypeError: Object of type date is not JSON")]
)
def test_what_cannot_be_handed_to_a_replica_is_raised_on_rank_0(tmp_path, what, error):
    (tmp_path / "script.py").write_text(SCRIPT)
    result = torchrun(2, tmp_path / "script.py", what, timeout=60)
    assert result.returncode == 1 and error in result.stderr, result.stderr
    assert result.stdout == "result 1\n"
