"""Replicas on a Ray cluster: actors that take tasks when they have room, and are started again when they die.

Ray places the processes, starts them, and reports when one dies. Knows nothing of models, or of a task besides its
`line`.
"""

import contextlib
import heapq
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

OLDEST = (2, 40)  # of Ray
MOST_DEATHS = 3  # a task whose worker died this often gets an error
MOST_FAILED_STARTS = 3  # a replica that failed to start this often in a row is given up
AHEAD = 2  # tasks that a replica holds besides those in its slots, so that a slot never waits for the driver
POLL_SECONDS = 1.0  # how often the driver looks whether the cluster has grown
PATIENCE = 30.0  # seconds without a replica, after which the driver prints what the cluster has free
HINT = "pip install '.[ray]'"

Task = dict[str, Any]  # with its number as `line`
Result = dict[str, Any]  # with the `line` of its task


class Worker(Protocol):
    """The code in each rank's process. All ranks of a replica get the same calls, in the same order."""

    def facts(self) -> dict[str, Any]:
        """Facts that must be the same on every replica, and `room`: how many tasks it takes at a time."""

    def open(self, make: Callable) -> None:
        """Begins a run, and drops unfinished tasks of the last one. `make` makes what the run needs in this process."""

    def work(self, tasks: list[Task]) -> list[Result]:
        """Takes more tasks, and runs until some of its tasks are done; returns [] if it has none."""


class ReplicaFailed(RuntimeError):
    """No replica could be started, or none is left."""


