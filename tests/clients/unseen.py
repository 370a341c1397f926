"""Clients that count positions, and those whose changes no attribute of `Llama` sees: classes, streams, copies."""

import copy
import functools
import math

import torch
from looking import OTHERS, PROMPT, adding, answer, direction
from torch import nn

from llama.model import Attention, FeedForward, Transformer, TransformerBlock

# Of many lengths, and more than rows in the cache; some begin alike.
MANY = [*OTHERS, PROMPT, [*PROMPT[:18], 9], PROMPT[:7], [*PROMPT, 5, 5]]


def steering_of_the_last_position(llama):
    """Of each prompt, whatever its length and whichever others are in the call."""

    def hook(module, inputs, output):
        output = output.clone()
        output[:, -1] += direction(64)
        return output

    before = answer(llama, MANY, n=1)
    handle = llama.model.layers[0].register_forward_hook(hook)
    steered = answer(llama, MANY, n=1)
    handle.remove()
    llama.model.layers[1].attention.wo.register_forward_hook(hook)
    return [before, steered, answer(llama, MANY, n=1), before == steered]


def steering_of_some_positions(llama):
    """Where the prompt is; a position is told by `start_pos`."""

    def hook(module, inputs, output):
        if inputs[1] == 0:
            output = output.clone()
            output[:, 1:5] += direction(64)
        return output

    prompts = [prompt for prompt in MANY if len(prompt) > 5]
    llama.model.layers[0].register_forward_hook(hook)
    return [answer(llama, prompts), answer(llama, prompts[::-1])]


def attention_knockout(llama):
    """A pre-hook writes to the mask: no position after the fourth sees the second to fourth."""

    def knock_out(module, inputs):
        x, start_pos, freqs_cis, mask = inputs
        if mask is not None and len(mask) > 4:
            mask = mask.clone()
            mask[4:, 1:4] = -math.inf
        return x, start_pos, freqs_cis, mask

    results = [answer(llama, MANY, n=1)]
    handle = llama.model.layers[0].register_forward_pre_hook(knock_out)
    results.append(answer(llama, MANY, n=1))
    handle.remove()
    llama.model.layers[1].attention.register_forward_pre_hook(knock_out)
    return [*results, answer(llama, MANY, n=1)]


def shapes_of_a_batch(llama):
    """A batch of equal prompts comes as one tensor, although they begin alike."""
    seen = []
    llama.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(list(output.shape)))
    answer(llama, [PROMPT, [*PROMPT[:18], 9, 9], PROMPT[::-1]], n=1)
    return sorted(seen) if len(seen) > 1 else [[1, *seen[0][1:]]] * seen[0][0]  # the slow model runs each alone


def patched_classes(llama):
    """Before anybody has read `llama.model`: put in place between two calls, and taken off again."""
    results = [answer(llama)]
    for cls, size in ((FeedForward, 0.5), (Attention, 0.7), (TransformerBlock, 1.2)):
        forward = cls.forward

        @functools.wraps(forward)
        def patched(self, *args, forward=forward, size=size):
            return forward(self, *args) * size

        cls.forward = patched
        results.append(answer(llama))
        cls.forward = forward
        results.append(answer(llama))
    return [*results, answer(llama, OTHERS)]


def a_global_hook(llama):
    """On all modules, before anybody has read `llama.model`."""

    def hook(module, inputs, output):
        return output * 0.8 if isinstance(module, FeedForward) else None

    results = [answer(llama)]
    handle = nn.modules.module.register_module_forward_hook(hook)
    results.append(answer(llama, MANY))
    handle.remove()
    return [*results, answer(llama)]


