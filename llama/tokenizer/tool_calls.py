"""Tools in a dialog of Llama 3.1 and later: how the prompt offers them, and how a call is read out of the answer.

The format is Meta's JSON-based tool calling (llama.com/docs/model-cards-and-prompt-formats/llama3_1): the functions
stand before the question in the user's first message, the model answers {"name": …, "parameters": …}, perhaps behind
`<|python_tag|>`, and the result comes back in a message of the role `ipython`. Calls of built-in tools look like
`brave_search.call(query="…")`. Knows nothing of ids, HTTP or models.
"""

import ast
import json
import re
from collections.abc import Collection
from typing import Any

from llama.tokenizer.chat_format import Dialog

PYTHON_TAG = "<|python_tag|>"
SYSTEM = "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
OFFER = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
    "Do not use variables.\n\n"
)
# The head of a call, up to its arguments; and the most characters that a head may have.
HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:parameters|arguments)"\s*:\s*(?=\{)'
)
MAX_HEAD = 300


def offer_tools(dialog: Dialog, tools: list[dict[str, Any]]) -> Dialog:
    """The dialog with the tools, {"type": "function", "function": …} each, written into it.

    Raises:
        ValueError: there is no message of the user to write them into.
    """
    system = dialog[0]["content"].strip() if dialog[0]["role"] == "system" else ""
    rest = list(dialog[1:] if dialog[0]["role"] == "system" else dialog)
    first = next((index for index, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        raise ValueError("tools are written into the user's first message: expected one in the dialog")
    functions = "".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools)
    rest[first] = {"role": "user", "content": OFFER + functions + rest[first]["content"].strip()}
    return [{"role": "system", "content": SYSTEM + system}, *rest]


def write_call(name: str, arguments: str) -> str:
    """A call as the model writes it. Raises ValueError if `arguments` is not JSON."""
    return json.dumps({"name": name, "parameters": json.loads(arguments)}, ensure_ascii=False)


def call_schema(tools: list[dict[str, Any]], name: str | None = None) -> dict[str, Any]:
    """The JSON schema of a call of one of the tools, or of the tool of this name."""
    calls = []
    for function in (tool["function"] for tool in tools):
        if name in (None, function["name"]):
            parameters = function.get("parameters") or {"type": "object"}
            properties = {"name": {"const": function["name"]}, "parameters": parameters}
            calls.append({"type": "object", "properties": properties, "required": [*properties]})
            calls[-1]["additionalProperties"] = False
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


class AnswerReader:
    """Tells a call from text while the answer arrives.

    Args:
        names: of the tools.

    Attributes:
        has_call: whether a whole call has been read.
    """

    def __init__(self, names: Collection[str]):
        self._names = names
        self._mode: str | None = None  # "text", "call"; None: not yet clear
        self._start = self._n_sent = 0
        self.has_call = False

    def read(self, answer: str, finished: bool = False) -> list[tuple[str, str]]:
        """What is new, as pairs: ("text", piece), ("name", of a call that begins), ("arguments", piece of their JSON).

        Args:
            answer: the whole answer so far.
            finished: whether it is complete.
        """
        found: list[tuple[str, str]] = []
        if self._mode is None:
            found += self._begin(answer, finished)
        if self._mode == "text" and len(answer) > self._n_sent:
            found.append(("text", answer[self._n_sent :]))
            self._n_sent = len(answer)
        if self._mode == "call" and not self.has_call:
            try:
                end = json.JSONDecoder().raw_decode(answer, self._start)[1]
                self.has_call = True
            except (ValueError, RecursionError):  # not complete yet
                end = len(answer)
            if end > self._n_sent:
                found.append(("arguments", answer[self._n_sent : end]))
                self._n_sent = end
        return found

    def _begin(self, answer: str, finished: bool) -> list[tuple[str, str]]:
        """Decides whether the answer is a call, once that is clear."""
        body = answer.lstrip()
        is_tagged = body.startswith(PYTHON_TAG)
        could_be_tag = len(body) < len(PYTHON_TAG) and PYTHON_TAG.startswith(body)
        body = body.removeprefix(PYTHON_TAG).lstrip()
        if head := HEAD.match(body):
            if head[1] in self._names:
                self._mode, self._start = "call", len(answer) - len(body) + head.end()
                self._n_sent = self._start
                return [("name", head[1])]
        elif not finished and (could_be_tag or is_tagged or (body[:1] == "{" and len(body) < MAX_HEAD)):
            return []
        elif finished and is_tagged and (call := _built_in(body.strip())) and call[0] in self._names:
            self._mode, self.has_call = "call", True
            return [("name", call[0]), ("arguments", call[1])]
        self._mode = "text"
        return []


def _built_in(code: str) -> tuple[str, str] | None:
    """`name.call(key=value, …)` as a name and its arguments in JSON."""
    try:
        call = ast.parse(code, mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "call":
            values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
            return call.func.value.id, json.dumps(values, ensure_ascii=False)
    except (ValueError, TypeError, SyntaxError, AttributeError, RecursionError, MemoryError):
        pass
    return None
