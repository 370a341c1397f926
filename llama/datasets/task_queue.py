"""Work handed out to replicas one task at a time, as they ask for it, and what comes of it brought back to rank 0.

So a slow task holds up nobody, and one process alone reads the input and writes the output. The processes of a replica,
which must do the same in the same order, learn from its first one what is to be done. Knows nothing of what the tasks
are, but that they can be written as JSON.
"""

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


class Work:
    """One process's side of it; all processes make one together.

    Args:
        tasks: on rank 0, what there is to do, taken one after the other; the others' are not looked at.
    """

    def __init__(self, tasks: Iterator[Any]):
        self._tasks = tasks
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._n_out = 0  # tasks that have been handed out and whose results have not been collected
        # On rank 0: how many of the other replicas have not been told that there is no more.
        self._n_asking = parallel.n_replicas() - 1 if dist.get_rank() == 0 else 0
        self._lock = threading.Lock()
        self._listener: Listener | None = None
        self._links: list[Connection] = []
        self._is_first = dist.get_rank() % fairscale_groups.get_model_parallel_world_size() == 0
        if parallel.n_replicas() > 1:
            self._connect()

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        for end in [*self._links, *([self._listener] if self._listener else [])]:
            end.close()

    def take(self) -> Any:
        """The next task of this process's replica, None after the last. Its processes take it together."""
        task = [None]
        if self._is_first:
            if parallel.replica() == 0:
                task = [self._hand_out()]
            else:
                task = [self._ask()]
        if fairscale_groups.get_model_parallel_world_size() > 1:
            source = fairscale_groups.get_model_parallel_src_rank()
            dist.broadcast_object_list(task, src=source, group=fairscale_groups.get_model_parallel_group())
        return task[0]

    def give(self, result: Any) -> None:
        """Says what came of a task: the replica's first process does, the others' word is not needed."""
        if not self._is_first:
            return
        if parallel.replica() == 0:
            self._results.put(result)
        else:
            self._links[0].send_bytes(json.dumps(result).encode())

    def results(self, wait: bool = False) -> Iterator[Any]:
        """On rank 0, the results that have come in, from all replicas; with `wait`, until every task has its own.

        Raises:
            RankFailed: another rank has failed, while waiting.
        """
        while self._n_out or (wait and self._n_asking):
            try:
                result = self._results.get(timeout=0.5) if wait else self._results.get_nowait()
            except queue.Empty:
                if not wait:
                    return
                parallel.raise_if_a_rank_failed()
                continue
            if isinstance(result, Exception):
                raise result
            if result is None:  # a replica has been told that there is no more
                self._n_asking -= 1
                continue
            with self._lock:
                self._n_out -= 1
            yield result

    def _hand_out(self) -> Any:
        with self._lock:
            task = next(self._tasks, None)
            self._n_out += task is not None
            return task

    def _ask(self) -> Any:
        try:
            self._links[0].send_bytes(b"null")
            return json.loads(self._links[0].recv_bytes())
        except EOFError:
            raise ConnectionError("the connection to rank 0, which hands out the work, was lost") from None

    def _connect(self) -> None:
        """Ties the first process of each other replica to rank 0, by a connection of its own."""
        address: list = [None]
        if dist.get_rank() == 0:
            key = secrets.token_hex()  # the port is open to the network
            self._listener = Listener(("", 0), backlog=parallel.n_replicas(), authkey=key.encode())
            host = os.environ.get("MASTER_ADDR") or socket.gethostname()
            address = [(host, self._listener.address[1], key)]
        dist.broadcast_object_list(address, src=0)
        if self._listener is not None:
            threading.Thread(target=self._accept, name="work", daemon=True).start()
        elif self._is_first and parallel.replica() > 0:
            host, port, key = address[0]
            self._links.append(Client((host, port), authkey=key.encode()))

    def _accept(self) -> None:
        while True:
            try:
                link = self._listener.accept()
            except Exception:  # closed, or a stranger who does not know the key
                if self._listener._listener is None:
                    return
                continue
            self._links.append(link)
            threading.Thread(target=self._serve, args=(link,), name="work", daemon=True).start()

    def _serve(self, link: Connection) -> None:
        """Hands out tasks to a replica, and takes its results, until it leaves."""
        try:
            while True:
                if (result := json.loads(link.recv_bytes())) is not None:
                    self._results.put(result)
                    continue
                message = b"null"
                try:
                    message = json.dumps(self._hand_out()).encode()
                except Exception as error:  # of the input's, or a task that is no JSON: for rank 0 to raise
                    with self._lock:
                        self._n_out += 1
                    self._results.put(error)
                link.send_bytes(message)
                if message == b"null":
                    self._results.put(None)
        except (EOFError, OSError):  # gone: the lifeline ends the run, if it was not done
            return
