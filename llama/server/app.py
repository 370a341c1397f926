"""The endpoints: requests in, answers out, whole or streamed. When a client leaves, its answers are cancelled at once.

Knows nothing of how answers are made.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from llama import Llama
from llama.server.answers import Writer
from llama.server.driver import Driver, Ticket
from llama.server.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
    describe,
)
from llama.server.requests import Prepared, dialog_ids, prepare_chat, prepare_completion

Result = TypeVar("Result")
# How many requests are tokenized at a time: tokenizing takes memory, and time from the engine's thread.
PREPARED_AT_ONCE = 4
# The errors in FastAPI's OpenAPI document.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, text in {
        400: "The request is invalid; `param` names the field",
        401: "No key, or a wrong one",
        404: "There is no such model",
        408: "The body came too slowly",
        413: "The body is too large",
        429: "Too many answers are waiting",
        503: "The model is loading, or has failed",
        504: "The answer took too long",
    }.items()
}


class Service:
    """What the endpoints share.

    Args:
        driver: runs the engine.
        model: the model's name in requests.
        max_waiting: how many answers may wait for a slot.
        timeout: seconds a request may take; None for no limit.
        log: called with each request and each answer; None logs neither.
    """

    def __init__(
        self,
        driver: Driver,
        model: str,
        max_waiting: int,
        timeout: float | None,
        log: Callable[[str], None] | None = None,
    ):
        self.driver, self.model, self.max_waiting, self.timeout, self.log = driver, model, max_waiting, timeout, log
        self.created = int(time.time())
        self.stopping = False
        self._open: set[Ticket] = set()
        self._preparing = CapacityLimiter(PREPARED_AT_ONCE)

    @property
    def llama(self) -> Llama:
        """The model. Raises ApiError while it loads, when the engine has failed, and when the server stops."""
        if self.driver.failure is not None:
            raise ApiError(503, f"the engine has failed: {self.driver.failure}", None, "engine_failed")
        if self.driver.llama is None:
            raise ApiError(503, "the model is loading", None, "loading", {"Retry-After": "2"})
        if self.stopping:
            raise ApiError(503, "the server is stopping", None, "stopping", {"Retry-After": "5"})
        return self.driver.llama

    @property
    def capacity(self) -> int:
        """How many answers may be open: those in the slots, and those that wait."""
        return self.llama.args.max_batch_size + self.max_waiting

    @property
    def n_open(self) -> int:
        return sum(len(ticket.sequences) - len(ticket.ended) for ticket in self._open)

    def check_model(self, model: str | None) -> None:
        """Raises ApiError if the model is not ready, or the request names another one."""
        if self.llama and model not in (None, self.model):
            message = f"there is no model {model[:200]!r}: this server has {self.model!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def check_room(self, n_more: int = 1) -> None:
        """Raises ApiError if `n_more` answers are more than there is room for."""
        if self.n_open + n_more > self.capacity:
            message = f"{self.n_open} answers are running or waiting, of at most {self.capacity}: try again later"
            raise ApiError(429, message, None, "queue_full", {"Retry-After": "1"})

    async def in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs a function in a worker thread, for what may take a while. At most PREPARED_AT_ONCE run at a time."""
        return await to_thread.run_sync(function, *arguments, limiter=self._preparing)

    def open(self, ticket: Ticket) -> None:
        """Hands a ticket to the engine. Raises ApiError if too many wait."""
        self.check_room(len(ticket.sequences))
        self._open.add(ticket)
        self.driver.add(ticket)

    def close(self, ticket: Ticket) -> None:
        """Forgets a ticket, and cancels its answers that have not ended."""
        self._open.discard(ticket)
        if not ticket.is_done:
            self.driver.cancel(ticket)

    def fail_all(self, reason: str) -> None:
        for ticket in self._open:
            ticket.fail(reason)

    async def news(self, ticket: Ticket, deadline: float | None) -> None:
        """Waits for a ticket's next report. Raises ApiError if the ticket fails or the deadline passes."""
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            await asyncio.wait_for(ticket.news.wait(), seconds)
        except asyncio.TimeoutError:
            raise ApiError(504, f"the answer took longer than {self.timeout:g} s", None, "timeout") from None
        ticket.news.clear()
        if ticket.failure is not None and not ticket.is_done:
            raise ApiError(503, ticket.failure, None, "engine_failed")

    def deadline(self) -> float | None:
        return None if self.timeout is None else time.monotonic() + self.timeout


