"""Tasks of one run for several replicas: rank 0 hands them out, each replica takes one whenever it has room.

What waits for the others, and what they have answered, lies in queues of torch's own store, which torchrun has made; no
other port is opened. Rank 0 takes its own tasks from the source, so it never waits for a task that only it could post;
in the end it takes back what lies ready for replicas that are busy. Knows nothing of what a task is, except that it and
its result are JSON.
"""

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch.distributed as dist

from llama import parallel

# The store takes messages of up to 8 MiB; longer ones are cut.
LONGEST = 4 * 2**20
POLL_SECONDS = 0.02

_n_queues = 0  # made in this process, the same number on each rank: each queue has names of its own in the store


class TaskQueue:
    """One process's end of the queue; all make one together.

    Args:
        tasks: rank 0's are taken one at a time, others' are ignored.
        ahead: how many tasks lie ready for each other replica, such as the number of its slots.

    Raises:
        ValueError: the caller has made the process group with a store that has no queues.
    """

    def __init__(self, tasks: Iterator[Any], ahead: int = 1):
        global _n_queues
        _n_queues += 1
        self._tasks, self._has_more = tasks, True
        self._error: Exception | None = None  # of the tasks; raised once all before it have their results
        self._own: deque[Any] = deque()  # rank 0's results
        self._is_first = dist.get_rank() % fairscale_groups.get_model_parallel_world_size() == 0
        self._n_others = parallel.n_replicas() - 1
        self._ahead = self._n_others * ahead
        self._n_open = 0  # on rank 0: tasks whose results have not been collected, and others that may take more
        if self._n_others:
            store = dist.distributed_c10d._get_default_store()
            if not store.has_extended_api():
                found = f"the process group's store is a {type(store).__name__}"
                raise ValueError(f"{found}: expected a TCPStore, as torchrun makes it, for several replicas")
            self._store = dist.PrefixStore(f"llama/tasks {_n_queues}", store)

    def take(self) -> Any:
        """The next task for this replica, None after the last. All its ranks call this together."""
        task = [None]
        if dist.get_rank() == 0:
            self._post()
            task = [self._take_back() if (own := self._next()) is None else own]
        elif self._is_first:
            task = [self._receive("tasks")]
            if task == [None]:
                self._send("results", None)
        if fairscale_groups.get_model_parallel_world_size() > 1:
            source = fairscale_groups.get_model_parallel_src_rank()
            dist.broadcast_object_list(task, src=source, group=fairscale_groups.get_model_parallel_group())
        return task[0]

    def give(self, result: Any) -> None:
        """Hands in a task's result. Each rank of a replica calls this; the first one's counts."""
        if dist.get_rank() == 0:
            self._own.append(result)
        elif self._is_first:
            self._send("results", result)

    def results(self, wait: bool = False) -> Iterator[Any]:
        """On rank 0, the results that have arrived, from all replicas; with `wait`, until every task has its own.

        Raises:
            RankFailed: another rank failed while this one waited.
            Exception: whatever the tasks raised, or TypeError for one that is not JSON.
        """
        while dist.get_rank() == 0:
            self._post()
            while self._own or (self._n_others and self._store.queue_len("results")):
                self._n_open -= 1
                result = self._own.popleft() if self._own else self._receive("results")
                if result is not None:  # as it is when a replica has seen that there are no more tasks
                    yield result
            if not wait or self._n_open == 0:
                break
            parallel.raise_if_a_rank_failed()
            time.sleep(POLL_SECONDS)
        if wait and self._error is not None:
            raise self._error

    def _next(self) -> Any:
        """The next of rank 0's tasks, None after the last. The exception of one that fails is kept for the end."""
        if not self._has_more:
            return None
        try:
            task = next(self._tasks, None)
            json.dumps(task if self._n_others else None)
        except Exception as error:
            task, self._error = None, error
        self._has_more = task is not None
        self._n_open += 1 if self._has_more else self._n_others
        for _ in range(0 if self._has_more else self._n_others):
            self._send("tasks", None)  # which each answers, once it has seen that there are no more
        return task

    def _take_back(self) -> Any:
        """On rank 0, a task that was posted and that nobody has taken, such as while the others are busy; or None."""
        with contextlib.suppress(dist.QueueEmptyError):
            if self._n_others:
                if (task := self._pop("tasks")) is None:
                    self._send("tasks", None)  # which is another replica's
                return task
        return None

    def _post(self) -> None:
        """On rank 0, keeps tasks ready in the store for the others."""
        while self._has_more and self._n_others and self._store.queue_len("tasks") < self._ahead:
            if (task := self._next()) is not None:
                self._send("tasks", task)

    def _send(self, queue: str, message: Any) -> None:
        text = json.dumps(message)
        if len(text) > LONGEST:
            number = self._store.add("long messages", 1)
            parts = [f"{number} {start}" for start in range(0, len(text), LONGEST)]
            for part, start in zip(parts, range(0, len(text), LONGEST)):
                self._store.set(part, text[start : start + LONGEST])
            text = json.dumps({"parts": parts})
        self._store.queue_push(queue, text)

    def _receive(self, queue: str) -> Any:
        """Waits for the next message of a queue."""
        while True:
            try:
                return self._pop(queue)
            except dist.QueueEmptyError:
                parallel.raise_if_a_rank_failed()
                time.sleep(POLL_SECONDS)

    def _pop(self, queue: str) -> Any:
        """The next message of a queue. Raises QueueEmptyError if there is none."""
        message = json.loads(self._store.queue_pop(queue, False))
        if isinstance(message, dict) and message.keys() == {"parts"}:
            text = b"".join(map(self._store.get, message["parts"]))
            for part in message["parts"]:
                self._store.delete_key(part)
            message = json.loads(text)
        return message