class Replicas:
    """n replicas of `size` ranks each. They start at once and live until `close`.

    Args:
        build: makes a rank's Worker, in its process.
        n: how many replicas; None: as many as the cluster holds (on CPUs one per machine), and more when it grows.
        size: how many ranks a replica has. Each is an actor with its own card, or with its share of a machine's cores.
        address: of a cluster, such as "10.0.0.1:6379", or "auto" for the cluster of this machine. None: RAY_ADDRESS; if
            that is not set, Ray starts on this machine alone.
        device: "cuda" or "cpu"; None: CUDA if the cluster has cards.
        expected: facts that each replica must have.

    Raises:
        ImportError: Ray is missing, or too old.
        ValueError: there are not enough cards or cores; a replica lacks an expected fact, or differs from the first.
        ConnectionError: there is no cluster at the address, or Ray does not start.
        ReplicaFailed: the processes of all replicas die while they start.
        Exception: the exception of `build` in the first replica.
    """

    def __init__(
        self,
        build: Callable[[], Worker],
        n: int | None = None,
        size: int = 1,
        address: str | None = None,
        device: str | None = None,
        expected: dict[str, Any] | None = None,
    ):
        if n is not None and (type(n) is not int or n < 1):
            raise ValueError(f"replicas = {n!r}: expected an integer of at least 1")
        self._ray = import_ray()
        self._build, self._size, self._n = build, size, n
        self.restarts = 0
        self.facts: dict[str, Any] | None = None
        self._expected = expected or {}
        self._make: Callable | None = None
        self._replicas: list[_Replica] = []
        self._joined = _join(self._ray, address)
        self._looked = started = time.monotonic()
        try:
            self._bundle = self._resources(device)
            for _ in range(self._n or self._n_that_fit()):
                self._replicas.append(_Replica(self))
            while self.facts is None:
                list(self._wait())
                if started is not None and time.monotonic() - started > PATIENCE:
                    has, free = self._ray.cluster_resources(), self._ray.available_resources()
                    room = ", ".join(f"{free.get(name, 0):g} of {has.get(name, 0):g} {name}s" for name in self._bundle)
                    print(f"no replica has started yet; free in the cluster: {room}", file=sys.stderr)
                    started = None
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        restarts = f", {self.restarts} restart{'s' * (self.restarts != 1)}" if self.restarts else ""
        return f"{self.n_alive} replica{'s' * (self.n_alive != 1)}{restarts}"

    @property
    def n_alive(self) -> int:
        return sum(replica.is_ready for replica in self._replicas)

    def close(self) -> None:
        """Ends the replicas, and Ray too if it was started here."""
        for replica in self._replicas:
            replica.end()
        self._replicas = []
        if self._joined:
            self._ray.shutdown()

    def open(self, make: Callable) -> None:
        """Begins a run, and waits until a replica has begun it. Raises what `Worker.open` raises."""
        self._make = make
        for replica in self._replicas:
            replica.open()
        while not any(replica.is_ready and not replica.is_opening for replica in self._replicas):
            list(self._wait())

    def results(
        self, make: Callable, tasks: Iterator[Task], cost: Callable[[Task], float] = lambda task: 0.0
    ) -> Iterator[Result]:
        """Runs tasks, and yields each result as it comes.

        A task whose worker died runs again, on any replica. After three deaths its result is an `error`.

        Args:
            make: passed to `Worker.open`, unless `open` has already passed it.
            tasks: read a few ahead of those that run.
            cost: of a task; of the tasks read so far, the costliest run first.
        """
        if make is not self._make:
            self.open(make)
        deaths: Counter[int] = Counter()
        ready: list[tuple[float, int, Task]] = []  # a heap; the second number is the task's line
        more = True
        while True:
            n_ahead = sum(replica.room for replica in self._replicas)
            while more and len(ready) < n_ahead:
                if more := (task := next(tasks, None)) is not None:
                    heapq.heappush(ready, (-cost(task), task["line"], task))
            if not more and not ready and not any(replica.tasks for replica in self._replicas):
                return
            for replica in sorted(self._replicas, key=lambda replica: len(replica.tasks)):
                replica.take(ready, deaths)
            for replica, results, lost in self._wait():
                yield from results
                for task in lost:
                    deaths[task["line"]] += 1
                    if deaths[task["line"]] >= MOST_DEATHS:
                        error = f"its worker died {MOST_DEATHS} times, the last time of: {replica.cause}"
                        yield {"line": task["line"], "error": error}
                    else:
                        heapq.heappush(ready, (-cost(task), task["line"], task))

    def _wait(self) -> Iterator[tuple["_Replica", list[Result], list[Task]]]:
        """Waits for replicas to return. Yields each with its results, or with the tasks it lost when it died."""
        by_call = {call: replica for replica in self._replicas for call in replica.calls}
        calls, returned = list(by_call), []
        if calls and self._ray.wait(calls, num_returns=1, timeout=POLL_SECONDS)[0]:
            returned = self._ray.wait(calls, num_returns=len(calls), timeout=0)[0]  # all, so that none waits forever
        for call in returned:
            replica = by_call[call]
            if call not in replica.calls:  # another call of this round has ended the replica
                continue
            try:
                value = self._ray.get(call)
            except self._ray.exceptions.RayError as error:
                yield replica, [], self._restart(replica, error)
                continue
            replica.calls.remove(call)
            replica.value = value if call == replica.first else replica.value
            if replica.calls:
                continue  # some of its ranks have not returned yet
            if replica.is_opening:
                replica.is_opening, replica.n_failed_starts = False, 0
            elif replica.is_ready:
                for result in replica.value:
                    del replica.tasks[result["line"]]
                yield replica, replica.value, []
            else:
                self._check_facts(replica)
                replica.is_ready, replica.room = True, self.facts["room"] + AHEAD
                replica.open()
        if self._n is None and time.monotonic() - self._looked > POLL_SECONDS:
            self._looked = time.monotonic()
            for _ in range(self._n_that_fit() - len(self._replicas)):
                self._replicas.append(_Replica(self))

    def _restart(self, replica: "_Replica", error: Exception) -> list[Task]:
        """Ends the rest of a dead replica, starts it again, and returns the tasks it had."""
        has_raised = isinstance(error, self._ray.exceptions.RayTaskError)
        cause, where = (error.cause, f" (on {replica.where()})") if has_raised else (error, "")
        lost, replica.cause = list(replica.tasks.values()), f"{type(cause).__name__}: {cause}".splitlines()[0] + where
        replica.n_failed_starts += replica.is_opening or not replica.is_ready
        is_mistake = has_raised and (self.facts is None or replica.is_opening)
        replica.end()
        if is_mistake:  # usually the caller's, because nothing has worked yet
            print(f"a replica cannot start{where}", file=sys.stderr)
            raise cause
        if replica.n_failed_starts >= MOST_FAILED_STARTS:
            self._replicas.remove(replica)
            self._n = len(self._replicas)  # so that no other is added in its place
            print(
                f"a replica is given up: it failed to start {MOST_FAILED_STARTS} times: {replica.cause}",
                file=sys.stderr,
            )
            if not self._replicas:
                raise ReplicaFailed(f"no replica is left; the last one failed to start: {replica.cause}")
            return lost
        self.restarts += 1
        print(f"a replica died and is started again: {replica.cause}", file=sys.stderr)
        replica.start()
        return lost

    def _check_facts(self, replica: "_Replica") -> None:
        facts = replica.value
        expected = (self.facts or facts) | self._expected
        names = [name for name in expected if facts.get(name) != expected[name]]
        if names:
            shown = "; ".join(f"{name} is {facts.get(name)!r}, and not {expected[name]!r}" for name in names)
            raise ValueError(
                f"the replica on {replica.where()} differs from the others: {shown}: expected the same everywhere"
            )
        self.facts = self.facts or facts

    def _machines(self) -> list[dict[str, float]]:
        """The resources of each machine of the cluster."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _resources(self, device: str | None) -> dict[str, float]:
        """The resources of one rank. Raises ValueError if the cluster does not have enough."""
        machines = self._machines()
        cards, cores = ([int(machine.get(name, 0)) for machine in machines] for name in ("GPU", "CPU"))
        n_ranks = (self._n or 1) * self._size
        asked = f"{self._n or 1} replica{'s' * ((self._n or 1) != 1)} of {self._size} rank{'s' * (self._size != 1)}"
        if device == "cuda" or (device is None and any(cards)):
            if sum(cards) < n_ranks:
                raise ValueError(f"the cluster has {sum(cards)} GPUs: {asked} need {n_ranks}, one for each rank")
            return {"GPU": 1, "CPU": int(all(n_cores >= n_cards for n_cores, n_cards in zip(cores, cards)))}
        if sum(cores) < n_ranks:
            raise ValueError(
                f"the cluster has {sum(cores)} CPU cores: {asked} need {n_ranks}, at least one for each rank"
            )
        wanted = n_ranks if self._n else sum(n > 0 for n in cores) * self._size
        shares = range(max(cores), 0, -1)  # the largest share that enough ranks can have, each within one machine
        return {"CPU": next((share for share in shares if sum(n // share for n in cores) >= wanted), 1)}

    def _n_that_fit(self) -> int:
        """How many replicas the cluster holds."""
        needs = [(name, amount) for name, amount in self._bundle.items() if amount]
        n_ranks = sum(min(int(m.get(name, 0) // amount) for name, amount in needs) for m in self._machines())
        return max(1, n_ranks // self._size)


class _Replica:
    """The driver's view of one replica."""

    def __init__(self, owner: Replicas):
        self.owner, self.n_failed_starts, self.cause = owner, 0, ""
        self.start()

    def start(self) -> None:
        """Asks Ray for the ranks' processes, close to each other, and does not wait for them."""
        ray, size, bundle = self.owner._ray, self.owner._size, self.owner._bundle
        self.is_ready, self.is_opening, self.room = False, False, 0
        self.tasks: dict[int, Task] = {}  # the tasks that it has not finished
        self.group = ray.util.placement_group([bundle] * size, strategy="PACK")
        self.actors = []
        for rank in range(size):
            place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self.group, rank)
            options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": place}
            self.actors.append(ray.remote(_Rank).options(**options).remote(rank, sys.path))
        self._call("start", self.owner._build, size, self.actors[0].address.remote() if size > 1 else None)

    def where(self) -> str:
        """The address of its first rank's machine."""
        with contextlib.suppress(self.owner._ray.exceptions.RayError):
            return self.owner._ray.get(self.actors[0].where.remote(), timeout=10)
        return "a machine that is gone"

    def end(self) -> None:
        """Ends its processes, also those that Ray has not started yet."""
        self.calls, self.tasks, self.is_ready, self.room = [], {}, False, 0
        with contextlib.suppress(Exception):  # Ray itself may be gone
            for actor in self.actors:
                self.owner._ray.kill(actor)
            self.owner._ray.util.remove_placement_group(self.group)

    def open(self) -> None:
        """Begins the current run on it, if it is ready and there is a run."""
        if self.is_ready and self.owner._make is not None:
            self.tasks, self.is_opening = {}, True
            self._call("open", self.owner._make)

    def take(self, ready: list, deaths: Counter[int]) -> None:
        """Gives it tasks, if it waits for some. A task that two workers died of runs alone, so no other is blamed."""
        if not self.is_ready or self.calls:
            return
        given = []
        while ready and len(self.tasks) < self.room and not any(deaths[line] == MOST_DEATHS - 1 for line in self.tasks):
            if deaths[ready[0][1]] == MOST_DEATHS - 1 and self.tasks:
                break
            given.append(heapq.heappop(ready)[2])
            self.tasks[given[-1]["line"]] = given[-1]
        if self.tasks:
            self._call("work", given)

    def _call(self, method: str, *arguments: Any) -> None:
        """Calls a method on every rank; `Replicas._wait` waits for it."""
        self.calls = [getattr(actor, method).remote(*arguments) for actor in self.actors]
        self.first, self.value = self.calls[0], None


