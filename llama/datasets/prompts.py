"""What a row asks of a model: a text, a dialog or token ids; and the ids of its prompt.

Knows nothing of what else a row holds, or of where it is from.
"""

from collections.abc import Mapping
from typing import Any

from llama.generation import Llama

KINDS = ("prompt", "messages", "tokens")  # a text to be continued, a dialog to be answered, ids


def kind_of(row: Mapping[str, Any]) -> str:
    """Which of KINDS a row has. Raises ValueError if it has none, or more than one."""
    given = [name for name in KINDS if row.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"found {' and '.join(given) or 'none'} of {', '.join(KINDS)}: expected one of them")
    return given[0]


def prompt_ids(llama: Llama, row: Mapping[str, Any]) -> list[int]:
    """The ids of a row's prompt.

    Raises:
        ValueError, TypeError: as `kind_of`; the prompt is empty, too long, or not what its kind says.
    """
    kind = kind_of(row)
    ids = row[kind]
    if kind == "messages":
        ids = llama.formatter.encode_dialog_prompt(ids)
    elif kind == "prompt":
        if not isinstance(ids, str) or not ids:
            raise ValueError(f"prompt = {ids!r}: expected a text that is not empty")
        ids = llama.tokenizer.encode(ids, bos=True)
    return llama.check_prompt("the prompt", ids)
