"""The web chat at /: a NiceGUI page, mounted on the application. All that the page loads is in NiceGUI's wheel.

Each browser tab has one conversation, which survives a reload of the page. Answers come through the driver, as for
every other client. A Content-Security-Policy lets the page load from this server only. Without NiceGUI, the page says
what to install. Knows nothing of how tokens are chosen.
"""

import secrets
import time
import warnings
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server.answers import Choice
from llama.server.app import Service
from llama.server.protocol import ApiError, ChatRequest
from llama.server.requests import Prepared, prepare_chat

# Vue compiles the page's templates in the browser, which needs 'unsafe-eval'; nothing comes from another host.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
STYLE = """
.nicegui-content { align-items: center; }
.chat { max-width: 48rem; width: 100%; min-width: 0; }
.turn { width: 100%; min-width: 0; gap: 0; }
.turn.user { flex-direction: row-reverse; align-items: center; }
.tools { align-items: center; gap: .25rem; }
.turn .content { max-width: 100%; min-width: 0; overflow-wrap: anywhere; line-height: 1.6; }
.turn.user .content { max-width: 85%; padding: .5rem 1rem; border-radius: 1rem; background: rgba(25, 118, 210, .14); }
.turn .content > :first-child { margin-top: 0; }
.turn .content > :last-child { margin-bottom: 0; }
.turn.stale { opacity: .4; }
.turn :is(h1, h2, h3, h4, h5, h6) { font-size: 1.15rem; font-weight: 600; line-height: 1.4; margin: 1rem 0 .5rem; }
.turn h1 { font-size: 1.35rem; }
.turn pre { overflow-x: auto; padding: .75rem 1rem; border-radius: .5rem; background: rgba(127, 127, 127, .13); }
.turn table { display: block; max-width: 100%; overflow-x: auto; overflow-wrap: normal; }
.turn .q-btn { min-width: 2.5rem; min-height: 2.5rem; opacity: .8; }
.body--dark .turn :is(a, .q-icon) { color: #8ab4f8; }
.note { opacity: .7; font-size: .8rem; }
.empty { width: 100%; margin-top: 22vh; align-items: center; text-align: center; opacity: .8; }
.model-name { min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.q-footer { background: #fff; color: inherit; }
.body--dark .q-footer { background: #121212; }
"""
KEYS = "Enter sends, Shift+Enter begins a new line, Escape stops an answer."
# Seconds between two drawings of a growing answer.
REDRAW = 0.05


