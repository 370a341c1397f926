"""Answers as OpenAI's JSON: whole responses, and the chunks of a stream.

A `Writer` writes the response to one request. It reads only tokens that the driver has reported. Knows nothing of HTTP.
"""

import codecs
import time
import uuid
from collections.abc import Iterator
from typing import Any

from llama import Llama
from llama.sequence import UNUSABLE_LOGITS, Sequence
from llama.server.protocol import ApiError
from llama.server.requests import Prepared
from llama.tokenizer.answer_text import AnswerText
from llama.tokenizer.tool_calls import AnswerReader

Object = dict[str, Any]


class Choice:
    """One answer while it is generated: its text, its log-probabilities, its tool call.

    Args:
        llama: the model that generates it.
        prepared: the request.
        index: which of the request's answers it is.
    """

    def __init__(self, llama: Llama, prepared: Prepared, index: int):
        self.index = index
        self._tokenizer, self._answerer = llama.tokenizer, llama.answerer
        self._sequence: Sequence = prepared.ticket.sequences[index]
        self._scored = prepared.ticket.sequences[index - index % prepared.n]  # the first of a prompt's answers
        self._stops = [stop for stop in self._sequence.options.stops if isinstance(stop, str)]
        prompt = self._sequence.prompt
        self._before = prompt[prompt[0] == self._tokenizer.bos_id :] if prepared.echo else []
        self._echoed = prompt if prepared.echo else []
        self._text = AnswerText(self._tokenizer, self._stops, self._before)
        self._reader = AnswerReader(prepared.tools) if prepared.tools else None
        self._n_sent = self._n_logprobs = 0
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._has_text = False
        self._top = self._sequence.options.top_logprobs
        self.finish_reason: str | None = None

    @property
    def text(self) -> str:
        """The whole text, once the answer has ended."""
        return self._text.finish()

    @property
    def has_call(self) -> bool:
        return self._reader is not None and self._reader.has_call

    def read(self, n_tokens: int, ended: bool) -> tuple[str, list[tuple[int, float | None, list | None]]]:
        """The new text, and its tokens with their log-probabilities.

        Args:
            n_tokens: how many tokens the answer has so far.
            ended: whether the answer has ended.

        Raises:
            ApiError: the answer has failed.
        """
        sequence = self._sequence
        if ended and sequence.error is not None:
            raise failed(sequence.error)
        if sequence.logprobs and len(self._scored.prompt_token_logprobs) < len(self._echoed):
            return "", []  # the echoed prompt comes first, and is not scored yet
        self._text.follow(sequence.tokens[:n_tokens])
        text = self._text.finish() if ended else self._text.decided
        new, self._n_sent = text[self._n_sent :], len(text)
        if ended:
            self.finish_reason = sequence.finish_reason
        if not sequence.logprobs:
            return new, []
        return new, list(self._logprobs(self._text.n_tokens if ended else self._text.n_decided_tokens))

    def _logprobs(self, n_whole: int) -> Iterator[tuple[int, float | None, list | None]]:
        """Id, log-probability and likeliest tokens of each new token, up to the answer's first `n_whole`."""
        n_echoed = len(self._echoed)
        for place in range(self._n_logprobs, n_echoed + n_whole):
            scored, i = (self._scored, place) if place < n_echoed else (self._sequence, place - n_echoed)
            is_prompt = place < n_echoed
            logprobs = scored.prompt_token_logprobs if is_prompt else scored.token_logprobs
            tops = scored.prompt_top_logprobs if is_prompt else scored.top_logprobs
            token = self._echoed[i] if is_prompt else scored.tokens[i]
            if is_prompt and i == 0:  # no token comes before it, so it has no log-probability
                yield token, None, None
            else:
                yield token, logprobs[i], tops[i] if self._top else None
        self._n_logprobs = n_echoed + n_whole

    def piece(self, token: int) -> tuple[str, bytes]:
        """The text and the bytes that the next token adds. Call it once for each token, in their order."""
        data = self._tokenizer.token_bytes(token)
        if data and not self._has_text:  # Llama 2 drops the space before a text's first word
            data = self._tokenizer.decode_bytes([token])
            self._has_text = token != self._tokenizer.bos_id
        return token_text(data), data

    def chat_logprobs(self, tokens: list[tuple[int, float | None, list | None]]) -> Object:
        """OpenAI's `logprobs` of a chat."""
        content = []
        for token, logprob, top in tokens:
            text, data = self.piece(token)
            entry: Object = {"token": text, "logprob": logprob, "bytes": list(data), "top_logprobs": []}
            for other, value in top or ():
                bytes_ = self._tokenizer.token_bytes(other)
                entry["top_logprobs"].append({"token": token_text(bytes_), "logprob": value, "bytes": list(bytes_)})
            content.append(entry)
        return {"content": content, "refusal": None}

    def text_logprobs(self, tokens: list[tuple[int, float | None, list | None]]) -> Object:
        """OpenAI's `logprobs` of a completion. The chosen token is always among `top_logprobs`."""
        shape: Object = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob, top in tokens:
            text, data = self.piece(token)
            shape["tokens"].append(text)
            shape["token_logprobs"].append(logprob)
            shape["text_offset"].append(self._offset)
            if logprob is not None or token != self._tokenizer.bos_id:  # a begin-of-text token is not echoed
                self._offset += len(self._decoder.decode(data))
            if logprob is None:
                shape["top_logprobs"].append(None)
            else:
                likeliest = {token_text(self._tokenizer.token_bytes(other)): value for other, value in top or ()}
                shape["top_logprobs"].append(likeliest | {token_text(self._tokenizer.token_bytes(token)): logprob})
        if not self._top:
            shape["top_logprobs"] = None
        return shape

    def events(self, new: str) -> list[tuple[str, str]]:
        """The parts of the new text, as `AnswerReader.read` returns them; without tools, all of it is text."""
        if self._reader is None:
            return [("text", new)] if new else []
        ended = self.finish_reason is not None
        return self._reader.read(self._text.finish() if ended else self._text.decided, ended)