def make_app(service: Service) -> FastAPI:
    """Makes the FastAPI application."""
    app = FastAPI(title="llama", description="OpenAI's interface to one Llama model.", openapi_url="/openapi.json")
    app.include_router(_routes(service))

    def answer_with(error: ApiError) -> Response:
        service.driver.metrics.refused.labels(error.status).inc()
        return error.response()

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return answer_with(error)

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> Response:
        return answer_with(describe(error))

    @app.exception_handler(HTTPException)
    async def translate(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI raises this when JSON is nested too deep
            return answer_with(ApiError(400, "the body cannot be parsed as JSON", None, "invalid_json"))
        return answer_with(ApiError(error.status_code, str(error.detail), None, None, dict(error.headers or {})))

    return app


def _routes(service: Service) -> APIRouter:
    router = APIRouter(responses=ERRORS)

    @router.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        """Answers a dialog, like OpenAI's `chat.completions`."""
        return await _answer(service, body, request, prepare_chat)

    @router.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Any:
        """Continues texts, like OpenAI's `completions`."""
        return await _answer(service, body, request, prepare_completion)

    @router.get("/v1/models")
    def models() -> Any:
        """Lists the one model."""
        service.check_model(None)
        return {"object": "list", "data": [_model(service)]}

    @router.get("/v1/models/{name:path}")
    def model(name: str) -> Any:
        """Describes the model; any other name is a 404."""
        service.check_model(name)
        return _model(service)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Any:
        """The ids of a text or a dialog."""
        service.check_model(body.model)
        return await service.in_thread(_tokenize, service.llama, body)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Any:
        """The text of ids."""
        service.check_model(body.model)
        return await service.in_thread(_detokenize, service.llama, body)

    @router.get("/tokenizer_info")
    def tokenizer_info() -> Any:
        """The texts of the tokens that begin and end a text, for lm-evaluation-harness."""
        tokenizer = service.llama.tokenizer
        names = {token: name for name, token in tokenizer.special_tokens.items()}
        return {"bos_token": names.get(tokenizer.bos_id), "eos_token": names.get(tokenizer.eos_id), "pad_token": None}

    @router.get("/health")
    def health() -> Any:
        """Whether requests are answered: 503 while the model is loading, and when the engine has failed."""
        service.check_model(None)
        return {"status": "ok"}

    @router.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.driver.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _model(service: Service) -> dict[str, Any]:
    description = {"id": service.model, "object": "model", "created": service.created, "owned_by": "llama"}
    return description | {"max_model_len": service.llama.args.max_seq_len}


def _tokenize(llama: Llama, body: TokenizeRequest) -> Response:
    if body.messages is not None:
        ids = dialog_ids(llama, body.messages)
    else:
        try:
            ids = llama.tokenizer.encode(body.prompt, bos=body.add_special_tokens)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from None
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": llama.args.max_seq_len})


def _detokenize(llama: Llama, body: DetokenizeRequest) -> Response:
    try:
        return JSONResponse({"prompt": llama.tokenizer.decode(body.tokens)})
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), "tokens") from None


async def _answer(
    service: Service, body: Sampling, request: Request, prepare: Callable[[Llama, Any, int], Prepared]
) -> Response:
    llama = service.llama
    service.check_model(body.model)
    service.check_room(body.n)  # before the prompt is tokenized
    prepared = await service.in_thread(prepare, llama, body, service.capacity)
    if service.log is not None:
        service.log(f"request {body.model_dump_json(exclude_unset=True)}")
    is_chat = isinstance(body, ChatRequest)
    usage = body.stream_options is not None and body.stream_options.include_usage
    writer = Writer(llama, prepared, service.model, is_chat, usage)
    deadline = service.deadline()
    if body.stream:
        service.open(prepared.ticket)  # raises here, before the stream begins
        return _Events(service, prepared.ticket, _stream(service, prepared.ticket, writer, deadline))
    return await _whole(service, prepared.ticket, writer, deadline, request)


async def _whole(
    service: Service, ticket: Ticket, writer: Writer, deadline: float | None, request: Request
) -> Response:
    """Waits until all answers have ended, or the client has left."""
    service.open(ticket)
    try:
        async with _disconnection(request) as gone:
            while not ticket.is_done:
                news = asyncio.ensure_future(service.news(ticket, deadline))
                await _wait_for_either(news, gone)
                if gone.done():
                    return Response(status_code=499)  # nobody reads it
                await news
    finally:
        service.close(ticket)
    response = writer.whole()
    if service.log is not None:
        service.log(f"answer {json.dumps(response, ensure_ascii=False)}")
    return JSONResponse(response)


class _Events(StreamingResponse):
    """A stream of events. Closes its ticket at the end, and also if the client leaves before the stream begins."""

    def __init__(self, service: Service, ticket: Ticket, events: AsyncIterator[str]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._service, self._ticket = service, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.close(self._ticket)


async def _stream(service: Service, ticket: Ticket, writer: Writer, deadline: float | None) -> AsyncIterator[str]:
    """The events of a stream. Starlette cancels it when the client leaves."""
    try:
        for chunk in writer.first_chunks():
            yield _event(chunk, service.log)
        while not ticket.is_done:
            await service.news(ticket, deadline)
            for chunk in writer.chunks():
                yield _event(chunk, service.log)
        for chunk in writer.last_chunks():
            yield _event(chunk, service.log)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)


def _event(content: dict[str, Any], log: Callable[[str], None] | None = None) -> str:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    if log is not None:
        log(f"chunk {text}")
    return f"data: {text}\n\n"


@contextlib.asynccontextmanager
async def _disconnection(request: Request) -> AsyncIterator[asyncio.Future]:
    """A future that is done once the client has left."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(wait())
    try:
        yield gone
    finally:
        gone.cancel()


async def _wait_for_either(news: asyncio.Future, gone: Awaitable) -> None:
    """Waits until one of the two is done, and cancels `news` if it is not."""
    try:
        await asyncio.wait({news, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not news.done():
            news.cancel()
