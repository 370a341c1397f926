"""A model over HTTP: OpenAI's interface and a web chat, on the same engine as every other call.

The files, from the ground up: `settings`, `protocol` (the fields of a request, and errors), `driver` (the thread that
runs the engine), `requests` (turns a request into prompts and options), `answers` (turns tokens into JSON), `limits`
(keys, sizes, slow clients), `app` (the endpoints), `webchat`, and `start` (addresses, signals, exit code). Knows
nothing of how tokens are chosen.
"""

from collections.abc import Callable

from llama import Llama
from llama.server.settings import Settings

__all__ = ["Settings", "serve"]


def serve(load: Callable[[], Llama], settings: Settings, name: str) -> None:
    """Serves a model until SIGTERM or Ctrl-C; ends the process with exit code 1 if the engine fails.

    Args:
        load: builds the model; called on every rank.
        settings: the address, the keys and the limits.
        name: the model's name, unless the settings have one.

    Raises:
        ImportError: the extra `serve` is not installed.
        OSError: the server cannot listen on the address.
    """
    try:
        from llama.server.start import run
    except ImportError as error:
        raise ImportError(f"a library of the server is missing ({error}): pip install '.[serve]'") from error
    run(load, settings, name)
