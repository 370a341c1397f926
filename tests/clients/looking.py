"""Clients that look into the network, and steer it: hooks, probes, ablations, patched methods."""

from collections.abc import Callable

import torch
from torch import nn

PROMPT = [1, 17, 300, 42, 9, 256, 77, 31, 5, 120, 64, 201, 18, 7, 99, 2, 450, 33, 12, 6]
OTHERS = [[5, 6, 7], [1, 17, 300, 42, 9, 256, 77, 31, 5, 120, 64, 201, 18, 7, 99, 2, 450, 400], [11] * 9, [8]]


def answer(llama, prompts: list | None = None, n: int = 8) -> list:
    return llama.generate(prompts or [PROMPT], max_gen_len=n, temperature=0)[0]


def direction(n: int, seed: int = 3, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def adding(vector: torch.Tensor) -> Callable:
    return lambda module, inputs, output: output + vector


def steering_vector_on_and_off(llama):
    results = [answer(llama)]
    for layer in llama.model.layers:
        handle = layer.register_forward_hook(adding(direction(64)))
        results.append(answer(llama))
        handle.remove()
        results.append(answer(llama))
    return results


def steering_several_prompts_at_once(llama):
    before = answer(llama, OTHERS)
    llama.model.layers[1].register_forward_hook(adding(direction(64)))
    return [before, answer(llama, OTHERS), answer(llama, OTHERS[::-1])]


def steering_of_a_matrix(llama):
    """Hooks on matrices that are multiplied together."""
    results, attention, feed_forward = (
        [answer(llama)],
        llama.model.layers[0].attention,
        llama.model.layers[1].feed_forward,
    )
    for matrix in (attention.wq, attention.wk, attention.wv, attention.wo, feed_forward.w1, feed_forward.w2):
        handle = matrix.register_forward_hook(lambda module, inputs, output: output * 1.7 + 0.2)
        results.append(answer(llama))
        handle.remove()
    return [*results, answer(llama)]


def steering_in_the_middle_of_a_stream(llama):
    """Only what the next call gives is compared: a stream's pieces are its own."""
    stream = llama.stream_text("a", temperature=0, max_gen_len=6)
    next(stream)
    llama.model.layers[0].register_forward_hook(adding(direction(64)))
    list(stream)
    return [answer(llama), llama.text_completion(["a"], temperature=0, max_gen_len=6)]


def pre_hooks(llama):
    results = [answer(llama)]
    for name in ("norm", "layers.1", "layers.1.attention", "layers.0.feed_forward.w3", "output"):
        module = llama.model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.7 + 0.1, *inputs[1:]))
        results.append(answer(llama))
        handle.remove()
    return results


def hooks_with_keywords(llama):
    def hook(module, args, kwargs, output):
        return output * 1.3

    handle = llama.model.layers[0].attention.register_forward_hook(hook, with_kwargs=True)
    results = [answer(llama)]
    handle.remove()
    return [*results, answer(llama)]


def global_hooks(llama):
    def hook(module, inputs, output):
        return output * 1.1 if module is llama.model.layers[1].attention.wv else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    results = [answer(llama)]
    handle.remove()
    return [*results, answer(llama)]


def a_hook_that_removes_itself(llama):
    handles = []

    def once(module, inputs, output):
        handles.pop().remove()
        return output * 2

    results = []
    for _ in range(2):
        handles.append(llama.model.layers[1].feed_forward.register_forward_hook(once))
        results.append(answer(llama, n=1))  # of one step, that both kinds take once
    return [*results, answer(llama)]


def head_ablation(llama):
    """Zeroes one head's share of what enters wo."""
    results = []
    for layer in llama.model.layers:
        for head in range(3):

            def ablate(module, inputs, head=head):
                x = inputs[0].clone()
                x[..., head * 8 : head * 8 + 8] = 0
                return (x,)

            handle = layer.attention.wo.register_forward_pre_hook(ablate)
            results.append(answer(llama, n=4))
            handle.remove()
    return results


def layer_ablation(llama):
    results = []
    for layer in llama.model.layers:
        for part in (layer.attention, layer.feed_forward):
            handle = part.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
            results.append(answer(llama, n=4))
            handle.remove()
    return results


def neuron_ablation(llama):
    def ablate(module, inputs):
        x = inputs[0].clone()
        x[..., ::3] = 0
        return (x,)

    llama.model.layers[1].feed_forward.w2.register_forward_pre_hook(ablate)
    return [answer(llama), answer(llama, OTHERS)]