def token_text(data: bytes) -> str:
    """A token as text; if it is not whole characters, its bytes, written as in OpenAI's reference."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def failed(reason: str) -> ApiError:
    """The error of an answer that failed: a 500 if the model or a step failed, else a 400."""
    return ApiError(500 if reason == UNUSABLE_LOGITS or reason.startswith("the step failed") else 400, reason)


class Writer:
    """Writes the response to one request.

    Args:
        llama: the model.
        prepared: the request.
        model: the model's name.
        is_chat: whether it is a chat request.
        include_usage: whether a stream ends with the usage.
    """

    def __init__(self, llama: Llama, prepared: Prepared, model: str, is_chat: bool, include_usage: bool = False):
        self._prepared, self._is_chat, self._include_usage = prepared, is_chat, include_usage
        self._choices = [Choice(llama, prepared, index) for index in range(len(prepared.ticket.sequences))]
        self._head: Object = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._chunk_head = self._head | ({"object": "chat.completion.chunk"} if is_chat else {})

    @property
    def usage(self) -> Object:
        """How many tokens the request has used."""
        sequences = self._prepared.ticket.sequences
        n_prompt = sum(map(len, self._prepared.prompts))
        n_answer = sum(self._prepared.ticket.n_tokens)
        n_cached = sum(sequence.n_cached for sequence in sequences[:: self._prepared.n])
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        }

    def whole(self) -> Object:
        """The whole response, once all answers have ended. Raises ApiError."""
        choices = []
        for choice in self._choices:
            new, tokens = choice.read(self._prepared.ticket.n_tokens[choice.index], ended=True)
            entry: Object = {"index": choice.index, "finish_reason": choice.finish_reason, "logprobs": None}
            events = choice.events(new)
            if self._is_chat:
                text = "".join(piece for kind, piece in events if kind == "text")
                entry["message"] = {"role": "assistant", "content": text, "refusal": None}
                if choice.has_call:
                    entry["finish_reason"] = "tool_calls"
                    name = next(piece for kind, piece in events if kind == "name")
                    arguments = "".join(piece for kind, piece in events if kind == "arguments")
                    call = {"id": _call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}
                    entry["message"] |= {"content": text or None, "tool_calls": [call]}
                elif not text and events:  # a call that was cut off
                    entry["message"]["content"] = choice.text
                if self._prepared.logprobs:
                    entry["logprobs"] = choice.chat_logprobs(tokens)
            else:
                entry["text"] = new
                if self._prepared.logprobs:
                    entry["logprobs"] = choice.text_logprobs(tokens)
            choices.append(entry)
        return self._head | {"choices": choices, "usage": self.usage}

    def first_chunks(self) -> Iterator[Object]:
        """The first chunks of a stream: in a chat, the role of each answer."""
        if self._is_chat:
            for choice in self._choices:
                yield self._chunk(choice.index, {"role": "assistant", "content": ""})

    def chunks(self) -> Iterator[Object]:
        """What is new in each answer. Raises ApiError."""
        ticket = self._prepared.ticket
        for choice in self._choices:
            if choice.finish_reason is not None:
                continue
            new, tokens = choice.read(ticket.n_tokens[choice.index], choice.index in ticket.ended)
            reason = choice.finish_reason
            if self._is_chat:
                logprobs = choice.chat_logprobs(tokens) if self._prepared.logprobs and tokens else None
                for kind, piece in choice.events(new):
                    yield self._chunk(choice.index, _delta(kind, piece), None, logprobs)
                    logprobs = None
                if logprobs is not None:
                    yield self._chunk(choice.index, {}, None, logprobs)
                if reason is not None:
                    yield self._chunk(choice.index, {}, "tool_calls" if choice.has_call else reason)
            elif new or tokens or reason is not None:
                logprobs = choice.text_logprobs(tokens) if self._prepared.logprobs else None
                entry = {"index": choice.index, "text": new, "logprobs": logprobs, "finish_reason": reason}
                yield self._with_usage(self._chunk_head | {"choices": [entry]})

    def last_chunks(self) -> Iterator[Object]:
        """The last chunks of a stream: the usage, if the client wants it."""
        if self._include_usage:
            yield self._chunk_head | {"choices": [], "usage": self.usage}

    def _chunk(self, index: int, delta: Object, reason: str | None = None, logprobs: Object | None = None) -> Object:
        entry = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._with_usage(self._chunk_head | {"choices": [entry]})

    def _with_usage(self, chunk: Object) -> Object:
        return chunk | {"usage": None} if self._include_usage else chunk


def _call_id() -> str:
    return "call_" + uuid.uuid4().hex[:24]


def _delta(kind: str, piece: str) -> Object:
    if kind == "text":
        return {"content": piece}
    if kind == "name":
        call = {"index": 0, "id": _call_id(), "type": "function", "function": {"name": piece, "arguments": ""}}
    else:
        call = {"index": 0, "function": {"arguments": piece}}
    return {"tool_calls": [call]}
