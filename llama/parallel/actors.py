"""Replicas on a Ray cluster: actors that do tasks, each as it has room, and are started again when they die.

Where processes run, that they start, and the news that one has died are Ray's. Knows nothing of models, or of what a
task is besides its `line`.
"""

import contextlib
import heapq
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

OLDEST = (2, 40)  # of Ray
MOST_DEATHS = 3  # of the workers of one task: then the task is the cause
MOST_FAILED_STARTS = 3  # of one replica, one after the other
AHEAD = 2  # tasks that a replica has beside those in its slots, so that a slot never waits for the driver
POLL_SECONDS = 1.0  # how often the driver looks whether the cluster has grown
HINT = "pip install '.[ray]'"

Task = dict[str, Any]  # with its number as `line`
Result = dict[str, Any]  # with the `line` of its task


class Worker(Protocol):
    """What runs in each rank's process. All ranks of a replica get the same calls, in the same order."""

    def facts(self) -> dict[str, Any]:
        """What must be the same on every replica, and `room`: how many tasks one takes at a time."""

    def open(self, make: Callable) -> None:
        """Begins a run; `make` makes what the run needs there. What the run before left undone is dropped."""

    def work(self, tasks: list[Task]) -> list[Result]:
        """Takes more tasks, and works until some of those it has are done; [] if it has none."""


class ReplicaFailed(RuntimeError):
    """No replica could be started, or none is left."""


