"""Real processes without the start of Python: for each worker one process has imported the package, and forks.

To import PyTorch takes longer than most of what a test then does with it. A fork is a process like any other: its own
environment, arguments, folder, standard streams and signals. What it cannot show is what an import does, what memory
a fresh process takes, and that nothing depends on Python's hash seed: tests of these start Python itself.
"""

import contextlib
import functools
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE = 2  # seconds to the end of the others, once one has failed: they may be about to say why
MOST = 1 << 20  # bytes of an order


class Fork:
    """A process that was forked, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, reports: int):
        self._reports = os.fdopen(reports)
        self.pid = int(self._reports.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float = 120) -> int:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._reports, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            with self._reports:
                self.returncode = int(self._reports.readline() or -signal.SIGKILL)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Parent:
    """The process that forks the others."""

    def __init__(self):
        self.orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self.process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()])

    def start(self, words: list, streams: list[int], env: dict[str, str], cwd: str | os.PathLike | None) -> Fork:
        """Starts what `python WORDS` would: -c CODE, -m MODULE or a script, with arguments."""
        order = {"words": list(map(str, words)), "env": env, "cwd": str(cwd or os.getcwd())}
        reports, theirs = os.pipe()
        socket.send_fds(self.orders, [json.dumps(order).encode()], [*streams, theirs])
        os.close(theirs)
        return Fork(reports)


parent = functools.cache(Parent)


def run(
    words: list, env: dict[str, str], input: str = "", timeout: float = 120, cwd: str | os.PathLike | None = None
) -> subprocess.CompletedProcess:
    """As `subprocess.run` of `python WORDS`, with all that it prints as text."""
    return run_all([(words, env)], input, timeout, cwd)


def run_all(
    runs: list[tuple[list, dict[str, str]]], input: str = "", timeout: float = 120, cwd: str | os.PathLike | None = None
) -> subprocess.CompletedProcess:
    """Several processes at once that write to the same streams; when one fails, the others are ended."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("a+")) for _ in range(3)]
        files[0].write(input)
        files[0].seek(0)
        streams, deadline = [file.fileno() for file in files], time.monotonic() + timeout
        forks = [parent().start(words, streams, env, cwd) for words, env in runs]
        code, waiting, ends_at = 0, list(forks), deadline
        try:
            while waiting:
                for fork in waiting[:]:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        found = fork.wait(0.02 if len(waiting) > 1 else max(0, ends_at - time.monotonic()))
                        waiting.remove(fork)
                        code = code or found
                        ends_at = min(ends_at, time.monotonic() + GRACE) if found else ends_at
                if waiting and ends_at < deadline and time.monotonic() > ends_at:
                    ends_at = deadline
                    for fork in waiting:
                        fork.send_signal(signal.SIGTERM)
                if waiting and time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(str(runs[0][0])[:200], timeout)
        finally:
            for fork in forks:
                fork.kill()
        printed = []
        for file in files[1:]:
            file.seek(0)
            printed.append(file.read())
    return subprocess.CompletedProcess(runs[0][0], code, *printed)


# In the process that forks


def main(number: int) -> None:
    import llama.cli
    import llama.server.start  # noqa: F401

    orders, ends = socket.socket(fileno=number), socket.socketpair()
    ends[1].setblocking(False)
    signal.set_wakeup_fd(ends[1].fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    reports: dict[int, int] = {}
    selector = selectors.DefaultSelector()
    for watched in (orders, ends[0]):
        selector.register(watched, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is ends[0]:
                ends[0].recv(4096)
                with contextlib.suppress(ChildProcessError):
                    while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                        _report(reports.pop(ended[0]), os.waitstatus_to_exitcode(ended[1]), last=True)
                continue
            content, files, *_ = socket.recv_fds(orders, MOST, 4)
            if not content:
                return  # the tests are over
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                for signal_, action in ((signal.SIGCHLD, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
                    signal.signal(signal_, action)
                for old, new in zip(files, range(3)):
                    os.dup2(old, new)
                os.closerange(3, 1 << 16)
                _become(**json.loads(content))
            for file in files[:3]:
                os.close(file)
            reports[pid] = files[3]
            _report(files[3], pid)


def _report(file: int, number: int, last: bool = False) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(file, f"{number}\n".encode())
    if last:
        os.close(file)


def _become(words: list[str], env: dict[str, str], cwd: str) -> None:
    """Does what `python WORDS` would do, and ends."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    # What they were opened on is another kind of file.
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(cwd)
    what, *rest = words
    code: object = 0
    try:
        if what == "-c":
            sys.argv, sys.path[0] = ["-c", *rest[1:]], cwd
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        elif what == "-m":
            sys.argv, sys.path[0] = [what, *rest[1:]], cwd
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(what).parent)
            runpy.run_path(what, run_name="__main__")
    except SystemExit as exit:
        code = exit.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException as error:
        sys.last_value, code = error, 1
        traceback.print_exception(error)
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
