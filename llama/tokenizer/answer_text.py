"""The text of an answer while its tokens arrive: whole characters only, and no part of a stop string.

Knows nothing of how the tokens are chosen.
"""

import codecs
from bisect import bisect_right

from llama.tokenizer import Tokenizer


class AnswerText:
    """Turns the tokens of one answer into text.

    Args:
        tokenizer: the model's.
        stops: the answer ends where the first of these strings begins, even in the middle of a token.
        before: ids that precede the answer and belong to the text, such as an echoed prompt.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str], before: list[int] | None = None):
        self._tokenizer = tokenizer
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tokens = list(before or [])  # kept until they have text
        self._text = ""
        self._stopped = False
        self._ends: list[int] = []  # the length of the text after each token of the answer
        if before:
            self._text = self._decoder.decode(tokenizer.decode_bytes(before))
        self._start = len(self._text)

    def follow(self, tokens: list[int]) -> bool:
        """Adds the new ones of `tokens`, all tokens of the answer so far. True once a stop string is complete."""
        for token in tokens[len(self._ends) :]:
            self.push(token)
        return self._stopped

    def push(self, token: int) -> None:
        """Adds the next token."""
        if self._text:
            new = self._tokenizer.token_bytes(token)
        else:  # the first token of a Llama 2 text loses its space
            self._tokens.append(token)
            new = self._tokenizer.decode_bytes(self._tokens)[len(self._tokenizer.decode_bytes(self._tokens[:-1])) :]
        self._extend(self._decoder.decode(new))

    def _extend(self, new: str) -> None:
        longest = max(map(len, self._stops), default=0)
        search_from = max(self._start, len(self._text) - longest + 1)
        self._text += new
        self._ends.append(len(self._text) + bool(self._decoder.getstate()[0]))  # a begun character counts too
        found = [at for stop in self._stops if (at := self._text.find(stop, search_from)) >= 0]
        if found:
            self._text, self._stops, self._stopped = self._text[: min(found)], [], True

    @property
    def decided(self) -> str:
        """The text that no later token can change. It leaves out an end that may begin a stop string."""
        held = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(self._text) - self._start), held, -1):
                if self._text.endswith(stop[:n]):
                    held = n
                    break
        return self._text[: len(self._text) - held]

    def finish(self) -> str:
        """The whole text, after the last token. An incomplete character becomes U+FFFD."""
        if not self._stopped:
            self._text += self._decoder.decode(b"", final=True)
        return self._text

    @property
    def n_tokens(self) -> int:
        """How many tokens lie wholly in the text; those of a stop string do not."""
        return bisect_right(self._ends, len(self._text))

    @property
    def n_decided_tokens(self) -> int:
        """How many tokens lie wholly in the decided text."""
        return bisect_right(self._ends, len(self.decided))