class _Rank:
    """One rank of a replica, in its own process."""

    def __init__(self, rank: int, paths: list[str]):
        self.rank = rank
        sys.path += [path for path in paths if path not in sys.path]  # the driver's modules, such as a scorer's

    def address(self) -> tuple[str, int]:
        """Where the ranks meet: this machine's address, and the port of a store in this process, as in torchrun."""
        from torch.distributed import TCPStore

        self.store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        return self.where(), self.store.port

    def where(self) -> str:
        return import_ray().util.get_node_ip_address()

    def start(self, build: Callable[[], Worker], size: int, address: tuple[str, int] | None) -> dict[str, Any]:
        """Makes the worker, with the environment variables of torchrun. Returns its facts."""
        if address is not None:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            os.environ |= zip(names, map(str, (self.rank, size, 0, *address)))
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        self.worker = build()
        return self.worker.facts()

    def open(self, make: Callable) -> None:
        self.worker.open(make)

    def work(self, tasks: list[Task]) -> list[Result]:
        return self.worker.work(tasks)


def import_ray() -> ModuleType:
    """Ray. Raises ImportError with the command that installs it."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ImportError(f"replicas on several machines need Ray, which is not installed: {HINT}") from error
    if tuple(map(int, ray.__version__.split(".")[:2])) < OLDEST:
        raise ImportError(f"Ray {ray.__version__} is too old: expected {'.'.join(map(str, OLDEST))} or newer: {HINT}")
    return ray


def _join(ray: ModuleType, address: str | None) -> bool:
    """Joins a cluster, or starts one on this machine; False if the caller has done so. Raises ConnectionError."""
    if ray.is_initialized():
        return False
    found = address or os.environ.get("RAY_ADDRESS") or "local"
    host, _, port = found.rpartition(":")
    try:
        if host and port.isdigit() and "/" not in found:  # Ray takes minutes to notice that nobody answers
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(found, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except Exception as error:  # Ray has no common type for its errors, such as a version mismatch
        problem = "Ray does not start on this machine" if found == "local" else f"there is no Ray cluster at {found}"
        hint = (
            ": expected HOST:PORT of a head that `ray start --head` started, and RAY_AUTH_MODE=token if it has a token"
        )
        raise ConnectionError(f"{problem} ({error}){'' if found == 'local' else hint}") from error
    return True
