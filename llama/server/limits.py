"""Protects the server from its clients: keys, the size of bodies, and deadlines for slow or silent connections.

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

# A request's headers must arrive within this time after the connection opened or its last response ended.
HEADER_SECONDS = 10.0
BODY_SECONDS = 60.0  # for the body, after the headers
# How long the server still reads a body that it has refused, so that the client sees why.
LINGER_SECONDS = 5.0
MAX_CONNECTIONS = 2000
# The bodies of all open requests together may be as large as this many bodies of the largest size.
MAX_BODIES = 32


class Keys:
    """The clients' keys, compared in constant time. Without any, every client may pass."""

    def __init__(self, keys: Collection[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allow(self, authorization: str) -> bool:
        """Whether a header is `Bearer KEY`, or a browser's `Basic` with the key as its password."""
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
    """Sees every request first: it needs a key, and its body must be neither too large nor too slow.

    Args:
        app: the application behind the gate.
        keys: one of them is needed for everything but /health.
        max_body: bytes.
        refused: the counter of refused requests, by status.
    """

    def __init__(self, app: ASGIApp, keys: Keys, max_body: int, refused: Any):
        self.app, self._keys, self._max_body, self._refused = app, keys, max_body, refused
        self._held = [0]  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] != "/health" and not self._keys.allow(headers.get(b"authorization", "")):
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
        if body.error is not None and not has_begun:  # whatever the application has answered
            await self._refuse(body.error, scope, receive, send, not body.is_whole)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send, is_more: bool = True) -> None:
        """Answers with an error, and closes the connection once the client has sent its body or LINGER_SECONDS pass."""
        self._refused.labels(error.status).inc()
        response = error.response()
        response.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        headers = dict(scope["headers"])
        # A client that is still sending would see a broken connection instead of the answer. One that sent `Expect:
        # 100-continue` has not begun to send.
        is_sending = is_more and (b"content-length" in headers or b"transfer-encoding" in headers)
        if is_sending and b"expect" not in headers:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_discard(receive), LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive) -> None:
    """Reads the rest of a body, and drops it."""
    while (await receive()).get("more_body"):
        pass


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is too large: expected at most {limit} bytes", None, "body_too_large")


class _Body:
    """A request's body while it arrives.

    Args:
        receive: ASGI's.
        limit: the most bytes of one body.
        held: bytes of the bodies of all requests; this body adds its own.

    Attributes:
        n_bytes: how many bytes have arrived.
        is_whole: whether all of it has arrived.
        error: what is wrong with it; `receive` raises it.
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
            message = f"the body took longer than {BODY_SECONDS:.0f} seconds"
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
                message = f"the open requests have {self._held[0]:,} bytes: try again later"
                self.error = ApiError(429, message, None, "too_many_bytes", {"Retry-After": "1"})
            if self.error is not None:
                raise self.error
        return message


class Connection(H11Protocol):
    """A connection. It is closed if its next request takes too long to arrive, or if there are too many connections."""

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
            self._timer = self.loop.call_later(HEADER_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        self._timer = None
        if self._is_idle and not self.transport.is_closing():
            self.transport.close()