def logit_lens(llama):
    """What each layer would say next, after the last token of the prompt."""
    seen: dict[int, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda module, inputs, output, i=i: seen.update({i: output[:, -1]}))
        for i, layer in enumerate(llama.model.layers)
    ]
    answer(llama, n=1)
    for handle in handles:
        handle.remove()
    return [int(llama.model.output(llama.model.norm(hidden)).argmax()) for _, hidden in sorted(seen.items())]


def activation_collection(llama):
    """The last position's activations at every step, as a probe takes them."""
    seen = []
    handle = llama.model.layers[0].register_forward_hook(lambda m, i, output: seen.append(output[0, -1].clone()))
    tokens = answer(llama, n=5)
    handle.remove()
    return [tokens, torch.stack(seen).round(decimals=3).abs().sum(1).tolist()]


def activations_of_a_prompt(llama):
    """Of every position of a prompt, although one that begins alike was answered before."""
    answer(llama, [PROMPT[:19]])
    seen = []
    handle = llama.model.layers[1].attention.register_forward_hook(lambda m, i, output: seen.append(output[0].clone()))
    answer(llama, n=1)
    handle.remove()
    return [list(seen[0].shape), seen[0].norm(dim=-1).tolist()]


def outputs_of_every_position(llama):
    shapes = []
    handle = llama.model.output.register_forward_hook(
        lambda m, i, output: shapes.append((output.dim(), output.shape[-1]))
    )
    tokens = answer(llama, n=3)
    handle.remove()
    return [tokens, shapes]


def a_hook_on_the_output(llama):
    """Forbids a token, and adds to another, at every position."""
    first = answer(llama, n=1)[0][0]

    def hook(module, inputs, output):
        output = output.clone()
        output[:, :, first] = -100
        return output

    llama.model.output.register_forward_hook(hook)
    return [first, answer(llama, [PROMPT, *OTHERS])]


def activation_patching(llama):
    """Runs one prompt with the activations of another at a layer, by position."""
    other = [7, *PROMPT[1:]]
    kept = []
    handle = llama.model.layers[0].register_forward_hook(lambda m, i, output: kept.append(output.clone()))
    answer(llama, [other], n=1)
    handle.remove()

    def patch(module, inputs, output):
        if output.shape[1] < len(PROMPT):
            return output
        output = output.clone()
        output[:, 3:7] = kept[0][:, 3:7]
        return output

    handle = llama.model.layers[0].register_forward_hook(patch)
    patched = answer(llama, n=1)
    handle.remove()
    return [answer(llama, n=1), patched, answer(llama, n=1)]


def a_patched_attention(llama):
    attention = llama.model.layers[0].attention
    results, forward = [answer(llama)], attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 0.5
    results += [answer(llama), answer(llama, OTHERS)]
    del attention.forward
    return [*results, answer(llama)]


def patched_matrices(llama):
    results = [answer(llama)]
    for matrix in (llama.model.layers[0].attention.wk, llama.model.layers[1].feed_forward.w3, llama.model.output):
        matrix.forward = lambda x, forward=matrix.forward: forward(x) * 1.2 + 0.1
        results.append(answer(llama))
    return results


def a_patched_class(llama):
    """As those do who replace a method of everything at once."""
    cls, results = type(llama.model.layers[0].feed_forward), [answer(llama)]
    forward = cls.forward
    cls.forward = lambda self, x: forward(self, x) * 0.8
    results.append(answer(llama))
    cls.forward = forward
    return [*results, answer(llama)]


def start_pos_in_a_hook(llama):
    """Steers what is generated and not the prompt: Meta's blocks are called with the position."""
    steps = []

    def hook(module, inputs, output):
        steps.append(int(inputs[1]) >= 0)
        return output

    llama.model.layers[0].register_forward_hook(hook)
    return [answer(llama, n=4), all(steps)]


CLIENTS = [
    *(steering_vector_on_and_off, steering_several_prompts_at_once, steering_of_a_matrix, pre_hooks),
    *(steering_in_the_middle_of_a_stream, hooks_with_keywords, global_hooks, a_hook_that_removes_itself),
    *(head_ablation, layer_ablation, neuron_ablation, logit_lens, activation_collection, activations_of_a_prompt),
    *(outputs_of_every_position, a_hook_on_the_output, activation_patching, a_patched_attention, patched_matrices),
    *(a_patched_class, start_pos_in_a_hook),
]
