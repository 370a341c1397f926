"""The fields of a request: those of OpenAI's reference that are supported, each with its type and range.

Any other field, or a value of another type, is an error that names the field: nothing is ignored. Null is the same as
leaving a field out, as in OpenAI's reference. Extra keys inside a message are accepted (clients send `name`, `refusal`
and others). Knows nothing of models.
"""

import re
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

MAX_ANSWERS = 128  # OpenAI's limit of `n`
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 64
MAX_PARTS = 1024  # of a message's content
MAX_BIASES = 1024

Integer = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
# A list is refused at its first wrong element: to report two million of them would stop the event loop for a minute.
FAIL_FAST = Field(fail_fast=True)
Integers = Annotated[list[Integer], FAIL_FAST]
# Fields that some clients send needlessly, with the values that change nothing; any other value is refused. An answer
# calls at most one tool, so `parallel_tool_calls` may be either.
NEUTRAL: dict[str, list[Any]] = {"store": [False], "service_tier": ["auto"], "modalities": [["text"]], "best_of": [1]}
NEUTRAL["parallel_tool_calls"] = [True, False]


class ApiError(Exception):
    """An error as the client sees it.

    Args:
        status: HTTP's status code.
        message: what was found and what was expected.
        param: the field at fault.
        code: OpenAI's short name for the error.
        headers: more headers for the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's JSON."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def describe(error: RequestValidationError) -> ApiError:
    """The first error of a request, named by its path, such as messages[0].content."""
    found = error.errors()[0]
    path = [part for part in found["loc"] if part not in ("body", "query", "path")]
    # Pydantic adds the type of a union's branch to the path.
    path = [part for part in path if isinstance(part, int) or part.isidentifier()]
    path = [part for part in path if part not in ("str", "list", "int", "bool")]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or None
    if found["type"] == "extra_forbidden":
        field = str(found["loc"][-1])[:100].encode("ascii", "backslashreplace").decode()
        name = ".".join([*(str(part) for part in path if part != found["loc"][-1]), field])
        return ApiError(400, f"{name}: this field is not supported or not known", name, "unknown_parameter")
    if found["type"] == "json_invalid":
        reason = found.get("ctx", {}).get("error", "it cannot be parsed")
        return ApiError(400, f"the body is not JSON: {reason}", None, "invalid_json")
    message = found["msg"].removeprefix("Value error, ")
    if name is None and found["type"] == "value_error" and (field := re.match(r"(\w+): ", message)):
        return ApiError(400, message, field[1], found["type"])  # fields that conflict: the message names one
    if name is None and found["type"] in ("model_attributes_type", "missing"):
        message = "expected a JSON object, with the header Content-Type: application/json"
    return ApiError(400, f"{name}: {message}" if name else message, name, found["type"])


class Strict(BaseModel):
    """An object in which an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_more_unknown(cls, data: Any) -> Any:
        """Keeps one unknown field, for the error: there may be half a million."""
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name in data if name not in known), None)
        return {name: value for name, value in data.items() if name in known or name == unknown}


class Body(Strict):
    """The base of all request bodies."""

    @model_validator(mode="before")
    @classmethod
    def _drop_null_and_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        own = {name: value for name, value in data.items() if value is not None or name not in fields}
        return {name: value for name, value in own.items() if name in fields or value not in NEUTRAL.get(name, [])}


class Function(Strict):
    name: Text = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: Text | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: Flag | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    name: Text


class NamedTool(BaseModel):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(BaseModel):
    name: Text
    arguments: Text


class ToolCall(BaseModel):
    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


