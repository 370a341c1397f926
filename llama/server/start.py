"""Starts and stops a server: its address, its signals, its exit code.

The main thread runs the event loop; the driver's thread loads the model and runs the engine. Knows nothing of requests.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from llama import Llama
from llama.server.app import Service, make_app
from llama.server.driver import Driver, Metrics, follow
from llama.server.limits import Connection, Gate, Keys
from llama.server.settings import Settings
from llama.server.webchat import Policy, add_web_chat


def run(load: Callable[[], Llama], settings: Settings, name: str) -> None:
    """As `llama.server.serve`, which imports this file only when it is called."""
    if int(os.environ.get("RANK", 0)) > 0:
        for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 decides when to stop
            signal.signal(number, signal.SIG_IGN)
        follow(load())
        return
    _allow_many_files()
    listener = _listen(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"listening on {url}, loading the model", file=sys.stderr, flush=True)
    metrics = Metrics()
    failures: list[str] = []

    def fail(reason: str) -> None:
        print(f"the engine has failed: {reason}", file=sys.stderr, flush=True)
        failures.append(reason)
        server.should_exit = True

    driver = Driver(metrics, fail)
    log = (lambda line: print(line, file=sys.stderr, flush=True)) if settings.log_content else None
    service = Service(driver, settings.model_name or name, settings.max_waiting, settings.timeout, log)
    server = _Server(_application(settings, service), service, settings.grace)
    ready = lambda llama: print(f"serving {service.model} at {url}", file=sys.stderr, flush=True)  # noqa: E731
    thread = driver.start(load, ready)
    asyncio.run(server.serve(sockets=[listener]))
    driver.stop()
    if not failures and driver.llama is not None:
        thread.join(timeout=30)
    if failures:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the engine's thread, and other ranks, may be stuck


def _application(settings: Settings, service: Service) -> ASGIApp:
    """The endpoints and the chat, behind the gate."""
    app = make_app(service)
    if not settings.no_web:
        add_web_chat(app, service)
    gate = Gate(Policy(app), Keys(settings.keys()), settings.max_body, service.driver.metrics.refused)
    if not settings.cors_origins:
        return gate
    origins = [origin.strip() for origin in settings.cors_origins.split(",")]
    return CORSMiddleware(gate, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])


class _Server(uvicorn.Server):
    """uvicorn's server, which lets running answers finish before it stops."""

    def __init__(self, app: ASGIApp, service: Service, grace: float):
        quiet = {"log_level": "warning", "access_log": False}
        super().__init__(uvicorn.Config(app, http=Connection, lifespan="on", ws_max_size=1 << 20, **quiet))
        self._service, self._grace = service, grace

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = self._service.stopping = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for the running answers, for at most `grace` seconds; then fails those that are left."""
        self._service.stopping = True
        for listening in self.servers:
            listening.close()
        if self._service.driver.failure is None:
            deadline = time.monotonic() + self._grace
            while self._service.n_open and time.monotonic() < deadline and not self.force_exit:
                await asyncio.sleep(0.02)
            self._service.fail_all(f"the server was stopped, and the answer did not end within {self._grace:g} s")
        self.config.timeout_graceful_shutdown = 3
        await super().shutdown(sockets)


def _allow_many_files() -> None:
    """Raises the limit of open files as far as the system allows, because each connection is a file."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows; a limit that is no number
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    listener.listen(1024)
    listener.setblocking(False)
    return listener
