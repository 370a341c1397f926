"""Turns a request into prompts of ids, checked options, and a ticket for the driver.

This runs in worker threads, because tokenizing a long text or compiling a schema takes a while. Knows nothing of HTTP.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from llama import Llama
from llama.decoding.answering import Job
from llama.options import DecodingOptions
from llama.server.driver import Ticket
from llama.server.protocol import ApiError, ChatMessage, ChatRequest, CompletionRequest, NamedTool, Sampling
from llama.tokenizer import Tokenizer
from llama.tokenizer.tool_calls import call_schema, offer_tools, write_call

# The decoding options that have another name in a request.
PARAMS = {"json_schema": "response_format", "max_gen_len": "max_tokens", "top_logprobs": "logprobs"}
SHAPES = ("regex", "choice", "grammar")


@dataclass
class Prepared:
    """A request, ready to run.

    Attributes:
        ticket: for the driver; the answers to one prompt are next to each other.
        prompts: ids.
        n: how many answers each prompt gets.
        logprobs, echo: whether the client wants them.
        tools: names of the functions that the model may call.
    """

    ticket: Ticket
    prompts: list[list[int]]
    n: int
    logprobs: bool
    echo: bool = False
    tools: list[str] = field(default_factory=list)


def prepare_chat(llama: Llama, body: ChatRequest, max_answers: int) -> Prepared:
    """Prepares a chat request. Raises ApiError."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    options = _options(body)
    options["max_gen_len"] = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    options["top_logprobs"] = body.top_logprobs or 0
    offered = [] if body.tool_choice == "none" else tools
    if tools:
        _check_tools(llama, body, options)
        if body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool):
            named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
            options["json_schema"] = call_schema(tools, named)
    if (last := body.messages[-1].role) not in ("user", "tool"):
        raise ApiError(400, f"the last message has role {last!r}: expected 'user' or 'tool'", "messages")
    text = "".join(message.content or "" for message in body.messages)
    check_text(llama, "messages", text, len(body.messages))
    try:
        dialog = _dialog(body.messages)
        ids = llama.formatter.encode_dialog_prompt(offer_tools(dialog, offered) if offered else dialog)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from None
    names = [tool["function"]["name"] for tool in offered]
    return _prepare(llama, body, [ids], options, body.logprobs, False, names, "messages", max_answers)


def prepare_completion(llama: Llama, body: CompletionRequest, max_answers: int) -> Prepared:
    """Prepares a completion request. Raises ApiError."""
    prompts: list[Any] = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if prompts and isinstance(prompts[0], int):
        prompts = [prompts]
    if not prompts:
        raise ApiError(400, "prompt: expected at least one text, or at least one token id", "prompt")
    _check_count(len(prompts) * body.n, max_answers)
    for text in prompts:
        if isinstance(text, str):
            check_text(llama, "prompt", text)
    options = _options(body)
    options["max_gen_len"] = body.max_tokens
    options["top_logprobs"] = body.logprobs or 0
    try:
        ids = [llama.tokenizer.encode(p, bos=True) if isinstance(p, str) else p for p in prompts]
    except ValueError as error:
        raise ApiError(400, str(error), "prompt") from None
    return _prepare(llama, body, ids, options, body.logprobs is not None, body.echo, [], "prompt", max_answers)


def dialog_ids(llama: Llama, messages: list[ChatMessage]) -> list[int]:
    """The ids of a dialog's prompt. Raises ApiError."""
    try:
        return llama.formatter.encode_dialog_prompt(_dialog(messages))
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from None


def check_text(llama: Llama, param: str, text: str, n_more: int = 0) -> None:
    """Raises ApiError if a text is too long to fit, however it is tokenized: tokenizing it would take long.

    Args:
        param: the field with the text.
        n_more: tokens of the prompt besides the text's.
    """
    n_least = n_more + len(text) // _longest_token(llama.tokenizer)
    if n_least > llama.args.max_seq_len:
        raise _too_long(param, f"at least {n_least}", llama.args.max_seq_len)


@functools.lru_cache(maxsize=4)
def _longest_token(tokenizer: Tokenizer) -> int:
    """How many bytes the longest token has."""
    return max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.n_words))