def _limit_biases(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:  # before each is checked
        raise ValueError(f"{len(biases)} tokens: expected at most {MAX_BIASES}")
    return biases


def _join_parts(content: Any) -> Any:
    """Joins a content that is a list of text parts."""
    if isinstance(content, list):
        if len(content) > MAX_PARTS:
            raise ValueError(f"{len(content)} parts: expected at most {MAX_PARTS}")
        try:
            return "".join(TextPart.model_validate(part).text for part in content)
        except ValueError:
            raise ValueError("expected a string, or a list of parts of type 'text'") from None
    return content


# `ChatMessage._has_content` in the OpenAPI document.
CONTENT_OR_CALL: dict[str, Any] = {
    "anyOf": [
        {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
        {"required": ["tool_calls"], "properties": {"role": {"const": "assistant"}, "tool_calls": {"minItems": 1}}},
    ]
}


class ChatMessage(BaseModel):
    """A message. `developer` is OpenAI's newer name for `system`."""

    model_config = ConfigDict(json_schema_extra=CONTENT_OR_CALL)
    role: Literal["system", "developer", "user", "assistant", "tool", "ipython"]
    content: Annotated[
        Text | None, BeforeValidator(_join_parts, json_schema_input_type=Text | list[TextPart] | None)
    ] = None
    tool_calls: Annotated[list[ToolCall], FAIL_FAST] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content: expected a string")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: found in a message of role {self.role!r}: expected 'assistant'")
        return self


class StreamOptions(Strict):
    include_usage: Flag = False


class JsonSchema(Strict):
    name: Text
    description: Text | None = None
    schema_: dict[str, JsonValue] = Field(default_factory=dict, alias="schema")
    strict: Flag | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("expected json_schema with type 'json_schema', and only with it")
        return self


class Sampling(Body):
    """The fields that chat and completions share."""

    model: Text | None = None
    n: Integer = Field(1, ge=1, le=MAX_ANSWERS)
    temperature: Number = Field(1.0, ge=0)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: Integer = Field(0, ge=0, lt=2**31)
    min_p: Number = Field(0.0, ge=0, le=1)
    stop: Text | Annotated[list[Text], FAIL_FAST] | None = None
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: Annotated[dict[str, Number] | None, BeforeValidator(_limit_biases)] = None
    presence_penalty: Number = Field(0.0, ge=-2, le=2)
    frequency_penalty: Number = Field(0.0, ge=-2, le=2)
    repetition_penalty: Number = Field(1.0, gt=0, le=100)
    stream: Flag = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # Constraints on the answer, named like the offline options.
    regex: Text | None = Field(None, min_length=1)
    choice: Annotated[list[Text], FAIL_FAST] | None = Field(None, min_length=1)
    grammar: Text | None = Field(None, min_length=1)
    user: Text | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected only with stream = true")
        stops = self.stop if isinstance(self.stop, list) else [self.stop] if self.stop is not None else []
        if len(stops) > MAX_STOPS or "" in stops:
            raise ValueError(f"stop: expected at most {MAX_STOPS} strings that are not empty")
        for key in self.logit_bias or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"logit_bias: {key[:40]!r} is not a token id")
        shapes = [self.regex, self.choice, self.grammar]
        if self.response_format is not None and self.response_format.type != "text":
            shapes.append(self.response_format)
        if sum(shape is not None for shape in shapes) > 1:
            raise ValueError("response_format: expected at most one of response_format, regex, choice and grammar")
        return self


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], FAIL_FAST] = Field(min_length=1)
    max_tokens: Integer | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: Integer | None = Field(None, ge=1, lt=2**31)
    logprobs: Flag = False
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[list[Tool], FAIL_FAST] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None

    @model_validator(mode="after")
    def _check_chat_fields(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected only with logprobs = true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: expected this or max_completion_tokens, not both")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: expected each function once")
        if self.tool_choice not in (None, "none") and not names:
            raise ValueError("tool_choice: expected only with tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: there is no tool {self.tool_choice.function.name[:64]!r}")
        return self


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: Text | Integers | Annotated[list[Text | Integers], FAIL_FAST]
    max_tokens: Integer = Field(16, ge=0, lt=2**31)
    logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: Flag = False


class TokenizeRequest(Body):
    """The body of POST /tokenize: a text, or a dialog, which becomes a prompt in the model's format."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], FAIL_FAST] | None = Field(None, min_length=1)
    add_special_tokens: Flag = True

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: expected prompt or messages, and not both")
        return self


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    model: Text | None = None
    tokens: Integers
