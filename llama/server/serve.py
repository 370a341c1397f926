"""Starts and ends a server: where it listens, signals, the exit code.

The main thread runs the event loop, the driver's thread loads the model and runs the engine. Knows nothing of requests.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.middleware.cors import CORSMiddleware

from llama import Llama
from llama.server.app import Service, make_app
from llama.server.driver import Driver, Metrics, follow
from llama.server.limits import Connection, Gate, Keys
from llama.server.webchat import Policy, add_web_chat

KEY_VARIABLE = "LLAMA_API_KEY"


@dataclass
class Settings:
    """How a server listens, and what it bears.

    Attributes:
        host: the address to listen on.
        port: of TCP; 0 takes a free one.
        model_name: what requests call the model by; the name of the checkpoint's directory when left out.
        api_key: who sends one of these keys, separated by commas, is let in; LLAMA_API_KEY has them as well.
        api_key_file: a file with a key in each line.
        cors_origins: the web pages, separated by commas, that may call the server from a browser.
        max_waiting: how many answers may wait for a slot; more are refused (429).
        max_body: bytes of a request; larger ones are refused (413).
        timeout: seconds that a request may take.
        grace: seconds that running answers get when the server is stopped.
        no_web: leaves out the chat at /.
        log_content: whether prompts and answers are logged.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_key: str | None = None
    api_key_file: str | None = None
    cors_origins: str | None = None
    max_waiting: int = 256
    max_body: int = 8 * 2**20
    timeout: float | None = None
    grace: float = 30.0
    no_web: bool = False
    log_content: bool = False

    def __post_init__(self):
        """Raises ValueError or OSError before anything is loaded."""
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port < 65536:
            raise ValueError(f"port = {self.port!r}: expected an integer from 0 to 65535")
        for name, least in (("max_waiting", 0), ("max_body", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} = {value!r}: expected an integer of at least {least}")
        for name in ("timeout", "grace"):
            value = getattr(self, name)
            if not (value is None and name == "timeout") and not (isinstance(value, (int, float)) and value >= 0):
                raise ValueError(f"{name} = {value!r}: expected a number of seconds")
        self.keys()

    def keys(self) -> list[str]:
        """The keys of all three places."""
        lines = (self.api_key or "").split(",") + os.environ.get(KEY_VARIABLE, "").split(",")
        if self.api_key_file is not None:
            lines += Path(self.api_key_file).read_text().splitlines()
        keys = [line.strip() for line in lines if line.strip()]
        if not keys and (self.api_key is not None or self.api_key_file is not None):
            raise ValueError("api_key, api_key_file: expected at least one key that is not empty")
        return keys


def serve(load: Callable[[], Llama], settings: Settings, name: str) -> None:
    """Serves a model until SIGTERM or Ctrl-C; ends the process with exit code 1 if the engine fails.

    Args:
        load: builds the model; called on every rank.
        settings: see there.
        name: what the model is called, if the settings do not say.

    Raises:
        OSError: the address cannot be listened on.
        ValueError: `load` and the ranks: several replicas.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 says when it is over
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
    app = make_app(service)
    if not settings.no_web:
        add_web_chat(app, service)
    gated = Gate(Policy(app), Keys(settings.keys()), settings.max_body, metrics.refused)
    if settings.cors_origins:
        origins = [origin.strip() for origin in settings.cors_origins.split(",")]
        gated = CORSMiddleware(gated, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    config = uvicorn.Config(
        gated, http=Connection, log_level="warning", access_log=False, lifespan="on", ws_max_size=1 << 20
    )
    server = _Server(config, service, settings.grace)
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


class _Server(uvicorn.Server):
    """uvicorn's server, which ends by itself what it has begun."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float):
        super().__init__(config)
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
        """Lets what runs end, for at most `grace` seconds; then it fails in good order."""
        self._service.stopping = True
        for listening in self.servers:
            listening.close()
        if self._service.driver.failure is None:
            deadline = time.monotonic() + self._grace
            while self._service.n_open and time.monotonic() < deadline and not self.force_exit:
                await asyncio.sleep(0.02)
            self._service.fail_all(f"the server was stopped, and the answer was not there after {self._grace:g} s")
        self.config.timeout_graceful_shutdown = 3
        await super().shutdown(sockets)


def _allow_many_files() -> None:
    """A connection is a file: as many as the system lets us have, where it lets us choose."""
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