def _too_long(param: str, n_tokens: int | str, limit: int) -> ApiError:
    message = f"{param}: the prompt has {n_tokens} tokens: expected at most {limit}, the context of this server"
    return ApiError(400, message, param, "context_length_exceeded")


def _check_count(n_answers: int, most: int) -> None:
    if n_answers > most:
        raise ApiError(400, f"n: the request asks for {n_answers} answers: expected at most {most}", "n")


def _options(body: Sampling) -> dict[str, Any]:
    same = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    options: dict[str, Any] = {name: getattr(body, name) for name in (*same, "seed", "stop", *SHAPES)}
    if body.logit_bias:
        options["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    wanted = body.response_format
    if wanted is not None and wanted.type == "json_object":
        options["json_schema"] = {"type": "object"}
    elif wanted is not None and wanted.type == "json_schema":
        options["json_schema"] = wanted.json_schema.schema_
    return options


def _check_tools(llama: Llama, body: ChatRequest, options: dict[str, Any]) -> None:
    if llama.tokenizer.kind != "llama3" or not llama.args.use_scaled_rope:
        raise ApiError(400, "tools: this model was not taught to call tools; Llama 3.1 and later were", "tools")
    if any(options.get(name) is not None for name in ("json_schema", *SHAPES)):
        raise ApiError(400, "tools: expected no response_format, regex, choice or grammar with tools", "tools")
    is_forced = body.tool_choice not in (None, "auto", "none")
    if any(tool.function.strict for tool in body.tools) and not is_forced:
        raise ApiError(400, "tools: strict needs a forced call: expected tool_choice 'required' or a function", "tools")


def _dialog(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """The messages as the chat format takes them. Raises ValueError if they cannot be a dialog."""
    for before, message in zip([None, *messages], messages):
        if message.role == "tool" and (before is None or before.role not in ("assistant", "tool")):
            found = "nothing" if before is None else f"one of the role {before.role!r}"
            raise ValueError(f"a message of the role 'tool' follows {found}: expected it after the assistant's call")
    return [_message(message) for message in messages]


def _message(message: ChatMessage) -> dict[str, str]:
    role = {"developer": "system", "tool": "ipython"}.get(message.role, message.role)
    if not message.tool_calls:
        return {"role": role, "content": message.content}
    if len(message.tool_calls) > 1:
        raise ValueError("a message has several tool_calls: expected one, because the model makes one per message")
    call = message.tool_calls[0].function
    try:
        return {"role": role, "content": write_call(call.name, call.arguments)}
    except (ValueError, RecursionError):
        raise ValueError(f"the arguments of the call to {call.name!r} are not JSON") from None


def _prepare(
    llama: Llama,
    body: Sampling,
    prompts: list[list[int]],
    options: dict[str, Any],
    logprobs: bool,
    echo: bool,
    tools: list[str],
    param: str,
    max_answers: int,
) -> Prepared:
    _check_count(len(prompts) * body.n, max_answers)
    limit = llama.args.max_seq_len
    for ids in prompts:
        if len(ids) > limit:
            raise _too_long(param, len(ids), limit)
    try:
        prompts = [llama.answerer.check_prompt(index, ids) for index, ids in enumerate(prompts)]
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), param) from None
    try:
        settings: list[DecodingOptions] = llama.answerer.check_options(prompts, options)
    except (ValueError, TypeError, ImportError) as error:
        message = str(error).removeprefix("prompt 0: ")
        name = message.split(" ", 1)[0]
        raise ApiError(400, message, PARAMS.get(name, name if name in options else None)) from None
    occurrences: Counter[tuple[int, ...]] = Counter()
    jobs = []
    for ids, option in zip(prompts, settings):
        job = Job(None, ids, option, occurrences[tuple(ids)], logprobs, echo)
        occurrences[tuple(ids)] += 1
        jobs += [(job, sample) for sample in range(body.n)]
    ticket = Ticket(jobs, [llama.answerer.sequence(job, sample) for job, sample in jobs])
    return Prepared(ticket, prompts, body.n, logprobs, echo, tools)
