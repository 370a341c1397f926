"""A real server in a process of its own, for the tests beside this file."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from conftest import ROOT

SECONDS = 180  # for a busy machine


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

    def __init__(self, *options: str, processes: int = 1, wait: bool = True, code: str = "", **variables: str):
        launcher = [sys.executable, "-m"]
        if processes > 1:
            launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        command = [*launcher, "llama", "serve", "--port", "0", "--device", "cpu", "--dtype", "float32", *options]
        command = [sys.executable, "-c", code] if code else command
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NO_PROXY": "*"}
        self.process = subprocess.Popen(
            command, env={**os.environ, **own, **variables}, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.log = ""
        self.url = ""
        self._wait = wait
        self._listening, self._ready = threading.Event(), threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
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
            for pid in (*ranks(self.process.pid), self.process.pid):  # torchrun's children have sessions of their own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def ranks(self) -> list[int]:
        """The processes under torchrun, rank 0 first; the one process where there is no torchrun."""
        return ranks(self.process.pid) or [self.process.pid]

    def memory(self) -> int:
        """Bytes of its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024
