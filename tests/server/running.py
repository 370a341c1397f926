"""A real server in its own process, for the tests beside this file."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from conftest import ROOT

SECONDS = 180  # for a busy machine
OWN = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NO_PROXY": "*"}

# Importing the server's libraries takes longer than most tests: one process imports them once, and forks servers.
FORKER = """
import json, os, signal, socket, sys, traceback
import llguidance, nicegui
import llama.server.start
from llama import cli

def report(*_):
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        os.write(1, f"ended {pid} {os.waitstatus_to_exitcode(status)}\\n".encode())

signal.signal(signal.SIGCHLD, report)
for line in os.fdopen(os.dup(0)):
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        null, log = os.open(os.devnull, os.O_RDWR), socket.create_connection(("127.0.0.1", order["log"]))
        for new, old in ((null, 0), (null, 1), (log.fileno(), 2)):
            os.dup2(new, old)
        log.close()
        os.environ.update(order["environ"])
        code = 0
        try:
            if order["code"]:
                exec(order["code"], {"__name__": "__main__"})
            else:
                cli.main(order["words"])
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code or 0)  # skips the slow cleanup, which the tests with real commands cover
    os.write(1, f"begun {pid}\\n".encode())
"""


class Nursery:
    """The process that forks servers, and its reports about them."""

    def __init__(self):
        self._codes: dict[int, int] = {}
        self._news = threading.Condition()
        self._begun: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKER],
            env={**os.environ, **OWN},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            kind, pid, *code = line.split()
            with self._news:
                if kind == "begun":
                    self._begun.append(int(pid))
                else:
                    self._codes[int(pid)] = int(code[0])
                self._news.notify_all()

    def fork(self, order: dict) -> "Child":
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        with self._news:
            assert self._news.wait_for(lambda: self._begun, SECONDS), "no process was forked"
            return Child(self, self._begun.pop())

    def code(self, pid: int, timeout: float) -> int | None:
        with self._news:
            self._news.wait_for(lambda: pid in self._codes, timeout)
            return self._codes.get(pid)


class Child:
    """A forked server, with the methods of `subprocess.Popen`."""

    def __init__(self, nursery: Nursery, pid: int):
        self._nursery, self.pid = nursery, pid

    def poll(self) -> int | None:
        return self._nursery.code(self.pid, 0)

    def wait(self, timeout: float = SECONDS) -> int:
        if (code := self._nursery.code(self.pid, timeout)) is None:
            raise subprocess.TimeoutExpired("llama serve", timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


nursery = functools.cache(Nursery)


def ranks(parent: int) -> list[int]:
    """The children of a torchrun, by their ranks."""
    command = ["ps", "-o", "pid=", "--ppid", str(parent)]
    by_rank = {}
    for pid in subprocess.run(command, capture_output=True, text=True, check=False).stdout.split():
        with contextlib.suppress(OSError):
            if found := re.search(r"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_text()):
                by_rank[int(found[1])] = int(pid)
    return [by_rank[rank] for rank in sorted(by_rank)]


class Server:
    """`python -m llama serve` with these options, or a piece of Python; ready once the `with` is entered.

    Attributes:
        url: where it listens.
        log: what it has written to stderr.
    """

    def __init__(
        self,
        *options: str,
        processes: int = 1,
        wait: bool = True,
        code: str = "",
        is_forked: bool = True,
        **variables: str,
    ):
        words = ["serve", "--port", "0", "--device", "cpu", "--dtype", "float32", *options]
        self.process: subprocess.Popen | Child
        if processes == 1 and is_forked:
            with socket.create_server(("127.0.0.1", 0)) as ear:
                order = {"words": words, "code": code, "log": ear.getsockname()[1], "environ": variables}
                self.process = nursery().fork(order)
                self._lines = ear.accept()[0].makefile()
        else:
            launcher = [sys.executable]
            if processes > 1:
                launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            self.process = subprocess.Popen(
                [*launcher, "-m", "llama", *words],
                env={**os.environ, **OWN, **variables},
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._lines = self.process.stderr
        self.log = ""
        self.url = ""
        self._wait = wait
        self._listening, self._ready = threading.Event(), threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._lines:
            self.log += line
            if found := re.search(r"listening on (http://\S+),", line):
                self.url = found[1]
                self._listening.set()
            if line.startswith("serving "):
                self._ready.set()
        self._listening.set()
        self._ready.set()

    def __enter__(self) -> "Server":
        assert self._listening.wait(SECONDS) and self.url, self.log
        assert not self._wait or (self._ready.wait(SECONDS) and self.process.poll() is None), self.log
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for pid in (*ranks(self.process.pid), self.process.pid):  # torchrun's children have their own sessions
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def ranks(self) -> list[int]:
        """The processes under torchrun, rank 0 first; without torchrun the one process."""
        return ranks(self.process.pid) or [self.process.pid]

    def memory(self) -> int:
        """Bytes of its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024
