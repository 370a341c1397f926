"""The web chat at /: a page of NiceGUI's, mounted on the application, with everything that it loads in NiceGUI's wheel.

Each browser tab has a conversation, which outlives a reload of the page. Its answers come through the driver, as those
of every other client. A Content-Security-Policy holds the page to this server. Without NiceGUI, the page says what to
install. Knows nothing of how tokens are chosen.
"""

import secrets
import time
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server.answers import Choice
from llama.server.app import Service
from llama.server.protocol import ApiError, ChatRequest
from llama.server.requests import Prepared, prepare_chat

# Vue compiles the page's templates in the browser, which takes 'unsafe-eval'; nothing comes from another host.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
STYLE = """
.chat { max-width: 52rem; margin: 0 auto; width: 100%; }
.turn { width: 100%; padding: .25rem .75rem; border-radius: .75rem; overflow-wrap: anywhere; }
.turn.user { background: rgba(25, 118, 210, .12); }
.turn pre { overflow-x: auto; }
.note { opacity: .8; font-size: .8rem; }
.q-footer { background: #fff; color: inherit; }
.body--dark .q-footer { background: #121212; }
"""
# How often, seconds, a growing answer is drawn.
REDRAW = 0.05


def add_web_chat(app: FastAPI, service: Service) -> None:
    """Puts the chat at / of the application, or a hint at what is missing."""
    try:
        from nicegui import ui
    except ImportError:

        @app.get("/", include_in_schema=False)
        def hint() -> PlainTextResponse:
            return PlainTextResponse("The web chat needs NiceGUI: pip install '.[web]'. The interface is at /docs.\n")

        return

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"], include_in_schema=False)
    def nothing(rest: str) -> None:
        raise ApiError(404, f"there is no /v1/{rest[:200]} for this method", None, "not_found")

    @ui.page("/", title=service.model)
    async def page() -> None:
        ui.add_css(STYLE)
        await ui.context.client.connected()
        Chat(service).draw()

    ui.run_with(
        app,
        title=service.model,
        dark=None,
        tailwind=False,
        storage_secret=secrets.token_hex(),
        show_welcome_message=False,
    )


