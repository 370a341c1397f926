"""The chat template of a Hugging Face directory: Jinja text that turns a dialog into a prompt.

It runs in Jinja's sandbox with a budget of steps, time and text: no template can run code, hang or take all memory. A
message's text stays text: the name of a special token in it never becomes the token. Knows nothing of models.

Format: huggingface.co/docs/transformers/chat_templating.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

MAX_TEMPLATE_CHARS = 200_000
MAX_FILE_BYTES = 4 << 20
# Limits of one rendering: lines of the compiled template that run, seconds, characters of any text.
MAX_STEPS, MAX_SECONDS, MAX_TEXT = 1_000_000, 20, 2_000_000
# Methods of str that can pad to any width.
GROWING = ("format", "format_map", "ljust", "rjust", "center", "zfill", "expandtabs")
REMEDY = "fix it there, delete it to use the built-in format, or give token ids to `generate`"


class ChatTemplate:
    """A directory's template.

    Args:
        text: the Jinja source.
        source: the file that it is from, for messages.
        names: variables of the template besides the dialog, such as `bos_token`.
    """

    def __init__(self, text: str, source: Path, names: dict[str, str]):
        if len(text) > MAX_TEMPLATE_CHARS:
            most = f"expected at most {MAX_TEMPLATE_CHARS:,}"
            raise ValueError(f"{source}: a chat_template of {len(text):,} characters: {most}")
        self.text, self.source, self.names = text, source, names
        self._render: Callable[..., str] | None = None

    @property
    def digest(self) -> str:
        """The template's fingerprint, 16 hexadecimal digits."""
        return hashlib.sha256(repr((self.text, sorted(self.names.items()))).encode()).hexdigest()[:16]

    def render(self, dialog: Any, add_generation_prompt: bool = True) -> str:
        """The prompt's text. Raises ValueError; if the template refuses the dialog, with the template's message."""
        if self._render is None:
            self._render = self._compile()
        messages = [dict(message) for message in dialog]
        try:
            with _budget():
                return self._render(messages=messages, add_generation_prompt=add_generation_prompt)
        except _Refused as error:
            raise ValueError(f"the chat template of {self.source.parent} refuses the dialog: {error}") from None
        except Exception as error:
            kind = type(error).__name__
            raise ValueError(f"{self.source}: the chat template fails ({kind}: {error}): {REMEDY}") from None

    def ids(self, dialog: Any, tokenizer: Any, add_generation_prompt: bool = True) -> list[int]:
        """The prompt's ids. Only the template writes special tokens; the name of one in a message stays text."""
        names = re.compile("|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True))))
        everything = json.dumps(dialog, ensure_ascii=False, default=str)
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in everything)

        def break_names(text: str) -> str:  # a mark after the first character: no longer a token's name
            return names.sub(lambda found: found[0][0] + mark + found[0][1:], text)

        safe = [{k: break_names(v) if isinstance(v, str) else v for k, v in message.items()} for message in dialog]
        text, ids, end = self.render(safe, add_generation_prompt), [], 0
        for found in names.finditer(text):
            ids += tokenizer.encode(text[end : found.start()].replace(mark, ""))
            ids.append(tokenizer.special_tokens[found[0]])
            end = found.end()
        return ids + tokenizer.encode(text[end:].replace(mark, ""))

    def _compile(self) -> Callable[..., str]:
        try:
            import jinja2
        except ImportError:
            problem = f"{self.source} has a chat_template, and Jinja is not installed"
            raise ImportError(f"{problem}: pip install jinja2 (or this package's extra: '.[templates]')") from None
        try:
            return _environment(self.names)(self.text)
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.source}: the chat_template is not valid ({error}): {REMEDY}") from None


class _Refused(Exception):
    """A template's raise_exception."""


