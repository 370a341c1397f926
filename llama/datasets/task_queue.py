"""The tasks of a run for several replicas: rank 0 posts them, and each replica takes one whenever it has room.

Tasks for the other replicas, and their results, are in queues of the store that torchrun has made; no other port is
opened. Rank 0 takes its own tasks from the source, so it never waits for a task that only it could post. At the end it
takes back posted tasks, if the other replicas are busy. Knows nothing of tasks and results, except that they are JSON.
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

# The store takes messages of up to 8 MiB. Longer texts than this are sent in parts.
LONGEST = 4 * 2**20
POLL_SECONDS = 0.02

_n_queues = 0  # made in this process, the same on each rank: part of a queue's name in the store


class TaskQueue:
    """One process's end of the queue. All processes make one together.

    Args:
        tasks: taken one at a time on rank 0, ignored on the others.
        ahead: the number of tasks that are posted ahead for each other replica, such as the number of its slots.

    Raises:
        ValueError: the caller has made the process group with a store that has no queues.
    """

    def __init__(self, tasks: Iterator[Any], ahead: int = 1):
        global _n_queues
        _n_queues += 1
        self._tasks, self._has_more = tasks, True
        self._error: Exception | None = None  # raised by `tasks`; raised again after the results of all tasks before
        self._own: deque[Any] = deque()  # rank 0's results
        self._is_first = dist.get_rank() % fairscale_groups.get_model_parallel_world_size() == 0
        self._n_others = parallel.n_replicas() - 1
        self._ahead = self._n_others * ahead
        self._n_open = 0  # on rank 0: tasks without a result yet, and replicas that do not know yet that all are taken
        if self._n_others:
            store = dist.distributed_c10d._get_default_store()
            if not store.has_extended_api():
                found = f"the process group's store is a {type(store).__name__}"
                raise ValueError(f"{found}: expected a TCPStore, as torchrun makes it, for several replicas")
            self._store = dist.PrefixStore(f"llama/tasks {_n_queues}", store)

    def take(self) -> Any:
        """The next task for this replica, None after the last. All ranks of the replica call this together."""
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

    def put(self, result: Any) -> None:
        """Sends a task's result to rank 0. Each rank of a replica calls this; the first one's result counts."""
        if dist.get_rank() == 0:
            self._own.append(result)
        elif self._is_first:
            self._send("results", result)

    def results(self, wait: bool = False) -> Iterator[Any]:
        """On rank 0, the results that have arrived from all replicas; with `wait`, those of all tasks so far.

        Raises:
            RankFailed: another rank failed while this one waited.
            Exception: what `tasks` raised, or TypeError for a task that is not JSON.
        """
        while dist.get_rank() == 0:
            self._post()
            while self._own or (self._n_others and self._store.queue_len("results")):
                self._n_open -= 1
                result = self._own.popleft() if self._own else self._receive("results")
                if result is not None:  # None: a replica has seen that there are no more tasks
                    yield result
            if not wait or self._n_open == 0:
                break
            parallel.raise_if_a_rank_failed()
            time.sleep(POLL_SECONDS)
        if wait and self._error is not None:
            raise self._error

    def _next(self) -> Any:
        """The next of rank 0's tasks, None after the last. An exception ends the tasks, and is kept for `results`."""
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
            self._send("tasks", None)  # each replica answers it
        return task

    def _take_back(self) -> Any:
        """On rank 0, a posted task that no replica has taken; or None."""
        with contextlib.suppress(dist.QueueEmptyError):
            if self._n_others:
                if (task := self._pop("tasks")) is None:
                    self._send("tasks", None)  # it was for another replica
                return task
        return None

    def _post(self) -> None:
        """On rank 0, posts tasks ahead for the others."""
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
