"""The keywords of a call: their types, for editors and type checkers, and their names in other libraries.

`llama.options` says what each keyword means, and checks its value. Knows nothing else of the package.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from typing_extensions import TypedDict  # PyTorch brings it

Call = TypeVar("Call", bound=Callable[..., Any])
# (ids so far [1, T], logits [1, vocab_size]) -> logits [1, vocab_size], the signature of Transformers' LogitsProcessor.
LogitsProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Options(TypedDict, total=False):
    """The `**options` of `Llama.generate` and similar methods: each is a value, or a list with one for each prompt."""

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
    truncate: str | Sequence[str | None] | None


class StreamOptions(Options, total=False):
    """All of `DecodingOptions`: `Options`, and the three that the other methods name as arguments."""

    max_gen_len: int | Sequence[int | None] | None
    temperature: float | Sequence[float | None] | None
    top_p: float | Sequence[float]


# Names in Transformers, vLLM, lmdeploy, llama.cpp and OpenAI's interface, each with ours.
_BUDGET = ("max_new_tokens", "max_tokens", "max_completion_tokens", "max_gen_toks", "max_output_len", "n_predict")
ANSWERS = ("n", "num_samples", "num_generations", "n_samples", "best_of", "candidate_count")
_ENDS = ("stop_token_ids", "stop_strings", "stop_words", "stop_sequences", "eos_token_id", "until")
PORTED = {
    **dict.fromkeys(_BUDGET, "max_gen_len here"),
    "max_length": "max_gen_len here, which counts the new tokens alone",
    **dict.fromkeys(ANSWERS, "num_return_sequences here"),
    **dict.fromkeys(_ENDS, "stop here, which takes strings and ids of tokens"),
    "do_sample": "temperature here: 0 takes the most likely token each time, and more than 0 samples",
    **dict.fromkeys(("use_beam_search", "beam_width", "beam_size"), "num_beams here"),
    **dict.fromkeys(("random_seed", "manual_seed"), "seed here"),
    "repeat_penalty": "repetition_penalty here",
    "prompt_logprobs": "logprobs=True with echo=True here",
    "return_dict_in_generate": "logprobs=True here, for the log-probability of each token",
    "output_scores": "logprobs=True here, or top_logprobs for those of other tokens",
    "bad_words_ids": "logit_bias here, with -inf for an id",
    **dict.fromkeys(("use_cache", "add_generation_prompt"), "always so here"),
    "skip_special_tokens": "always so here: a stop token is no part of an answer",
    **dict.fromkeys(("use_tqdm", "progress_bar"), "progress here"),
    **dict.fromkeys(("stream", "streamer", "stream_response"), "stream_text or stream_chat here, methods of their own"),
    **dict.fromkeys(("sampling_params", "gen_config", "generation_config"), "not an object here: pass its fields"),
    **dict.fromkeys(("attention_mask", "pad_token_id"), "not needed here: prompts may differ in length"),
    **dict.fromkeys(("truncate_prompt_tokens", "truncation", "truncation_side"), "truncate here: 'left' or 'right'"),
}


# The same for the arguments of `Llama.build`.
_MODEL = ("model", "model_path", "model_dir", "model_name_or_path", "pretrained_model_name_or_path", "checkpoint")
PORTED_BUILD = {
    **dict.fromkeys((*_MODEL, "checkpoint_dir", "checkpoint_path"), "ckpt_dir here"),
    **dict.fromkeys(("tokenizer", "tokenizer_name"), "tokenizer_path here"),
    **dict.fromkeys(("max_model_len", "max_length", "context_length", "n_ctx", "ctx_size"), "max_seq_len here"),
    **dict.fromkeys(("batch_size", "max_num_seqs", "per_device_batch_size"), "max_batch_size here"),
    **dict.fromkeys(("tensor_parallel_size", "tp", "tp_size"), "model_parallel_size here"),
    **dict.fromkeys(("torch_dtype", "precision"), "dtype here"),
    **dict.fromkeys(("quantization", "load_in_8bit", "load_in_4bit"), "quantize here: 'int8' or 'int4'"),
    **dict.fromkeys(("device_map", "backend"), "device here"),
    **dict.fromkeys(("speculative_model", "assistant_model", "draft_model"), "draft here"),
    **dict.fromkeys(("lora", "lora_path", "peft_model"), "adapter here"),
}


def checks_keywords(call: Call) -> Call:
    """A decorator for `Llama.build`: for an unknown keyword it raises a TypeError that names ours."""

    @functools.wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs.keys() - names:
            raise TypeError(unknown(name, names, kind="an argument", ported=PORTED_BUILD))
        return call(*args, **kwargs)

    names = set(inspect.signature(call).parameters)
    return cast(Call, checked)


def unknown(
    name: str,
    names: Collection[str],
    expected: str = "",
    kind: str = "a decoding option",
    ported: Mapping[str, str] = PORTED,
) -> str:
    """The message for a keyword that is not one of `names`: our name for it, or the one that looks most like it."""
    if name in ported:
        return f"{name} is {ported[name]}"
    meant = difflib.get_close_matches(str(name), names, 1)
    hint = f"did you mean {meant[0]}? " if meant else ""
    return f"{name!r} is not {kind}: {hint}expected {expected or 'one of ' + ', '.join(sorted(names))}"