def _environment(names: dict[str, str]) -> Callable[[str], Callable[..., str]]:
    """A compiler of templates, set up as in Transformers. No operator or method can make a large value."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Adds(NodeTransformer):
        """Turns a ~ b into a sum of two texts, which `call_binop` checks."""

        def visit_Concat(self, node: Any) -> Any:
            texts = [nodes.Filter(self.visit(n), "string", [], [], None, None, lineno=n.lineno) for n in node.nodes]
            while len(texts) > 1:
                texts[:2] = [nodes.Add(texts[0], texts[1], lineno=node.lineno)]
            return texts[0]

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "+", "%"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(v) if hasattr(v, "__len__") else v for v in (left, right) if not isinstance(v, float)]
            has_text = any(hasattr(v, "__len__") for v in (left, right))
            large = operator == "**" or (operator == "%" and isinstance(left, str))
            large |= has_text and operator == "+" and sum(sizes) > MAX_TEXT
            large |= operator == "*" and len(sizes) == 2 and abs(sizes[0] * sizes[1]) > MAX_TEXT
            if large:
                raise SecurityError(f"{operator!r} may make a value too large")
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return attr not in GROWING and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> None:
            if getattr(value, "__name__", "") in GROWING and isinstance(getattr(value, "__self__", None), str):
                raise SecurityError(f"{value.__name__} may make a text too large")

        def call(self, context: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
            check_growth(getattr(method, "__name__", ""), getattr(method, "__self__", None), args)
            return super().call(context, method, *args, **kwargs)

        def _parse(self, source: str, name: Any, filename: Any) -> Any:
            return Adds().visit(super()._parse(source, name, filename))

    def check_growth(name: str, text: Any, args: tuple) -> None:
        if isinstance(text, str) and name in ("replace", "join") and args:
            longest = (
                max((len(str(v)) for v in args), default=0) if name == "replace" else len(text) * len(list(args[0]))
            )
            if longest * (len(text) if name == "replace" else 1) > MAX_TEXT:
                raise SecurityError(f"{name} may make a text too large")

    def replace(text: str, old: str, new: str) -> str:
        check_growth("replace", str(text), (old, new))
        return str(text).replace(old, new)

    def join(values: Any, separator: str = "") -> str:
        check_growth("join", separator, (values := list(values),))
        return separator.join(map(str, values))

    def refuse(message: object) -> None:
        raise _Refused(message)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent and min(int(indent), 16))

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for name in ("center", "format", "indent", "wordwrap", "batch", "slice", "xmlattr", "pprint"):  # they pad
        del environment.filters[name]
    environment.filters |= {"tojson": to_json, "replace": replace, "join": join}
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form[:100])}
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)

    def compiled(text: str) -> Callable[..., str]:
        template = environment.from_string(text)

        def render(**values: Any) -> str:
            parts, size = [], 0
            for part in template.generate(tools=None, documents=None, **names, **values):
                parts.append(part)
                if (size := size + len(part)) > MAX_TEXT:
                    raise SecurityError(f"the text has more than {MAX_TEXT:,} characters")
            return "".join(parts)

        return render

    return compiled


@contextmanager
def _budget() -> Iterator[None]:
    """Stops the code inside after MAX_STEPS lines of Python, or MAX_SECONDS; Jinja compiles a template to Python."""
    left, deadline, before = MAX_STEPS, time.monotonic() + MAX_SECONDS, sys.gettrace()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or time.monotonic() > deadline:
            raise RuntimeError(f"it takes more than {MAX_STEPS:,} steps, or {MAX_SECONDS} seconds")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def read_chat_files(tokenizer: Any, ckpt_dir: Path) -> None:
    """Sets a tokenizer's stop ids and chat template to those of a Hugging Face directory, if it has them.

    The stop ids are the `eos_token_id` of generation_config.json, or else of config.json. The template is
    chat_template.jinja, or the `chat_template` of tokenizer_config.json. Raises ValueError if one is not valid.
    """
    for name in ("generation_config.json", "config.json"):
        ids = _read(ckpt_dir / name).get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        for token in ids:
            if type(token) is not int or not 0 <= token < tokenizer.n_words:
                expected = f"ids from 0 to {tokenizer.n_words - 1}"
                raise ValueError(f"{ckpt_dir / name}: eos_token_id has {str(token)[:50]}: expected {expected}")
        # config.json is often the base model's, from before it was tuned for dialogs: it only adds stops.
        tokenizer.stop_tokens = set(ids) | (tokenizer.stop_tokens if name == "config.json" else set())
        break
    config, path = _read(ckpt_dir / "tokenizer_config.json"), ckpt_dir / "tokenizer_config.json"
    text = config.get("chat_template")
    if (file := ckpt_dir / "chat_template.jinja").is_file():
        path = file
        text = file.read_bytes()[: MAX_TEMPLATE_CHARS * 4 + 1].decode(errors="replace")
    if isinstance(text, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, Mapping)}
        text = named.get("default")
    if text is None:
        return
    if not isinstance(text, str):
        raise ValueError(f"{path}: chat_template is a {type(text).__name__}: expected a text, or a list with a default")
    defaults = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names_of = {token: name for name, token in tokenizer.special_tokens.items()}
    names = {name: names_of.get(token, "") for name, token in defaults.items()}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        given = config.get(name)
        given = given.get("content") if isinstance(given, Mapping) else given
        if isinstance(given, str):
            names[name] = given
    tokenizer.chat_template = ChatTemplate(text, path, names)


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file. Raises ValueError if the file holds something else."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected an object")
    return content