class Replicas:
    """n replicas of `size` ranks each, which start at once and live until `close`.

    Args:
        build: makes a rank's Worker, in its process.
        n: how many; as many as the cluster holds when None, and more when it grows. On CPUs that is one a machine.
        size: how many ranks a replica has, each an actor with a card of its own, or its share of a machine's cores.
        address: of a cluster, such as "10.0.0.1:6379" or "auto"; RAY_ADDRESS, or this machine alone, when None.
        device: "cuda" or "cpu"; CUDA where the cluster has cards, when None.
        expected: facts that each replica must have.

    Raises:
        ImportError: Ray is missing, or too old.
        ValueError: there are not enough cards or cores; a replica lacks an expected fact, or differs from the first.
        ConnectionError: there is no cluster at the address.
        Exception: whatever `build` raised in the first replica.
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
        try:
            self._bundle = self._resources(device)
            for _ in range(self._n or self._n_that_fit()):
                self._replicas.append(_Replica(self))
            while self.facts is None:
                list(self._wait())
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
        """Does tasks, and yields the result of each as it comes.

        A task whose worker died is done again, by any replica; one that three workers died of gets an `error`.

        Args:
            make: what `Worker.open` gets, or has got by `open`.
            tasks: taken a few ahead of what is being done.
            cost: of a task; of those taken, the dearest are done first.
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
        """Waits until replicas have news: what they have done, or the tasks they died of."""
        by_call = {call: replica for replica in self._replicas for call in replica.calls}
        calls, news = list(by_call), []
        if calls and self._ray.wait(calls, num_returns=1, timeout=POLL_SECONDS)[0]:
            news = self._ray.wait(calls, num_returns=len(calls), timeout=0)[0]  # all of them: nobody comes last always
        for call in news:
            replica = by_call[call]
            if call not in replica.calls:  # of a replica that another call of this round has ended
                continue
            try:
                value = self._ray.get(call)
            except self._ray.exceptions.RayError as error:
                yield replica, [], self._bury(replica, error)
                continue
            replica.calls.remove(call)
            replica.value = value if call == replica.first else replica.value
            if replica.calls:
                continue  # until all its ranks have returned
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
        if self._n is None:
            for _ in range(self._n_that_fit(free=True)):
                self._replicas.append(_Replica(self))

    def _bury(self, replica: "_Replica", error: Exception) -> list[Task]:
        """Ends what is left of a replica, starts it again, and returns the tasks it had."""
        cause = error.cause if isinstance(error, self._ray.exceptions.RayTaskError) else error
        is_mistake = self.facts is None or (replica.is_opening and cause is not error)
        lost, replica.cause = list(replica.tasks.values()), f"{type(cause).__name__}: {cause}".splitlines()[0]
        replica.n_failed_starts += replica.is_opening or not replica.is_ready
        replica.end()
        if is_mistake:  # of the caller's, as a rule: nothing has worked yet
            raise cause
        if replica.n_failed_starts >= MOST_FAILED_STARTS:
            self._replicas.remove(replica)
            self._n = len(self._replicas)  # and none is added in its place
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
            where = self._ray.get(replica.actors[0].where.remote())
            raise ValueError(f"the replica on {where} differs from the others: {shown}: expected the same everywhere")
        self.facts = self.facts or facts

    def _resources(self, device: str | None) -> dict[str, float]:
        """What each rank needs. Raises ValueError if the cluster does not have it."""
        has = self._ray.cluster_resources()
        n_cards, n_cores = int(has.get("GPU", 0)), int(has.get("CPU", 0))
        n_machines = sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in self._ray.nodes())
        n_ranks = (self._n or 1) * self._size
        asked = f"{self._n or 1} replica{'s' * ((self._n or 1) != 1)} of {self._size} rank{'s' * (self._size != 1)}"
        if device == "cuda" or (device is None and n_cards):
            if n_cards < n_ranks:
                raise ValueError(f"the cluster has {n_cards} GPUs: {asked} need {n_ranks}, one for each rank")
            return {"GPU": 1, "CPU": min(1, n_cores // n_ranks)}
        if n_cores < n_ranks:
            raise ValueError(f"the cluster has {n_cores} CPU cores: {asked} need {n_ranks}, one for each rank at least")
        most = n_ranks if self._n else max(n_machines, 1) * self._size
        return {"CPU": max(1, n_cores // most)}

    def _n_that_fit(self, free: bool = False) -> int:
        """How many replicas the cluster holds; with `free`, how many more than there are."""
        if free and not all(replica.is_ready for replica in self._replicas):
            return 0
        has = self._ray.available_resources() if free else self._ray.cluster_resources()
        fits = min(int(has.get(name, 0) // (amount * self._size)) for name, amount in self._bundle.items() if amount)
        return fits if free else max(1, fits)


class _Replica:
    """The driver's view of one replica."""

    def __init__(self, owner: Replicas):
        self.owner, self.n_failed_starts, self.cause = owner, 0, ""
        self.start()

    def start(self) -> None:
        """Asks for its ranks' processes, close to each other; nothing waits for them."""
        ray, size, bundle = self.owner._ray, self.owner._size, self.owner._bundle
        self.is_ready, self.is_opening, self.room = False, False, 0
        self.tasks: dict[int, Task] = {}  # that it has and has not done
        self.group = ray.util.placement_group([bundle] * size, strategy="PACK")
        self.actors = []
        for rank in range(size):
            place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self.group, rank)
            options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": place}
            self.actors.append(ray.remote(_Rank).options(**options).remote(rank, sys.path))
        self._call("start", self.owner._build, size, self.actors[0].address.remote())

    def end(self) -> None:
        """Ends its processes, those that are still asked for too."""
        self.calls, self.tasks, self.is_ready, self.room = [], {}, False, 0
        with contextlib.suppress(Exception):  # Ray itself may be gone
            for actor in self.actors:
                self.owner._ray.kill(actor)
            self.owner._ray.util.remove_placement_group(self.group)

    def open(self) -> None:
        """Begins a run on it, if it is there and there is a run."""
        if self.is_ready and self.owner._make is not None:
            self.tasks, self.is_opening = {}, True
            self._call("open", self.owner._make)

    def take(self, ready: list, deaths: Counter[int]) -> None:
        """Gives it tasks, if it waits for some. One that two workers died of runs alone, so that no other is blamed."""
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
        """Has every rank do something, which `Replicas._wait` waits for."""
        self.calls = [getattr(actor, method).remote(*arguments) for actor in self.actors]
        self.first, self.value = self.calls[0], None


class _Rank:
    """One rank of a replica, in a process of its own."""

    def __init__(self, rank: int, paths: list[str]):
        self.rank = rank
        sys.path += [path for path in paths if path not in sys.path]  # the driver's modules, such as a scorer's

    def address(self) -> tuple[str, int]:
        """Where its ranks meet: this machine's address, and a port that is free."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return self.where(), probe.getsockname()[1]

    def where(self) -> str:
        return import_ray().util.get_node_ip_address()

    def start(self, build: Callable[[], Worker], size: int, address: tuple[str, int]) -> dict[str, Any]:
        """Makes the worker, in the environment that torchrun would make. Returns its facts."""
        if size > 1:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            os.environ |= zip(names, map(str, (self.rank, size, 0, *address)))
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
    """Joins a cluster, or starts one on this machine; False if the caller has done it. Raises ConnectionError."""
    if ray.is_initialized():
        return False
    found = address or os.environ.get("RAY_ADDRESS") or "local"
    host, _, port = found.rpartition(":")
    try:
        if host and port.isdigit() and "/" not in found:  # Ray itself takes minutes to say that nobody answers
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except (ConnectionError, TimeoutError, socket.gaierror) as error:
        hint = "expected HOST:PORT of a head that `ray start --head` has started"
        raise ConnectionError(f"there is no Ray cluster at {found} ({error}): {hint}") from error
    return True
