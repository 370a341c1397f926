"""A model over HTTP: the interface of OpenAI and a web chat, on the engine that everything else uses.

The files, from the ground up: `settings`, `protocol` (what a request may say, and how an error looks), `driver` (the
thread that runs the engine), `requests` (from a request to prompts and options), `answers` (from tokens to JSON),
`limits` (keys, sizes, slow clients), `app` (the endpoints), `webchat`, and `start` (addresses, signals, exit code).
Knows nothing of how tokens are chosen.
"""

from collections.abc import Callable

from llama import Llama
from llama.server.settings import Settings

__all__ = ["Settings", "serve"]


def serve(load: Callable[[], Llama], settings: Settings, name: str) -> None:
    """Serves a model until SIGTERM or Ctrl-C; ends the process with exit code 1 if the engine fails.

    Args:
        load: builds the model; called on every rank.
        settings: see there.
        name: what the model is called, if the settings do not say.

    Raises:
        ImportError: the extra `serve` is not installed.
        OSError: the address cannot be listened on.
    """
    try:
        from llama.server.start import run
    except ImportError as error:
        raise ImportError(f"the server's libraries are not all here ({error}): pip install '.[serve]'") from error
    run(load, settings, name)
