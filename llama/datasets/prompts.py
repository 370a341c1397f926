"""The prompt of a row, which is a text, a dialog or token ids, and its options. Knows nothing of files."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from llama.decoding.rollouts import dialog_ids
from llama.generation import Llama
from llama.keywords import unknown
from llama.options import NAMES, DecodingOptions
from llama.tokenizer.open_turns import as_dialog

KINDS = ("prompt", "messages", "tokens")  # a text to continue, a dialog to answer, ids
OPTIONS = tuple(name for name in NAMES if name != "logits_processor")  # a file holds no code
KEYS = (*KINDS, "logprobs", "metadata", *OPTIONS)  # the fields of a row, besides its id

# Other libraries' names for these fields.
OTHERS = {
    **dict.fromkeys(("text", "input", "inputs"), "prompt here"),
    **dict.fromkeys(("instruction", "question", "query"), "messages here, maybe one text, or a template's field"),
    **dict.fromkeys(("dialog", "conversation", "conversations", "chat"), "messages here: role and content of each"),
    **dict.fromkeys(("input_ids", "prompt_token_ids", "token_ids"), "tokens here"),
}


def kind_of(row: Mapping[str, Any]) -> str:
    """The one of KINDS that a row has. Raises ValueError if it has none, or more than one."""
    given = [name for name in KINDS if row.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"found {' and '.join(given) or 'none'} of {', '.join(KINDS)}: expected one of them")
    return given[0]


def check_names(row: Mapping[str, Any], others: Iterable[str], options: Iterable[str]) -> None:
    """Raises ValueError if a row has a field that is neither a prompt, nor one of `others`, nor a decoding option."""
    for name in row:
        if name not in (*KINDS, *others, *options):
            if name in OTHERS:
                raise ValueError(f"{name} is {OTHERS[name]}")
            expected = f"one of {', '.join(KINDS)}; id, {', '.join(others)}; or a decoding option: {', '.join(options)}"
            names = (*KINDS, *others, *options)
            raise ValueError(unknown(name, names, f"{expected}; other fields need a template", "a field of a row"))


def from_json(options: dict[str, Any]) -> dict[str, Any]:
    """Decoding options from a file's. Raises TypeError for an unknown one.

    The ids of a logit_bias are strings in JSON, and pandas writes a column's integers as 5.0 if one is missing.
    """
    for name in options:
        if name not in NAMES:
            raise TypeError(unknown(name, NAMES))
    is_whole = {name: isinstance(value, float) and value.is_integer() for name, value in options.items()}
    options = {name: int(value) if is_whole[name] else value for name, value in options.items()}
    bias = options.get("logit_bias")
    if isinstance(bias, dict):
        is_id = re.compile(r"\d{1,18}", re.ASCII).fullmatch
        ids = {int(key) if isinstance(key, str) and is_id(key) else key: value for key, value in bias.items()}
        options = options | {"logit_bias": ids}
    return options


def prompt_ids(llama: Llama, row: Mapping[str, Any], option: DecodingOptions | None = None) -> list[int]:
    """The ids of a row's prompt, cut if the option says so.

    Raises ValueError or TypeError if there is not one prompt, or if it is empty or too long.
    """
    kind = kind_of(row)
    ids = row[kind]
    if kind == "messages":
        ids = dialog_ids(llama.answerer, llama.formatter, as_dialog(ids), option or DecodingOptions())
    elif kind == "prompt":
        if not isinstance(ids, str) or not ids:
            raise ValueError(f"prompt = {ids!r}: expected a text that is not empty")
        ids = llama.tokenizer.encode(ids, bos=True)
    return llama.answerer.check_prompt("the prompt", ids, option)