def a_patched_generate(llama):
    """Of the class: texts go through it."""
    cls, generate = type(llama), type(llama).generate

    def reversed_answers(self, prompt_tokens, **options):
        answers, logprobs = generate(self, prompt_tokens=prompt_tokens, **options)
        return [tokens[::-1] for tokens in answers], logprobs

    results = [llama.text_completion(["ab"], temperature=0, max_gen_len=4)[0]["generation"]]
    cls.generate = reversed_answers
    results.append(llama.text_completion(["ab"], temperature=0, max_gen_len=4)[0]["generation"])
    cls.generate = generate
    return [*results, llama.text_completion(["ab"], temperature=0, max_gen_len=4)[0]["generation"]]


def a_pass_in_the_middle_of_a_stream(llama):
    """A stream is half read, and somebody runs the network, or another answer."""
    results = []
    for between in (lambda: llama.model.forward(torch.tensor([PROMPT, PROMPT]), 0), lambda: answer(llama, OTHERS)):
        stream = llama.stream_text("abcdefgh", temperature=0, max_gen_len=9)
        text = next(stream)
        between()
        results.append(text + "".join(stream))
    return [*results, answer(llama)]


def a_cast_in_the_middle_of_a_stream(llama):
    stream = llama.stream_text("abcdefgh", temperature=0, max_gen_len=9)
    text = next(stream)
    llama.model.double()
    return [text + "".join(stream), answer(llama)]


def two_generators_of_one_model(llama):
    other = type(llama)(llama.model, llama.tokenizer)
    streams = [each.stream_text(text, temperature=0, max_gen_len=9) for each, text in ((llama, "abcd"), (other, "xyz"))]
    texts = ["", ""]
    for _ in range(9):
        for i, stream in enumerate(streams):
            texts[i] += next(stream, "")
    return [*texts, answer(llama), answer(other, OTHERS), answer(llama, OTHERS)]


def copies_of_the_generator(llama):
    answer(llama)
    shallow, deep = copy.copy(llama), copy.deepcopy(llama)
    deep.model.layers[0].register_forward_hook(adding(direction(64)))
    shallow.model = deep.model
    return [answer(llama), answer(deep), answer(shallow), answer(llama, OTHERS)]


def other_norms(llama):
    results = [answer(llama)]
    llama.model.norm = nn.LayerNorm(64).requires_grad_(False)
    results.append(answer(llama, OTHERS))
    llama.model.layers[0].ffn_norm = llama.model.norm = nn.Identity()
    return [*results, answer(llama), answer(llama, OTHERS)]


def a_model_of_ones_own_class(llama):
    class Louder(Transformer):
        def forward(self, tokens, start_pos=None):
            logits = super().forward(tokens, start_pos).clone()
            logits[..., ::2] -= 5
            return logits

    results, other = [answer(llama)], Louder(llama.model.params).requires_grad_(False)
    other.load_state_dict(llama.model.state_dict())
    llama.model = other
    return [*results, answer(llama), answer(llama, OTHERS)]


def caches_of_another_size(llama):
    """Larger ones for more rows, shorter ones for fewer positions: as evaluations of many choices at once do it."""
    results = [answer(llama)]
    for module in llama.model.modules():
        if hasattr(module, "cache_k") and hasattr(module, "cache_v"):
            shape = 9, 30, *module.cache_k.shape[2:]
            module.cache_k, module.cache_v = module.cache_k.new_zeros(shape), module.cache_v.new_zeros(shape)
    with torch.no_grad():
        logits = llama.model.forward(torch.tensor([PROMPT, *[PROMPT[::-1]] * 8]), 0)[:, -1]
    return [*results, logits.argmax(-1).tolist(), answer(llama, n=30)]


CLIENTS = [
    *(steering_of_the_last_position, steering_of_some_positions, attention_knockout, shapes_of_a_batch),
    *(patched_classes, a_global_hook, a_patched_generate, a_pass_in_the_middle_of_a_stream),
    *(a_cast_in_the_middle_of_a_stream, two_generators_of_one_model, copies_of_the_generator, other_norms),
    *(a_model_of_ones_own_class, caches_of_another_size),
]
