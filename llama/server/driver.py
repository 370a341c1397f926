"""The one thread that runs the engine for all requests, and how rank 0 leads the other ranks.

Handlers on the event loop add `Ticket`s and wait for reports on them. This thread puts their sequences into the
running batch, runs step after step, and reports what changed after each. Under torchrun, rank 0 tells the other ranks
before each step what it added and cancelled; they do the same and run the same step (`follow`). Knows nothing of HTTP.
"""

import asyncio
import itertools
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from llama import Llama, parallel
from llama.decoding.answering import Job
from llama.decoding.shared_engine import Call
from llama.sequence import Sequence

# An idle engine waits this long for another request before it begins with those that have come, and at most ten times.
GATHER_SECONDS = 0.004


@dataclass(eq=False)
class Ticket:
    """The answers of one request.

    Attributes:
        jobs: for each answer, its job and which sample of the job it is.
        sequences: for each answer, its sequence. Code outside the driver reads only the tokens already reported:
        n_tokens: how many tokens each answer has.
        ended: which answers have ended.
        failure: why the answers cannot go on.
        news: set after a report.
        created: when the request came, by `time.perf_counter`.
    """

    jobs: list[tuple[Job, int]]
    sequences: list[Sequence]
    n_tokens: list[int] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    failure: str | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop | None = None
    created: float = field(default_factory=time.perf_counter)

    def __post_init__(self):
        self.n_tokens = [0] * len(self.sequences)

    @property
    def is_done(self) -> bool:
        return len(self.ended) == len(self.sequences)

    def report(self, counts: list[tuple[int, int]], ended: list[int]) -> None:
        """On the event loop: takes new token counts, as (answer, count), and the answers that have ended."""
        for index, n in counts:
            self.n_tokens[index] = n
        self.ended.update(ended)
        self.news.set()

    def fail(self, reason: str) -> None:
        """On the event loop: nothing more will come."""
        self.failure = reason
        self.news.set()