def add_web_chat(app: FastAPI, service: Service) -> None:
    """Adds the chat at / to the application, or without NiceGUI a hint."""
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

    # NiceGUI inspects all objects when it starts, and one of PyTorch's warns when it is inspected.
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_op`", FutureWarning)
    ui.run_with(
        app,
        title=service.model,
        dark=None,
        tailwind=False,
        storage_secret=secrets.token_hex(),
        show_welcome_message=False,
    )


class Policy:
    """Adds the policy to every page but FastAPI's /docs, which loads its script from another host."""

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
    """The conversation of one tab, and the page that shows it."""

    def __init__(self, service: Service):
        from nicegui import app, ui

        self._ui, self._service = ui, service
        self._state: dict[str, Any] = app.storage.tab
        defaults = {"messages": [], "system": "", "temperature": 0.6, "seed": None, "max_tokens": None, "dark": None}
        for name, value in defaults.items():
            self._state.setdefault(name, value)
        self._busy = self._stopped = False
        self._n_chats = 0  # how often "New chat" was pressed on this page
        self._editing: int | None = None  # the index of the message that the next one sent replaces
        self._ticket: Any = None
        self._client = ui.context.client
        self._client.on_disconnect(self.stop)

    def draw(self) -> None:
        """The whole page."""
        ui, state = self._ui, self._state
        self._dark = ui.dark_mode(None).bind_value(state, "dark")
        ui.colors(primary="#1a64a8")
        with ui.header().classes("items-center no-wrap"):
            ui.label(self._service.model).classes("text-h6 model-name")
            ui.space()
            with ui.button(icon="add", on_click=self.new).props(
                'flat color=white no-wrap no-caps aria-label="New chat"'
            ):
                ui.label("New chat").classes("gt-xs")  # not on a phone
            ui.button(icon="contrast", on_click=self.switch_dark).props('flat color=white aria-label="Dark or light"')
            ui.button(icon="tune", on_click=lambda: drawer.toggle()).props('flat color=white aria-label="Settings"')
        with ui.right_drawer(value=False).props("overlay bordered") as drawer:
            with ui.row().classes("tools full-width"):
                ui.label("Settings").classes("text-h6 col")
                ui.button(icon="close", on_click=drawer.hide).props('flat round aria-label="Close settings"')
            ui.textarea("System prompt").bind_value(state, "system").props("outlined autogrow").classes("full-width")
            ui.number("Temperature", min=0, max=5, step=0.1).bind_value(state, "temperature").classes("full-width")
            ui.number("Seed (empty: another each time)", precision=0).bind_value(state, "seed").classes("full-width")
            ui.number("Longest answer, tokens", min=1, precision=0).bind_value(state, "max_tokens").classes(
                "full-width"
            )
        drawer.on("keydown.escape", drawer.hide)
        self._list = ui.column().classes("chat").props('role=log aria-live=polite aria-label="Conversation"')
        with ui.footer(), ui.column().classes("chat").style("margin: 0 auto; gap: .25rem"):
            self._hint = ui.label("Sending replaces what is dimmed. Escape keeps it.").classes("note")
            with ui.row().classes("full-width no-wrap items-end"):
                self._input = ui.textarea(placeholder="Ask something").props(
                    'outlined autogrow autofocus aria-label="Message" input-style="max-height: 12rem"'
                )
                self._input.classes("col").on("keydown.enter.exact.prevent", self.send)
                self._input.on("keydown.escape", self.escape)
                self._send = ui.button(icon="send", on_click=self.send).props('round size=1.1rem aria-label="Send"')
                self._stop = ui.button(icon="stop", on_click=self.stop)
                self._stop.props('round size=1.1rem color=negative aria-label="Stop"')
        self._redraw()

    async def switch_dark(self) -> None:
        """Switches between dark and light. Until it is first called, the page follows the system."""
        if (is_dark := self._dark.value) is None:
            is_dark = await self._client.run_javascript("matchMedia('(prefers-color-scheme: dark)').matches")
        self._dark.value = not is_dark

    def _redraw(self) -> None:
        """Draws the messages, each with its buttons."""
        ui, messages = self._ui, self._state["messages"]
        self._list.clear()
        self._send.set_visibility(not self._busy)
        self._stop.set_visibility(self._busy)
        self._hint.set_visibility(self._editing is not None)
        with self._list:
            if not messages:
                with ui.column().classes("empty"):
                    ui.label(f"Ask {self._service.model}").classes("text-h5")
                    ui.label(KEYS).classes("note")
            for index, message in enumerate(messages):
                is_stale = self._editing is not None and index >= self._editing
                with ui.column().classes(f"turn {message['role']}" + (" stale" if is_stale else "")):
                    ui.markdown(message["content"]).classes("content")
                    with ui.row().classes("tools"):
                        if message["role"] == "user":
                            button = ui.button(icon="edit", on_click=lambda index=index: self.edit(index))
                            button.props('flat round dense size=sm aria-label="Edit"')
                        else:
                            ui.label(message.get("note", "")).classes("note")
                            button = ui.button(icon="refresh", on_click=lambda index=index: self.regenerate(index))
                            button.props('flat round dense size=sm aria-label="Regenerate"')
                        button.set_enabled(not self._busy)
        self._scroll("true")

    def _scroll(self, condition: str = "h - innerHeight - scrollY < 300") -> None:
        """Shows the end of the conversation, unless the user is reading further up."""
        # Not `ui.run_javascript`, which needs the clicked button: a redraw may have removed it.
        self._client.run_javascript(f"const h = document.body.scrollHeight; if ({condition}) scrollTo(0, h)")

    def new(self) -> None:
        """Starts an empty conversation."""
        self.stop()
        self._n_chats += 1
        self._state["messages"], self._editing = [], None
        self._redraw()
        self._input.run_method("focus")

    def stop(self) -> None:
        """Stops the answer."""
        self._stopped = True
        if self._ticket is not None:
            self._ticket.news.set()

    def escape(self) -> None:
        """Stops the answer, and leaves a message that is being edited as it was."""
        self.stop()
        if self._editing is not None:
            self._editing = None
            self._input.set_value("")
            self._redraw()

    async def send(self) -> None:
        """Sends what was typed."""
        text = (self._input.value or "").strip()
        if text and not self._busy:
            self._input.set_value("")
            earlier = self._state["messages"][: self._editing]
            self._state["messages"], self._editing = [*earlier, {"role": "user", "content": text}], None
            await self._answer()

    def edit(self, index: int) -> None:
        """Puts a message back into the field. Sending replaces it and all that came after it."""
        if not self._busy:
            self._editing = index
            self._input.set_value(self._state["messages"][index]["content"])
            self._redraw()
            self._input.run_method("focus")

    async def regenerate(self, index: int) -> None:
        """Replaces an answer, and all that came after it, with a new answer."""
        if not self._busy:
            self._state["messages"], self._editing = self._state["messages"][:index], None
            await self._answer()

    async def _answer(self) -> None:
        """Asks the model, and draws the answer while it grows."""
        ui = self._ui
        self._busy, self._stopped = True, False
        self._redraw()
        with self._list, ui.column().classes("turn assistant"):
            drawn = ui.markdown("…").classes("content streaming")
        text, note, chat = "", "", self._n_chats
        try:
            text, note = await self._ask(drawn)
        except ApiError as error:
            with self._list:
                ui.notify(error.message, type="negative", multi_line=True)
        finally:
            self._busy, self._ticket = False, None
        if (text or note) and chat == self._n_chats:
            self._state["messages"] = [
                *self._state["messages"],
                {"role": "assistant", "content": text, "note": note},
            ]
        self._redraw()

    async def _ask(self, drawn: Any) -> tuple[str, str]:
        """The answer, and a note on it."""
        service = self._service
        llama = service.llama
        prepared: Prepared = await service.in_thread(prepare_chat, llama, self._request(), service.capacity)
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
                    drawn.set_content(_close_code_block(text) or "…")
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


def _close_code_block(text: str) -> str:
    """Ends a code block that is still open, so that a growing answer renders as Markdown."""
    return text + "\n```" if text.count("```") % 2 else text
