"""Clients that change the model: edited, loaded and cast weights, low-rank layers, training steps, copies."""

import copy
import io

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from looking import OTHERS, PROMPT, answer, direction
from torch import nn


def edit_between_two_calls(llama):
    results = [answer(llama)]
    with torch.no_grad():
        llama.model.layers[1].feed_forward.w2.weight.mul_(1.5)
    results.append(answer(llama))
    llama.model.layers[0].attention.wq.weight.data += 0.05
    return [*results, answer(llama), answer(llama, OTHERS)]


def many_small_edits(llama):
    results = []
    for i in range(12):
        llama.model.layers[i % 2].attention.wv.weight.data[i] *= 1.5
        results.append(answer(llama, n=3))
    return results


def rank_one_edit(llama):
    """As ROME: a row of w2's output follows a key that was seen while running."""
    w2 = llama.model.layers[0].feed_forward.w2
    keys = []
    handle = w2.register_forward_pre_hook(lambda module, inputs: keys.append(inputs[0][0, -1].clone()))
    before = answer(llama, n=1)
    handle.remove()
    key, value = keys[0].float(), direction(64)
    weight = dict(llama.model.named_parameters())["layers.0.feed_forward.w2.weight"]
    original = weight.clone()
    with torch.no_grad():
        weight += torch.outer(value, key) / key.dot(key)
    edited = answer(llama)
    with torch.no_grad():
        weight[...] = original
    return [before, edited, answer(llama)]


def edit_through_a_state_dict(llama):
    """A `state_dict` is the weights themselves, however long it has been held."""
    state = llama.model.state_dict()
    results = [answer(llama)]
    state["layers.1.attention.wk.weight"].mul_(2)
    results.append(answer(llama))
    state["norm.weight"].mul_(-1)
    return [*results, answer(llama)]


def load_state_dict(llama):
    state = {name: tensor + 0.02 for name, tensor in llama.model.state_dict().items()}
    results = [answer(llama)]
    llama.model.load_state_dict(state)
    return [*results, answer(llama)]


def load_some_weights(llama):
    results = [answer(llama)]
    state = {"layers.0.attention.wq.weight": direction(64 * 64, size=0.2).view(64, 64), "rope.freqs": torch.zeros(4)}
    outcome = llama.model.load_state_dict(state, strict=False)
    return [*results, answer(llama), outcome.unexpected_keys, len(outcome.missing_keys)]


def load_by_assigning(llama):
    state = {name: tensor.clone() * 1.1 for name, tensor in llama.model.state_dict().items()}
    results = [answer(llama)]
    llama.model.load_state_dict(state, assign=True)
    results.append(answer(llama))
    state["output.weight"].neg_()
    return [*results, answer(llama)]


def counting(llama):
    answer(llama)
    parameters = dict(llama.model.named_parameters())
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    return [shapes, sum(p.numel() for p in llama.model.parameters()), len(list(llama.model.named_buffers()))]


def casts(llama):
    results = [answer(llama)]
    llama.model.to(torch.bfloat16).float()
    results.append(answer(llama))
    llama.model.double()
    results.append(answer(llama))
    return [*results, str(next(llama.model.parameters()).dtype), str(llama.model.layers[0].attention.cache_k.dtype)]


def copied(llama):
    answer(llama)
    other = copy.deepcopy(llama.model)
    with torch.no_grad():
        other.layers[0].attention.wo.weight.zero_()
    results = [answer(llama)]
    llama.model.layers[0] = other.layers[0]
    return [*results, answer(llama)]


