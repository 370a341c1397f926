"""Cuts prompts that are too long, at one side. Knows nothing of models."""

from typing import Literal

from llama.tokenizer.chat_format import ChatFormat, Dialog

Side = Literal["left", "right"]


class CutPrompt(list[int]):
    """The ids of a prompt that was cut; `n_cut` of its tokens are missing."""

    def __init__(self, ids: list[int], n_cut: int):
        super().__init__(ids)
        self.n_cut = n_cut


def cut_ids(ids: list[int], room: int, side: Side, bos_id: int) -> list[int]:
    """The first or the last `room` ids, at least one. A begin-of-text token at the beginning stays."""
    room = max(room, 1)
    if len(ids) <= room:
        return ids
    if side == "right":
        kept = ids[:room]
    else:
        start = ids[:1] if ids[0] == bos_id and room > 1 else []
        kept = start + ids[len(ids) - room + len(start) :]
    return CutPrompt(kept, len(ids) - len(kept))


def cut_dialog(dialog: Dialog, room: int, side: Side, formatter: ChatFormat) -> list[int]:
    """At most `room` ids of a dialog. Only its longest message is cut.

    The headers and the other messages stay whole. Raises ValueError if the dialog is too long without that message.
    """
    tokenizer = formatter.tokenizer
    contents = [tokenizer.encode(message["content"]) for message in dialog]
    longest = max(range(len(contents)), key=lambda index: len(contents[index]))
    whole = contents[longest]
    n_before, n_cut = len(formatter.encode_dialog_prompt(dialog)), 0
    ids, n = [], n_before
    while n > room:
        if n_cut == len(whole):
            found = f"the dialog has {n:,} tokens without its longest message"
            raise ValueError(f"{found}: expected at most {room:,}, to leave room for an answer")
        n_cut = min(n_cut + n - room, len(whole))
        if side == "left":  # drops a character that the cut has halved
            text = tokenizer.decode(whole[n_cut:]).lstrip("\ufffd")
        else:
            text = tokenizer.decode(whole[: len(whole) - n_cut]).rstrip("\ufffd")
        cut = [*dialog[:longest], {**dialog[longest], "content": text}, *dialog[longest + 1 :]]
        ids = formatter.encode_dialog_prompt(cut)
        n = len(ids)
    return CutPrompt(ids, n_before - n)
