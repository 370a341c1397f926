"""How the ranks of a run learn that one of them has failed, whatever they are doing at that moment.

torchrun ends the ranks of its own host, and gloo notices a closed connection in a collective. Three gaps are left, as
`python -m benchmarks.failures --watch False` shows. Ranks of another host that are in no collective (they load, or wait
for a user) never notice. Nobody notices a cut link until a collective has waited for half an hour (NCCL: ten minutes).
A rank that has raised and lives on keeps the others waiting as long. So each rank has one TCP connection to rank 0,
open as long as it lives. A rank that raises sends its message through it; when a process is killed, the kernel closes
it; when the link is cut, the kernel's probes get no answer. Knows nothing of models or process groups.
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

# Kinds of reports, the likeliest cause first: a rank's own exception; a closed connection; an exception that only says
# that another rank is gone.
FAILED, KILLED, LOST_PEER = range(3)
# After the first report, the other ranks have this many seconds to report too. If all do, they share a mistake (in the
# arguments, say), and it is an exception like any other.
GRACE = 1.0
# After the verdict (which rank is the cause), a rank has this many seconds to raise. One that is stuck in a collective
# then exits.
PATIENCE = 2.0
# The kernel probes a silent connection after PROBE_AFTER seconds, and gives it up after GIVE_UP_AFTER seconds without
# an answer. The kernel also answers, so a process that is busy or stopped does not count as failed.
PROBE_AFTER, GIVE_UP_AFTER = 10, 30


class Lifeline:
    """One rank's connection to the hub at `address`: host, port and password.

    Rank 0, which runs the hub, connects to it like the others. Raises OSError if the hub cannot be reached.
    """

    def __init__(self, rank: int, address: tuple[str, int, str], hub: "Hub | None" = None):
        self.rank, self._hub = rank, hub
        self.lost: dict | None = None  # why the run has failed: the `rank` that is the cause, and its `message`
        self.warnings: dict[int, dict] = {}  # for each meeting, an exception that some rank has raised before it
        self._verdict: dict | None = None
        self._judged, self._reported = threading.Event(), False  # whether there is a verdict; whether `report` has it
        self._link = socket.create_connection(address[:2], timeout=30)
        self._link.settimeout(None)
        _enable_keepalive(self._link)
        _send(self._link, [rank, address[2]])
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()
        atexit.register(self._leave)

    def warn(self, meeting: int, message: str) -> None:
        """Tells the other ranks about an exception before they meet: they find it in `warnings`, and go on."""
        _send(self._link, {"meeting": meeting, "rank": self.rank, "message": message})

    def report(self, message: str, kind: int = FAILED) -> dict | None:
        """Reports that this rank has raised, and waits for the verdict: the `rank` that is the cause, its `message`.

        Returns None if this rank is the cause, or if all ranks raised together.
        """
        self._judged.clear()
        self._verdict = None if self.lost is None else self._verdict
        _send(self._link, {"kind": kind, "message": message})
        if self.lost is None:
            self._judged.wait(GRACE + PATIENCE)
        self._reported = True
        verdict = self._verdict or {"rank": self.rank}
        return None if verdict["rank"] in (self.rank, None) else verdict

    def _listen(self) -> None:
        """Reads the hub's messages as long as this process lives."""
        for line in _lines(self._link):
            if line == "bye":  # rank 0 has finished
                self._judged.set()
                return
            if "meeting" in line:
                self.warnings[line["meeting"]] = line
            else:
                self._end(line)
        self._end({"rank": 0, "message": "rank 0 failed: it was killed, or its connection was lost"})

    def _end(self, verdict: dict) -> None:
        """Takes a verdict. If it ends the run, prints it, and exits unless the main thread raises by itself."""
        self._verdict = verdict
        if verdict["rank"] is not None:
            self.lost = verdict
            if verdict["rank"] != self.rank:
                tell(**verdict)  # at once: torchrun may end this process as soon as another has exited
        self._judged.set()
        if self.lost is None:
            return
        time.sleep(PATIENCE)
        if not self._reported:
            os._exit(1)  # the main thread is inside a collective, where no exception reaches it

    def _leave(self) -> None:
        """At exit: says goodbye, or reports the exception that ends this process."""
        raised = getattr(sys, "last_value", None)  # the exception whose traceback the interpreter has printed
        if raised is None:
            _send(self._link, "bye")
            if self._hub is not None:
                self._hub.send_to_all("bye")
        elif not self._reported:
            self.report(f"{type(raised).__name__}: {raised}")


_told: set[str] = set()


def tell(rank: int, message: str) -> None:
    """Prints once on each host that a rank has failed; without details on its own host, which has the traceback."""
    if os.environ.get("LOCAL_RANK", "0") != "0" or any(message.startswith(told) for told in _told):
        return
    _told.add(message)
    me, n_here = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if rank // n_here == me // n_here:
        message = ":".join(message.split(":")[:2])
    print(f"[rank {me}] ended, because {message}", file=sys.stderr, flush=True)


class Hub:
    """Rank 0's side: a connection from every rank. It collects the ranks' reports, and sends the verdict to all."""

    def __init__(self, n_ranks: int):
        self.n_ranks = n_ranks
        self._listener = socket.create_server(("", 0), backlog=n_ranks)
        self.port = self._listener.getsockname()[1]
        self.password = secrets.token_hex()  # the port is open to the network
        self._links: dict[int, socket.socket] = {}
        self._reports: dict[int, tuple[int, int, str]] = {}  # in the order in which they came
        self._is_over = False
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="lifeline hub", daemon=True).start()

    def send_to_all(self, message: object) -> None:
        for rank in sorted(self._links, reverse=True):  # rank 0 last: it may exit when it gets the message
            _send(self._links[rank], message)

    def _accept(self) -> None:
        while True:
            link, _ = self._listener.accept()
            _enable_keepalive(link)
            threading.Thread(target=self._listen, args=(link,), name="lifeline hub", daemon=True).start()

    def _listen(self, link: socket.socket) -> None:
        """Listens to one rank until it says goodbye or its connection closes."""
        lines = _lines(link)
        rank, password = next(lines, (None, None))
        if password != self.password:
            return
        self._links[rank] = link
        for line in lines:
            if line == "bye":
                return
            if "meeting" in line:
                self.send_to_all(line)
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
        if not reports or self._is_over:
            return
        _, rank, message = min(reports.values(), key=lambda report: report[0])  # of the first kind, the earliest
        together = len(reports) == self.n_ranks and all(kind == FAILED for kind, _, _ in reports.values())
        self._is_over = not together
        self.send_to_all({"rank": None if together else rank, "message": message})


def _enable_keepalive(link: socket.socket) -> None:
    """Makes the kernel notice when the other machine or the link to it is gone, as far as the system can."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    names = {"TCP_KEEPIDLE": PROBE_AFTER, "TCP_KEEPALIVE": PROBE_AFTER, "TCP_KEEPINTVL": 5}
    names |= {"TCP_KEEPCNT": max(1, (GIVE_UP_AFTER - PROBE_AFTER) // 5), "TCP_USER_TIMEOUT": GIVE_UP_AFTER * 1000}
    for name, value in names.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(link: socket.socket, message: object) -> None:
    with contextlib.suppress(OSError):  # the other side is gone: the thread that listens to it notices
        link.sendall(json.dumps(message).encode() + b"\n")


def _lines(link: socket.socket) -> Iterator:
    """The messages that arrive on a connection until it closes."""
    try:
        with link.makefile() as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError):  # reset by the peer, or cut off in a message
        return
