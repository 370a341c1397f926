"""How the ranks of one run learn that one of them has failed, whatever the others are doing at that moment.

Process groups alone do not tell: a rank that waits in a collective for a rank that has raised waits for half an hour
(NCCL: ten minutes), and one that waits for the keyboard does not notice at all. So each rank has one TCP connection to
rank 0, open as long as it lives. A rank that raises sends its message through it; when a process is killed, the kernel
closes it. Knows nothing of models or process groups.
"""

import atexit
import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator

# Kinds of reports. The first kind causes the others: an exception of a rank's own; a closed connection; an exception
# that only says that another rank is gone.
FAILED, KILLED, LOST_PEER = range(3)
# After the first report, the other ranks have this many seconds to report too. If all do, they share a mistake (in the
# arguments, say), and it is an exception like any other.
GRACE = 1.0
# After the verdict, a rank has this many seconds to raise by itself; one that is stuck in a collective then exits.
PATIENCE = 2.0


class Lifeline:
    """One rank's connection to the hub, which is at `address`: host, port and password.

    Rank 0, which has the hub, connects to it as the others do. Raises OSError if the hub cannot be reached.
    """

    def __init__(self, rank: int, address: tuple[str, int, str], hub: "Hub | None" = None):
        self.rank, self._hub = rank, hub
        self.lost: str | None = None  # why the run has failed
        self.warnings: dict[int, str] = {}  # by meeting: what a rank has raised, which all will learn at that meeting
        self._verdict: dict | None = None
        self._told, self._heard = threading.Event(), False
        self._link = socket.create_connection(address[:2], timeout=30)
        self._link.settimeout(None)
        _send(self._link, [rank, address[2]])
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()
        atexit.register(self._leave)

    def warn(self, meeting: int, message: str) -> None:
        """Tells the others of an exception early: they find it in `warnings`, and go on."""
        _send(self._link, {"warning": message, "meeting": meeting})

    def report(self, message: str, kind: int = FAILED) -> str | None:
        """Reports that this rank has raised, and waits for the verdict: the message of the rank that is the cause.

        None if that is this rank, or if all ranks raised together.
        """
        self._told.clear()
        self._verdict = None if self.lost is None else self._verdict
        _send(self._link, {"kind": kind, "message": message})
        if self.lost is None:
            self._told.wait(GRACE + PATIENCE)
        self._heard = True
        verdict = self._verdict or {"rank": self.rank}
        return None if verdict["rank"] in (self.rank, None) else verdict["message"]

    def _listen(self) -> None:
        """Waits for messages of the hub as long as this process lives."""
        for line in _lines(self._link):
            if line == "bye":  # rank 0 has finished
                self._told.set()
                return
            if "warning" in line:
                self.warnings[line["meeting"]] = line["warning"]
            else:
                self._end(line)
        self._end({"rank": 0, "message": "rank 0 failed: it was killed, or its connection was lost"})

    def _end(self, verdict: dict) -> None:
        """Takes a verdict. If it ends the run, exits too, unless the main thread raises it."""
        self._verdict = verdict
        if verdict["rank"] is not None:
            self.lost = verdict["message"]
        self._told.set()
        if self.lost is None:
            return
        time.sleep(PATIENCE)
        if not self._heard:
            print(f"[rank {self.rank}] ended, because {self.lost}", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread is inside a collective, where no exception reaches it

    def _leave(self) -> None:
        """At exit: says goodbye, or reports the exception that ends this process."""
        raised = getattr(sys, "last_value", None)  # what the interpreter has printed a traceback of
        if raised is None:
            _send(self._link, "bye")
            if self._hub is not None:
                self._hub.say("bye")
        elif not self._heard:
            self.report(f"{type(raised).__name__}: {raised}")


class Hub:
    """Rank 0's side: a connection from every rank. What one rank reports is sent to all."""

    def __init__(self, n_ranks: int):
        self.n_ranks = n_ranks
        self._listener = socket.create_server(("", 0), backlog=n_ranks)
        self.port = self._listener.getsockname()[1]
        self.password = secrets.token_hex()  # the port is open to the network
        self._links: dict[int, socket.socket] = {}
        self._reports: dict[int, tuple[int, int, str]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="lifeline hub", daemon=True).start()

    def say(self, news: object) -> None:
        for rank in sorted(self._links, reverse=True):  # rank 0, which may exit at the news, last
            _send(self._links[rank], news)

    def _accept(self) -> None:
        while True:
            link, _ = self._listener.accept()
            threading.Thread(target=self._attend, args=(link,), name="lifeline hub", daemon=True).start()

    def _attend(self, link: socket.socket) -> None:
        """Listens to one rank until it says goodbye or its connection closes."""
        lines = _lines(link)
        rank, password = next(lines, (None, None))
        if password != self.password:
            return
        self._links[rank] = link
        for line in lines:
            if line == "bye":
                return
            if "warning" in line:
                self.say(line)
            else:
                self._note(rank, line["kind"], f"rank {rank} failed: {line['message']}")
        self._note(rank, KILLED, f"rank {rank} failed: it was killed, or its connection was lost")

    def _note(self, rank: int, kind: int, message: str) -> None:
        with self._lock:
            self._reports.setdefault(rank, (kind, rank, message))
            n_reports = len(self._reports)
        if n_reports == self.n_ranks:
            self._judge()
        elif n_reports == 1:
            timer = threading.Timer(GRACE, self._judge)
            timer.daemon = True
            timer.start()

    def _judge(self) -> None:
        with self._lock:
            reports, self._reports = self._reports, {}
        if not reports:
            return
        _, rank, message = min(reports.values())
        together = len(reports) == self.n_ranks and all(kind == FAILED for kind, _, _ in reports.values())
        self.say({"rank": None if together else rank, "message": message})


def _send(link: socket.socket, message: object) -> None:
    with contextlib.suppress(OSError):  # the other is gone: who listens to it says so
        link.sendall(json.dumps(message).encode() + b"\n")


def _lines(link: socket.socket) -> Iterator:
    """The messages that arrive on a connection until it closes."""
    try:
        with link.makefile() as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError):  # reset by the peer, or cut off in a message
        return
