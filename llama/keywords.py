"""The keywords of a call: their types, for editors and type checkers, and what other libraries call them.

`llama.options` says what each of them means, and checks its value. Knows nothing else of the package.
"""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from typing_extensions import TypedDict  # PyTorch brings it

# (ids so far [1, T], logits [1, vocab_size]) -> logits [1, vocab_size]: the face of Transformers' LogitsProcessor.
LogitsProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Options(TypedDict, total=False):
    """The keywords of `Llama.generate` and its like that they do not name: each a value, or one for each prompt."""

    top_k: int | Sequence[int | None] | None
    min_p: float | Sequence[float | None] | None
    repetition_penalty: float | Sequence[float]
    no_repeat_ngram_size: int | Sequence[int]
    num_return_sequences: int | Sequence[int]
    num_beams: int | Sequence[int]
    length_penalty: float | Sequence[float]
    early_stopping: bool | str | Sequence[bool | str]
    stop: str | int | Sequence[str | int | Sequence[str | int] | None] | None
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float] | None] | None
    seed: int | Sequence[int | None] | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor | None] | None
    top_logprobs: int | Sequence[int]
    presence_penalty: float | Sequence[float]
    frequency_penalty: float | Sequence[float]
    json_schema: Mapping[str, Any] | str | bool | Sequence[Mapping[str, Any] | str | bool | None] | None
    regex: str | Sequence[str | None] | None
    choice: Sequence[str] | Sequence[Sequence[str] | None] | None
    grammar: str | Sequence[str | None] | None


class StreamOptions(Options, total=False):
    """Those, and the three that the other methods name: all of `DecodingOptions`."""

    max_gen_len: int | Sequence[int | None] | None
    temperature: float | Sequence[float | None] | None
    top_p: float | Sequence[float]


# What Transformers, vLLM, lmdeploy, llama.cpp and OpenAI's interface call them, and ours.
_BUDGET = ("max_new_tokens", "max_tokens", "max_completion_tokens", "max_gen_toks", "max_output_len", "n_predict")
_ANSWERS = ("n", "num_samples", "num_generations", "n_samples", "best_of", "candidate_count")
_ENDS = ("stop_token_ids", "stop_strings", "stop_words", "stop_sequences", "eos_token_id", "until")
PORTED = {
    **dict.fromkeys(_BUDGET, "max_gen_len here"),
    "max_length": "max_gen_len here, which counts the new tokens alone",
    **dict.fromkeys(_ANSWERS, "num_return_sequences here"),
    **dict.fromkeys(_ENDS, "stop here, which takes strings and ids of tokens"),
    "do_sample": "temperature here: 0 takes the most likely token each time, and more than 0 samples",
    **dict.fromkeys(("use_beam_search", "beam_width", "beam_size"), "num_beams here"),
    **dict.fromkeys(("random_seed", "manual_seed"), "seed here"),
    "repeat_penalty": "repetition_penalty here",
    "prompt_logprobs": "logprobs=True with echo=True here",
    "return_dict_in_generate": "logprobs=True here, for the log-probability of each token",
    "output_scores": "logprobs=True here, or top_logprobs for those of other tokens",
    "bad_words_ids": "logit_bias here, with -inf for an id",
    "use_cache": "always so here",
    "skip_special_tokens": "always so here: a stop token is no part of an answer",
}


def unknown(name: str, names: Collection[str], expected: str = "", kind: str = "a decoding option") -> str:
    """What to say of a keyword that is none of `names`: what we call it, or which of them it may be meant for."""
    if name in PORTED:
        return f"{name} is {PORTED[name]}"
    meant = difflib.get_close_matches(str(name), names, 1)
    hint = f"did you mean {meant[0]}? " if meant else ""
    return f"{name!r} is not {kind}: {hint}expected {expected or 'one of ' + ', '.join(sorted(names))}"
