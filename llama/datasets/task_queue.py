"""Tasks for replicas, one at a time as they ask, and the results brought back to rank 0.

A slow task holds up nobody, and one process alone reads the input and writes the output. The ranks of one replica must
do the same in the same order, so its first rank tells the others which task comes next. Knows nothing of what a task
is, except that it is JSON.
"""

import contextlib
import json
import os
import queue
import secrets
import socket
import threading
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch.distributed as dist

from llama import parallel


class TaskQueue(contextlib.AbstractContextManager):
    """One process's end of the queue; all make one together. Rank 0's tasks are taken one at a time, others ignored."""

    def __init__(self, tasks: Iterator[Any]):
        self._tasks = tasks
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        # On rank 0: tasks whose results have not been collected, and replicas not told that there are no more tasks.
        self._n_open = parallel.n_replicas() - 1 if dist.get_rank() == 0 else 0
        self._connections = contextlib.ExitStack()
        self._is_first = dist.get_rank() % fairscale_groups.get_model_parallel_world_size() == 0
        if parallel.n_replicas() > 1:
            self._connect()

    def __exit__(self, *_: object) -> None:
        self._connections.close()

    def take(self) -> Any:
        """The next task for this replica, None after the last. All its ranks call this together."""
        task = [None]
        if self._is_first:
            task = [self._hand_out() if parallel.replica() == 0 else self._ask()]
        if fairscale_groups.get_model_parallel_world_size() > 1:
            source = fairscale_groups.get_model_parallel_src_rank()
            dist.broadcast_object_list(task, src=source, group=fairscale_groups.get_model_parallel_group())
        return task[0]

    def give(self, result: Any) -> None:
        """Sends a task's result to rank 0. Each rank of a replica calls this; the first one's counts."""
        if self._is_first and parallel.replica() == 0:
            self._results.put(result)
        elif self._is_first:
            self._link.send_bytes(json.dumps(result).encode())

    def results(self, wait: bool = False) -> Iterator[Any]:
        """On rank 0, the results that have arrived, from all replicas; with `wait`, until every task has its own.

        Raises:
            RankFailed: another rank failed while this one waited.
        """
        while self._n_open:
            try:
                result = self._results.get(timeout=0.5) if wait else self._results.get_nowait()
            except queue.Empty:
                if not wait:
                    return
                parallel.raise_if_a_rank_failed()
                continue
            if isinstance(result, Exception):
                raise result
            with self._lock:
                self._n_open -= 1
            if result is not None:  # as it is when a replica was told that there are no more tasks
                yield result

    def _hand_out(self) -> Any:
        with self._lock:
            task = next(self._tasks, None)
            self._n_open += task is not None
            return task

    def _ask(self) -> Any:
        try:
            self._link.send_bytes(b"null")
            return json.loads(self._link.recv_bytes())
        except EOFError:
            raise ConnectionError("the connection to rank 0, which hands out the tasks, was lost") from None

    def _connect(self) -> None:
        """Connects the first rank of each other replica to rank 0."""
        address: list = [None]
        if dist.get_rank() == 0:
            key = secrets.token_hex()  # the port is open to the network
            listener = Listener(("", 0), backlog=parallel.n_replicas(), authkey=key.encode())
            self._connections.enter_context(listener)
            host = os.environ.get("MASTER_ADDR") or socket.gethostname()
            address = [(host, listener.address[1], key)]
            threading.Thread(target=self._accept, args=(listener,), name="task queue", daemon=True).start()
        dist.broadcast_object_list(address, src=0)
        if self._is_first and parallel.replica() > 0:
            host, port, key = address[0]
            self._link = self._connections.enter_context(Client((host, port), authkey=key.encode()))

    def _accept(self, listener: Listener) -> None:
        while listener._listener is not None:  # until it is closed
            with contextlib.suppress(Exception):  # it is closed, or a stranger came without the key
                link = self._connections.enter_context(listener.accept())
                threading.Thread(target=self._serve, args=(link,), name="task queue", daemon=True).start()

    def _serve(self, link: Connection) -> None:
        """Hands tasks to one replica and takes its results, until it disconnects."""
        with contextlib.suppress(EOFError, OSError):  # gone: if it was not done, the lifeline ends the run
            while True:
                if (result := json.loads(link.recv_bytes())) is not None:
                    self._results.put(result)
                    continue
                message = b"null"
                try:
                    message = json.dumps(self._hand_out()).encode()
                except Exception as error:  # the input's, or a task that is not JSON: rank 0 raises it
                    self._results.put(error)
                link.send_bytes(message)
                if message == b"null":
                    self._results.put(None)
