"""The web chat at /."""

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from llama.server.app import Service


def add_web_chat(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    def hint() -> PlainTextResponse:
        return PlainTextResponse("The web chat needs NiceGUI: pip install 'llama[web]'. The interface is at /docs.\n")
