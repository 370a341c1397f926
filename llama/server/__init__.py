"""A model over HTTP: the interface of OpenAI and a web chat, on the engine that everything else uses.

`serve` starts it. The files, from the ground up: `protocol` (what a request may say, and how an error looks), `driver`
(the thread that runs the engine), `requests` (from a request to prompts and options), `answers` (from tokens to JSON),
`limits` (keys, sizes, slow clients), `app` (the endpoints), `webchat`, and `serve` (start, signals, exit code). Knows
nothing of how tokens are chosen.
"""

from llama.server.serve import Settings, serve

__all__ = ["Settings", "serve"]
