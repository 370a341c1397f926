"""What protects the server from its clients: keys, the size of bodies, and time for slow or silent connections.

Knows nothing of what is served.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
from collections.abc import Collection
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama.server.protocol import ApiError

# Seconds from a connection's first moment, or from the end of its last response, to the end of the next request's
# headers; and for the body after these.
HEADER_SECONDS = 10.0
BODY_SECONDS = 60.0
# How long a body that is refused is read on, so that its sender sees why.
LINGER_SECONDS = 5.0
MAX_CONNECTIONS = 2000
# Bodies of all requests that are being read or answered, in largest bodies.
MAX_BODIES = 32


class Keys:
    """The keys that let a client in; none let everybody in. Compared in constant time.

    Args:
        keys: each a string.
    """

    def __init__(self, keys: Collection[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def fit(self, authorization: str) -> bool:
        """Whether a header is `Bearer KEY`, or the `Basic` of a browser with the key for its password."""
        if not self._digests:
            return True
        kind, _, given = authorization.partition(" ")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                given = ""
        elif kind.lower() != "bearer":
            given = ""
        digest = hashlib.sha256(given.encode()).digest()
        return sum(hmac.compare_digest(digest, own) for own in self._digests) > 0


class Gate:
    """The first to see a request: it needs a key, and its body must be neither large nor late.

    Args:
        app: what comes behind it.
        keys: who may pass; /health needs none.
        max_body: bytes.
        refused: counts, by status, what is turned away.
    """

    def __init__(self, app: ASGIApp, keys: Keys, max_body: int, refused: Any):
        self.app, self._keys, self._max_body, self._refused = app, keys, max_body, refused
        self._held = [0]  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] != "/health" and not self._keys.fit(headers.get(b"authorization", "")):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            is_api = scope["path"].startswith(("/v1", "/tokenize", "/detokenize", "/metrics"))
            hint = {"WWW-Authenticate": "Bearer" if is_api else 'Basic realm="llama"'}  # a browser asks for it
            error = ApiError(401, "expected the header Authorization: Bearer KEY", None, "invalid_api_key", hint)
            await self._refuse(error, scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        length = headers.get(b"content-length", "0")
        if length.isdigit() and int(length[:18]) > self._max_body:
            await self._refuse(_too_large(self._max_body), scope, receive, send)
            return
        body = _Body(receive, self._max_body, self._held)
        has_begun = False

        async def send_unless_refused(message: Message) -> None:
            nonlocal has_begun
            if body.error is None or has_begun:
                has_begun = True
                await send(message)

        try:
            with contextlib.suppress(ApiError):
                await self.app(scope, body.receive, send_unless_refused)
        finally:
            self._held[0] -= body.n_bytes
        if body.error is not None and not has_begun:  # whatever the application has made of it
            await self._refuse(body.error, scope, receive, send, not body.is_whole)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send, is_more: bool = True) -> None:
        """Answers with an error, and closes the connection once the client has sent its body, or should have."""
        self._refused.labels(error.status).inc()
        response = error.response()
        response.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        headers = dict(scope["headers"])
        # A client that is still sending would find the connection broken, and not the answer. One that expects to be
        # told to go on has not begun.
        is_sending = is_more and (b"content-length" in headers or b"transfer-encoding" in headers)
        if is_sending and b"expect" not in headers:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_throw_away(receive), LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b""})


async def _throw_away(receive: Receive) -> None:
    """Reads the rest of a body, and keeps nothing of it."""
    while (await receive()).get("more_body"):
        pass


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is too large: expected at most {limit} bytes", None, "body_too_large")


class _Body:
    """A request's body while it comes.

    Args:
        receive: ASGI's.
        limit: bytes of one body.
        held: bytes of the bodies of all requests; counted up here.

    Attributes:
        n_bytes: that have come.
        is_whole: whether there is no more.
        error: what is wrong with it; raised, too, by `receive`.
    """

    def __init__(self, receive: Receive, limit: int, held: list[int]):
        self._receive, self._limit, self._held = receive, limit, held
        self.error: ApiError | None = None
        self.n_bytes, self.is_whole = 0, False
        self._deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive(self) -> Message:
        if self.is_whole:
            return await self._receive()
        seconds = self._deadline - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, seconds))
        except asyncio.TimeoutError:
            message = f"the body was not there after {BODY_SECONDS:.0f} seconds"
            self.error = ApiError(408, message, None, "body_too_slow")
            raise self.error from None
        if message["type"] == "http.request":
            n_new = len(message.get("body", b""))
            self.n_bytes += n_new
            self._held[0] += n_new
            self.is_whole = not message.get("more_body", False)
            if self.n_bytes > self._limit:
                self.error = _too_large(self._limit)
            elif self._held[0] > MAX_BODIES * self._limit:
                message = f"requests of {self._held[0]:,} bytes are under way: try again later"
                self.error = ApiError(429, message, None, "too_many_bytes", {"Retry-After": "1"})
            if self.error is not None:
                raise self.error
        return message


class Connection(H11Protocol):
    """A connection that is closed when its next request takes too long to begin, or when there are too many."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_idle:
            self._expect_request()
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        error = ApiError(400, "this is not HTTP/1.1, or its headers are too long", None, "bad_http").response()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        headers = [*error.raw_headers, (b"connection", b"close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=error.body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_request(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if self._is_idle and not self.transport.is_closing():
            self.transport.close()