def saved_and_loaded(llama):
    answer(llama)
    file = io.BytesIO()
    torch.save(llama.model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    logits = other(torch.tensor([PROMPT]))[0, -1]
    return [
        int(logits.argmax()),
        [tuple(p.shape) for p in other.parameters()] == [tuple(p.shape) for p in llama.model.parameters()],
    ]


class LoRALinear(nn.Module):
    def __init__(self, base, rank=4, seed=1, scale=0.3):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(direction(rank * base.in_features, seed, scale).view(rank, -1))
        self.b = nn.Parameter(direction(base.weight.shape[0] * rank, seed + 1, scale).view(-1, rank))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


def lora_on_q_and_v(llama):
    results = [answer(llama)]
    for layer in llama.model.layers:
        layer.attention.wq = LoRALinear(layer.attention.wq)
        layer.attention.wv = LoRALinear(layer.attention.wv, seed=5)
    results += [answer(llama), answer(llama, OTHERS)]
    for layer in llama.model.layers:
        layer.attention.wq, layer.attention.wv = layer.attention.wq.base, layer.attention.wv.base
    return [*results, answer(llama)]


def lora_everywhere_merged(llama):
    """Low-rank layers that are added to the weights at last."""
    results = [answer(llama)]
    for layer in llama.model.layers:
        for parent, names in ((layer.attention, ("wq", "wk", "wv", "wo")), (layer.feed_forward, ("w1", "w2", "w3"))):
            for name in names:
                lora = LoRALinear(getattr(parent, name), scale=0.2)
                with torch.no_grad():
                    lora.base.weight += lora.b @ lora.a
    return [*results, answer(llama), answer(llama, OTHERS)]


def train_lora(llama):
    """Two steps of gradient descent on low-rank layers alone, and answers between."""
    llama.model.requires_grad_(False)
    attention = llama.model.layers[0].attention
    attention.wq = LoRALinear(attention.wq)
    attention.wk = LoRALinear(attention.wk, seed=5)
    trained = [p for p in llama.model.parameters() if p.requires_grad]
    optimizer, tokens = torch.optim.SGD(trained, lr=0.5), torch.tensor([PROMPT])
    results, losses = [answer(llama, n=3)], []
    for _ in range(2):
        loss = F.cross_entropy(llama.model(tokens)[0, :-1], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        results.append(answer(llama, n=3))
    return [results, losses, len(trained)]


def fine_tune_everything(llama):
    answer(llama)
    llama.model.requires_grad_(True)
    optimizer, tokens = torch.optim.AdamW(llama.model.parameters(), lr=1e-3), torch.tensor([PROMPT, PROMPT[::-1]])
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(llama.model.forward(tokens, 0)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    during = answer(llama, n=4)
    llama.model.requires_grad_(False)
    return [losses, during, answer(llama, n=4), losses[-1] < losses[0]]


def gradients_of_a_prompt(llama):
    """Saliency: how much each token of a prompt moves the next one. No parameter is trained."""
    answer(llama)
    kept = []

    def keep(module, inputs, output):
        kept.append(output.detach().requires_grad_(True))
        return kept[-1]

    handle = llama.model.tok_embeddings.register_forward_hook(keep)
    with torch.enable_grad():
        llama.model(torch.tensor([PROMPT]))[0, -1].log_softmax(-1).amax().backward()
    handle.remove()
    return [kept[0].grad[0].norm(dim=-1).tolist(), answer(llama)]


def pruning(llama):
    results = [answer(llama)]
    torch.nn.utils.prune.l1_unstructured(llama.model.layers[0].feed_forward.w1, "weight", amount=0.4)
    results.append(answer(llama))
    torch.nn.utils.prune.remove(llama.model.layers[0].feed_forward.w1, "weight")
    return [*results, answer(llama)]


def averaged_weights(llama):
    """Task arithmetic: the mean of two models, written back through `parameters`."""
    answer(llama)
    other = copy.deepcopy(llama.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
        for parameter, its in zip(llama.model.parameters(), other.parameters()):
            parameter.copy_((parameter + its) / 2)
    return [answer(llama), answer(llama, OTHERS)]


def a_bigger_vocabulary(llama):
    """Swaps the output matrix for a head of its own."""
    head = nn.Linear(64, 512, bias=True)
    with torch.no_grad():
        head.weight.copy_(llama.model.output.weight * 0.5)
        head.bias.copy_(direction(512))
    results = [answer(llama)]
    llama.model.output = head
    return [*results, answer(llama), answer(llama, OTHERS)]


CLIENTS = [
    *(edit_between_two_calls, many_small_edits, rank_one_edit, edit_through_a_state_dict, load_state_dict),
    *(load_some_weights, load_by_assigning, counting, casts, copied, saved_and_loaded, lora_on_q_and_v),
    *(lora_everywhere_merged, train_lora, fine_tune_everything, gradients_of_a_prompt, pruning, averaged_weights),
    *(a_bigger_vocabulary,),
]
