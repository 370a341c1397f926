"""How a server listens, and what it allows its clients.

Needs none of the server's libraries, so a command can list its options without them.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

KEY_VARIABLE = "LLAMA_API_KEY"


@dataclass(frozen=True)
class Settings:
    """How the server listens, and what it refuses."""

    host: str = "127.0.0.1"  # the address to listen on
    port: int = 8000  # the TCP port; 0 takes a free one
    model_name: str | None = None  # the model's name in requests; the name of its directory when left out
    api_key: str | None = None  # keys that clients may use, separated by commas; LLAMA_API_KEY adds to them
    api_key_file: str | None = None  # a file with one key per line
    cors_origins: str | None = None  # origins of web pages that may call the server, separated by commas
    max_waiting: int = 256  # how many answers may wait for a slot; more are refused with 429
    max_body: int = 8 * 2**20  # the most bytes of a request's body; larger ones are refused with 413
    timeout: float | None = None  # seconds that a request may take; no limit when left out
    grace: float = 30.0  # seconds that running answers get when the server is stopped
    no_web: bool = False  # leaves out the chat at /
    log_content: bool = False  # writes prompts and answers to the log

    def check(self) -> None:
        """Raises ValueError if a setting is out of range, OSError if the file of keys cannot be read."""
        for name, least, most in (("port", 0, 65535), ("max_waiting", 0, 10**6), ("max_body", 1, 2**40)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} = {value!r}: expected an integer from {least} to {most}")
        for name in ("timeout", "grace"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not (value is None and name == "timeout") and not (is_number and value >= 0):
                raise ValueError(f"{name} = {value!r}: expected a number of seconds, at least 0")
        self.keys()

    def keys(self) -> list[str]:
        """The keys from all three sources. Raises OSError or ValueError if a source is named and there is no key."""
        lines = [*(self.api_key or "").split(","), *os.environ.get(KEY_VARIABLE, "").split(",")]
        if self.api_key_file is not None:
            lines += Path(self.api_key_file).read_text().splitlines()
        keys = [line.strip() for line in lines if line.strip()]
        sources = [name for name in ("api_key", "api_key_file") if getattr(self, name) is not None]
        if KEY_VARIABLE in os.environ:
            sources.append(KEY_VARIABLE)
        if not keys and sources:
            raise ValueError(f"{' and '.join(sources)}: expected at least one key that is not empty")
        return keys