class Policy:
    """Adds the policy to every page but FastAPI's own /docs, which loads its script from where FastAPI wants it."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        is_bare = scope["type"] != "http" or scope["path"].startswith(("/docs", "/redoc", "/v1/"))
        await self.app(scope, receive, send if is_bare else send_with_policy)


class Chat:
    """The conversation of one tab, and what is drawn of it."""

    def __init__(self, service: Service):
        from nicegui import app, ui

        self._ui, self._service = ui, service
        self._state: dict[str, Any] = app.storage.tab
        defaults = {"messages": [], "system": "", "temperature": 0.6, "seed": None, "max_tokens": None}
        for name, value in defaults.items():
            self._state.setdefault(name, value)
        self._busy = self._stopped = False
        self._ticket: Any = None
        self._client = ui.context.client
        self._client.on_disconnect(self.stop)

    def draw(self) -> None:
        """The whole page."""
        ui, state = self._ui, self._state
        dark = ui.dark_mode(None)
        with ui.header().classes("items-center"):
            ui.label(self._service.model).classes("text-h6 model-name")
            ui.space()
            ui.button("New chat", icon="add", on_click=self.new).props('flat color=white aria-label="New chat"')
            ui.button(icon="contrast", on_click=lambda: dark.set_value(not dark.value)).props(
                'flat color=white aria-label="Dark or light"'
            )
            ui.button(icon="tune", on_click=lambda: drawer.toggle()).props('flat color=white aria-label="Settings"')
        with ui.right_drawer(value=False).props("overlay bordered") as drawer:
            ui.textarea("System prompt").bind_value(state, "system").props("outlined autogrow").classes("full-width")
            ui.number("Temperature", min=0, max=5, step=0.1).bind_value(state, "temperature").classes("full-width")
            ui.number("Seed (empty: another each time)", precision=0).bind_value(state, "seed").classes("full-width")
            ui.number("Longest answer, tokens", min=1, precision=0).bind_value(state, "max_tokens").classes(
                "full-width"
            )
        self._list = ui.column().classes("chat").props('role=log aria-live=polite aria-label="Conversation"')
        with ui.footer(), ui.row().classes("chat no-wrap items-end"):
            self._input = ui.textarea(placeholder="Ask something").props(
                'outlined autogrow autofocus aria-label="Message" input-style="max-height: 12rem"'
            )
            self._input.classes("col").on("keydown.enter.exact.prevent", self.send).on("keydown.escape", self.stop)
            self._send = ui.button(icon="send", on_click=self.send).props('round aria-label="Send"')
            self._stop = ui.button(icon="stop", on_click=self.stop).props('round color=negative aria-label="Stop"')
        self._redraw()

    def _redraw(self) -> None:
        """The messages, each with what can be done with it."""
        ui = self._ui
        self._list.clear()
        self._send.set_visibility(not self._busy)
        self._stop.set_visibility(self._busy)
        with self._list:
            for index, message in enumerate(self._state["messages"]):
                with ui.column().classes(f"turn {message['role']}"):
                    ui.markdown(message["content"]).classes("content")
                    with ui.row().classes("items-center"):
                        if message["role"] == "user":
                            button = ui.button(icon="edit", on_click=lambda index=index: self.edit(index))
                            button.props('flat dense size=sm aria-label="Edit"')
                        else:
                            ui.label(message.get("note", "")).classes("note")
                            button = ui.button(icon="refresh", on_click=lambda index=index: self.regenerate(index))
                            button.props('flat dense size=sm aria-label="Regenerate"')
                        button.set_enabled(not self._busy)
        self._scroll()

    def _scroll(self) -> None:
        """Shows the end of the conversation."""
        # Not `ui.run_javascript`: the button whose click led here may have been drawn over.
        self._client.run_javascript("window.scrollTo(0, document.body.scrollHeight)")

    def new(self) -> None:
        """Forgets the conversation."""
        self.stop()
        self._state["messages"] = []
        self._redraw()

    def stop(self) -> None:
        """Ends the answer where it is."""
        self._stopped = True
        if self._ticket is not None:
            self._ticket.news.set()

    async def send(self) -> None:
        """Asks what has been typed."""
        text = (self._input.value or "").strip()
        if text and not self._busy:
            self._input.set_value("")
            self._state["messages"] = [*self._state["messages"], {"role": "user", "content": text}]
            await self._answer()

    def edit(self, index: int) -> None:
        """Puts a message back into the field, and forgets all that came after it."""
        if not self._busy:
            self._input.set_value(self._state["messages"][index]["content"])
            self._state["messages"] = self._state["messages"][:index]
            self._redraw()
            self._input.run_method("focus")

    async def regenerate(self, index: int) -> None:
        """Answers once more, from there."""
        if not self._busy:
            self._state["messages"] = self._state["messages"][:index]
            await self._answer()

    async def _answer(self) -> None:
        """Asks the model, and draws the answer while it comes."""
        ui = self._ui
        self._busy, self._stopped = True, False
        self._redraw()
        with self._list, ui.column().classes("turn assistant"):
            drawn = ui.markdown("…").classes("content streaming")
        text, note = "", ""
        try:
            text, note = await self._ask(drawn)
        except ApiError as error:
            with self._list:
                ui.notify(error.message, type="negative", multi_line=True)
        finally:
            self._busy, self._ticket = False, None
        if text or note:
            self._state["messages"] = [
                *self._state["messages"],
                {"role": "assistant", "content": text, "note": note},
            ]
        self._redraw()

    async def _ask(self, drawn: Any) -> tuple[str, str]:
        """The answer, and a note on it."""
        service = self._service
        llama = service.llama
        prepared: Prepared = await run_in_threadpool(prepare_chat, llama, self._request(), service.capacity)
        ticket = self._ticket = prepared.ticket
        choice, text = Choice(llama, prepared, 0), ""
        first = last = drawn_at = time.monotonic()
        deadline = service.deadline()
        service.open(ticket)
        try:
            while not (ticket.is_done or self._stopped):
                await service.news(ticket, deadline)
                new, _ = choice.read(ticket.n_tokens[0], ticket.is_done)
                text += new
                last = time.monotonic()
                first = last if ticket.n_tokens[0] <= 1 else first
                if last - drawn_at > REDRAW:
                    drawn.set_content(text or "…")
                    self._scroll()
                    drawn_at = last
        finally:
            service.close(ticket)
        n_tokens = ticket.n_tokens[0]
        rate = f"{n_tokens} tokens" + (f", {(n_tokens - 1) / (last - first):.1f} tokens/s" if last > first else "")
        return text, rate + (", stopped" if self._stopped else "")

    def _request(self) -> ChatRequest:
        """The conversation as a request. Raises ApiError."""
        state = self._state
        system = [{"role": "system", "content": state["system"]}] if (state["system"] or "").strip() else []
        turns = [{"role": message["role"], "content": message["content"]} for message in state["messages"]]
        numbers = {name: int(state[name]) for name in ("seed", "max_tokens") if state[name] is not None}
        temperature = 0.0 if state["temperature"] is None else float(state["temperature"])
        body = {"messages": system + turns, "temperature": temperature, "top_p": 0.9, **numbers}
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            raise ApiError(400, str(error.errors()[0]["msg"])) from None
