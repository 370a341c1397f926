"""How a server listens, and what it bears.

Needs none of the server's libraries, so that a command can list its options without them.
"""

import os
from dataclasses import dataclass
from pathlib import Path

KEY_VARIABLE = "LLAMA_API_KEY"


@dataclass
class Settings:
    """How a server listens, and what it bears.

    Attributes:
        host: the address to listen on.
        port: of TCP; 0 takes a free one.
        model_name: what requests call the model by; the name of the checkpoint's directory when left out.
        api_key: who sends one of these keys, separated by commas, is let in; LLAMA_API_KEY has them as well.
        api_key_file: a file with a key in each line.
        cors_origins: the web pages, separated by commas, that may call the server from a browser.
        max_waiting: how many answers may wait for a slot; more are refused (429).
        max_body: bytes of a request; larger ones are refused (413).
        timeout: seconds that a request may take.
        grace: seconds that running answers get when the server is stopped.
        no_web: leaves out the chat at /.
        log_content: whether prompts and answers are logged.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_key: str | None = None
    api_key_file: str | None = None
    cors_origins: str | None = None
    max_waiting: int = 256
    max_body: int = 8 * 2**20
    timeout: float | None = None
    grace: float = 30.0
    no_web: bool = False
    log_content: bool = False

    def __post_init__(self):
        """Raises ValueError or OSError before anything is loaded."""
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port < 65536:
            raise ValueError(f"port = {self.port!r}: expected an integer from 0 to 65535")
        for name, least in (("max_waiting", 0), ("max_body", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} = {value!r}: expected an integer of at least {least}")
        for name in ("timeout", "grace"):
            value = getattr(self, name)
            if not (value is None and name == "timeout") and not (isinstance(value, (int, float)) and value >= 0):
                raise ValueError(f"{name} = {value!r}: expected a number of seconds")
        self.keys()

    def keys(self) -> list[str]:
        """The keys of all three places."""
        lines = (self.api_key or "").split(",") + os.environ.get(KEY_VARIABLE, "").split(",")
        if self.api_key_file is not None:
            lines += Path(self.api_key_file).read_text().splitlines()
        keys = [line.strip() for line in lines if line.strip()]
        if not keys and (self.api_key is not None or self.api_key_file is not None):
            raise ValueError("api_key, api_key_file: expected at least one key that is not empty")
        return keys
