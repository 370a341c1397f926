"""A real server in a process of its own, for the tests beside this file."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from conftest import ROOT

SECONDS = 180  # for a busy machine


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
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def memory(self) -> int:
        """Bytes of its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024
