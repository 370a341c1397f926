"""The command that answers over HTTP: serve."""

from dataclasses import dataclass
from pathlib import Path

from llama import server
from llama.cli.arguments import Loading


@dataclass(frozen=True)
class ServerLoading(Loading):
    """How the model is loaded."""

    max_batch_size: int = 8  # how many answers are decoded at a time


def serve(settings: server.Settings, loading: ServerLoading) -> None:
    """Answers over HTTP, by OpenAI's interface, and with a web chat at /. docs/server.md has the rest.

    Under torchrun the model is split over all processes, and rank 0 listens.
    """
    settings.check()
    name = "llama-demo" if loading.ckpt_dir is None else Path(loading.ckpt_dir).resolve().name
    server.serve(loading.build, settings, name)
