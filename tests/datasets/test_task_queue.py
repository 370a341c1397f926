"""The task queue under torchrun: each task is taken once, and a task that cannot be sent ends the run."""

import pytest
from conftest import torchrun

SHARES = """
import datetime, json, sys, time
import torch, torch.distributed as dist
from llama import parallel
from llama.datasets.task_queue import TaskQueue
parallel.initialize(1, torch.device("cpu"))
rank = dist.get_rank()

def leave_nothing(post):  # the others take the posted tasks before rank 0 takes its own
    post()
    while queue._store.queue_len("tasks"):
        time.sleep(0.001)

for others_are_quick in (True, False):  # one queue after the other
    queue = TaskQueue(({"line": n, "text": "x" * (9 * 2**20 if n == 1 else 3)} for n in range(40)), ahead=2)
    if others_are_quick and rank == 0:
        queue._post = lambda post=queue._post: leave_nothing(post)
    n_taken, found = 0, []
    while (task := queue.take()) is not None:
        n_taken += 1
        queue.put(task)
        found += queue.results()
    found += queue.results(wait=True)
    n_taken = parallel.gather_from_replicas([n_taken])
    if rank == 0:
        lengths = {task["line"]: len(task["text"]) for task in found}
        right = {n: 9 * 2**20 if n == 1 else 3 for n in range(40)}
        print(lengths == right, len(found), sum(n for n, in n_taken), flush=True)
    else:
        assert found == []

def tasks(what):
    yield {"line": 1}
    if what == "raises":
        raise KeyError("of the input")
    yield {"line": 2, "day": datetime.date(2024, 2, 29)}

for what in ("raises", "date"):
    queue = TaskQueue(tasks(what))
    try:
        if rank == 0:  # takes nothing, so every task goes to the others
            for result in queue.results(wait=True):
                print("result", result, flush=True)
        else:
            while (task := queue.take()) is not None:
                queue.put(task["line"])
    except (KeyError, TypeError) as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    script = tmp_path_factory.mktemp("tasks") / "script.py"
    script.write_text(SHARES)
    result = torchrun(3, script, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_each_task_is_taken_once_and_its_result_arrives_however_long_it_is(printed):
    assert printed[:2] == ["True 40 40"] * 2


def test_an_error_in_the_tasks_is_raised_on_rank_0_after_the_results_before_it(printed):
    assert printed[2:4] == ["result 1", "rank 0: KeyError: 'of the input'"]
    assert printed[4:] == ["result 1", "rank 0: TypeError: Object of type date is not JSON serializable"]