class Metrics:
    """The metrics that Prometheus reads at /metrics."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        times = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
        self.waiting = Gauge("llama_waiting", "Answers that wait for a slot", **own)
        self.running = Gauge("llama_running", "Answers that are being decoded", **own)
        self.prompt_tokens = Counter("llama_prompt_tokens", "Tokens of prompts", **own)
        self.answer_tokens = Counter("llama_answer_tokens", "Tokens of answers", **own)
        self.reused = Counter("llama_reused_prefix_tokens", "Tokens of prompts that were in the cache already", **own)
        self.first_token = Histogram(
            "llama_time_to_first_token_seconds", "Time from the request to the first token", buckets=times, **own
        )
        self.per_token = Histogram(
            "llama_time_per_token_seconds", "Mean time between the tokens of an answer", buckets=times, **own
        )
        self.refused = Counter("llama_refused_requests", "Requests that were refused", ["status"], **own)


class Driver:
    """Runs the engine of one `Llama` for many tickets.

    Args:
        metrics: counted up here.
        on_failure: called in the driver's thread, with the reason, if the engine fails.

    Attributes:
        llama: the model; None while it loads.
        failure: why the engine has failed.
    """

    def __init__(self, metrics: Metrics, on_failure: Callable[[str], None]):
        self.llama: Llama | None = None
        self.failure: str | None = None
        self.metrics = metrics
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._added: deque[Ticket] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._stopping = False
        self._owners: dict[Sequence, tuple[Ticket, int]] = {}
        self._times: dict[Sequence, list[float]] = {}  # when its request and its first token came
        self._n_reported: dict[Sequence, int] = {}
        self._keys: dict[Sequence, int] = {}  # each sequence's number in the messages to the other ranks
        self._next_key = itertools.count()

    def start(self, load: Callable[[], Llama], ready: Callable[[Llama], None]) -> threading.Thread:
        """Starts a thread that loads the model and then runs the engine."""
        thread = threading.Thread(target=self._run, args=(load, ready), name="engine", daemon=True)
        thread.start()
        return thread

    def add(self, ticket: Ticket) -> None:
        """From the event loop: takes a ticket."""
        ticket.loop = asyncio.get_running_loop()
        with self._changed:
            if self.failure is not None:
                ticket.fail(self.failure)
                return
            self._added.append(ticket)
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """From the event loop: cancels a ticket's answers that have not ended, before the next step."""
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread after the current step; answers that have not ended get no more tokens."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def _run(self, load: Callable[[], Llama], ready: Callable[[Llama], None]) -> None:
        try:
            llama = load()
            _check_ranks()
            # All ranks make it together, before the first request.
            link = _Link() if dist.get_world_size() > 1 else None
            self.llama = llama
            engine = llama.answerer.shared.engine
            self.metrics.waiting.set_function(lambda: len(engine.waiting) + sum(len(t.jobs) for t in [*self._added]))
            self.metrics.running.set_function(lambda: len(engine.running) + (engine.partial is not None))
            ready(llama)
            with parallel.fail_at_once(), Call(llama.answerer.shared) as call:
                self._steps(call, link)
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _steps(self, call: Call, link: "_Link | None") -> None:
        while True:
            with self._changed:
                while not (self._added or self._cancelled or self._stopping or call.n_open):
                    self._changed.wait()
                if not call.n_open:
                    self._gather()
                added, self._added = list(self._added), deque()
                cancelled, self._cancelled = list(self._cancelled), deque()
                stopping = self._stopping
            gone = {s for ticket in cancelled for s in ticket.sequences if s in self._owners}
            gone_keys = [self._keys.pop(s) for s in gone if s in self._keys]
            new = [(t, i) for t in added if t not in cancelled for i in range(len(t.sequences))]
            if link is not None:
                jobs = [(next(self._next_key), *ticket.jobs[index]) for ticket, index in new]
                for (ticket, index), (key, *_) in zip(new, jobs):
                    self._keys[ticket.sequences[index]] = key
                link.send((jobs, gone_keys, stopping))
            if stopping:
                return
            for sequence in gone:
                del self._owners[sequence], self._times[sequence], self._n_reported[sequence]
            call.cancel(gone)
            for ticket, index in new:
                sequence = ticket.sequences[index]
                self._owners[sequence], self._times[sequence] = (ticket, index), [ticket.created]
                self._n_reported[sequence] = 0
                call.add(sequence)
            ended = call.step(every=True) if call.n_open else []
            self._report(ended)

    def _gather(self) -> None:
        """While the engine is idle, waits for more of the requests that come at the same time: they share a prefill."""
        until = time.perf_counter() + 10 * GATHER_SECONDS
        n = 0
        while len(self._added) > n and not self._stopping and time.perf_counter() < until:
            n = len(self._added)
            self._changed.wait(GATHER_SECONDS)

    def _report(self, ended: list[Sequence]) -> None:
        """Tells each ticket what is new, by one call to the event loop for all tickets."""
        now, n_new = time.perf_counter(), 0
        changes: dict[Ticket, tuple[list[tuple[int, int]], list[int]]] = {}
        for sequence, (ticket, index) in self._owners.items():
            n, n_before, times = len(sequence.tokens), self._n_reported[sequence], self._times[sequence]
            if n == n_before:
                continue
            self._n_reported[sequence] = n
            n_new += n - n_before
            if n_before == 0:
                times.append(now)
                self.metrics.first_token.observe(now - times[0])
                self._count_prompt(sequence, ticket, index)
            changes.setdefault(ticket, ([], []))[0].append((index, n))
        for sequence in ended:
            ticket, index = self._owners.pop(sequence)
            self._keys.pop(sequence, None)
            del self._n_reported[sequence]
            changes.setdefault(ticket, ([], []))[1].append(index)
            times = self._times.pop(sequence)
            if not sequence.tokens:
                self._count_prompt(sequence, ticket, index)
            elif len(sequence.tokens) > 1:
                self.metrics.per_token.observe((now - times[1]) / (len(sequence.tokens) - 1))
        self.metrics.answer_tokens.inc(n_new)
        if changes:
            loop = next(iter(changes)).loop
            _call(loop, _report_all, [(ticket, *change) for ticket, change in changes.items()])

    def _count_prompt(self, sequence: Sequence, ticket: Ticket, index: int) -> None:
        if ticket.jobs[index][1] == 0:  # once for all answers to a prompt
            self.metrics.prompt_tokens.inc(len(sequence.prompt))
        self.metrics.reused.inc(sequence.n_cached)

    def _fail(self, reason: str) -> None:
        """Fails all tickets, and those to come: the engine cannot go on."""
        with self._changed:
            self.failure = reason
            lost = {*self._added, *(ticket for ticket, _ in self._owners.values())}
            self._owners, self._added = {}, deque()
        for ticket in lost:
            _call(ticket.loop, ticket.fail, reason)
        self._on_failure(reason)


def _report_all(changes: list[tuple[Ticket, list[tuple[int, int]], list[int]]]) -> None:
    for ticket, counts, ended in changes:
        ticket.report(counts, ended)


def _call(loop: asyncio.AbstractEventLoop, function: Callable, *args: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop is closed, so nobody waits
        return


def follow(llama: Llama) -> None:
    """On ranks other than 0: runs the same steps as rank 0, on the same sequences, until rank 0 stops."""
    _check_ranks()
    link = _Link()
    sequences: dict[int, Sequence] = {}
    with parallel.fail_at_once(), Call(llama.answerer.shared) as call:
        while True:
            jobs, cancelled, stopping = link.receive()
            if stopping:
                return
            call.cancel({sequences.pop(key) for key in cancelled})
            for key, job, sample in jobs:
                sequences[key] = llama.answerer.sequence(job, sample)
                call.add(sequences[key])
            if call.n_open:
                ended = set(call.step(every=True))
                sequences = {key: s for key, s in sequences.items() if s not in ended}


def _check_ranks() -> None:
    if parallel.n_replicas() > 1:
        raise ValueError(
            f"{parallel.n_replicas()} replicas: a server runs one model over all its processes. Start one server for "
            "each replica, each on its own port, behind a load balancer (docs/server.md)"
        )


class _Link:
    """Messages from rank 0 to the other ranks, over gloo: a rank that waits for one sleeps, however long."""

    def __init__(self):
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def send(self, message: object) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(data)]), src=0, group=self._group)
        dist.broadcast(data, src=0, group=self._group)

    def receive(self) -> object:
        size = torch.zeros(1, dtype=torch.long)
        dist.broadcast(size, src=0, group=self._group)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, src=0, group=self._group)
        return pickle.loads(data.numpy().tobytes())
