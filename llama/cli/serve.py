"""The command that answers over HTTP: serve."""

from dataclasses import dataclass
from pathlib import Path

from llama import Llama, server
from llama.cli.arguments import Decoding, Loading


@dataclass(frozen=True)
class ServerLoading(Loading):
    """How the model is loaded."""

    max_batch_size: int = 8  # how many answers are decoded at a time

    def build(self, *arguments: Decoding | None) -> Llama:
        """As `Loading.build`. With `compile`, compiles the step before the first request."""
        llama = super().build(*arguments)
        for n_rows in {1, min(2, self.max_batch_size)} if self.compile else ():
            llama.generate([[0]] * n_rows, 3, temperature=0)
        return llama


def serve(settings: server.Settings, loading: ServerLoading) -> None:
    """Answers over HTTP, by OpenAI's interface, and with a web chat at /. See docs/server.md.

    Under torchrun the model is split over all processes, and rank 0 listens.
    """
    settings.check()
    name = "llama-demo" if loading.ckpt_dir is None else Path(loading.ckpt_dir).resolve().name
    server.serve(loading.build, settings, name)
