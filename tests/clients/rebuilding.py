"""Clients that put parts in place of others, and drive the network themselves: own loops, own blocks, bare networks."""

import copy
import http.server
import json
import math
import threading
import urllib.request

import torch
import torch.nn.functional as F
from looking import OTHERS, PROMPT, adding, answer, direction
from torch import nn

from llama import ModelArgs, Transformer
from llama.model import (
    Attention,
    FeedForward,
    RMSNorm,
    TransformerBlock,
    apply_rotary_emb,
    precompute_freqs_cis,
    repeat_kv,
)


def ids(logits: torch.Tensor) -> list:
    return logits.argmax(-1).tolist()


def own_loop(llama):
    """The loop of Meta's `generate`, between two calls."""
    results, tokens, previous = [answer(llama)], torch.tensor([PROMPT]), 0
    with torch.inference_mode():
        for _ in range(6):
            logits = llama.model.forward(tokens[:, previous:], previous)
            previous = tokens.shape[1]
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return [*results, tokens[0, len(PROMPT) :].tolist(), answer(llama)]


def own_loop_of_several_rows(llama):
    tokens, previous = torch.tensor([PROMPT, PROMPT[::-1]]), 0
    for _ in range(5):
        logits = llama.model.forward(tokens[:, previous:], previous)
        previous = tokens.shape[1]
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return [tokens[:, len(PROMPT) :].tolist(), answer(llama, OTHERS)]


def own_pass_over_the_layers(llama):
    """Blocks called as Meta's are, with a mask to add; the past is in each attention's own cache."""
    model, tokens = llama.model, torch.tensor([PROMPT])
    results = []
    with torch.no_grad():
        for start, stop in ((0, 12), (12, 19), (19, 20)):
            h, n = model.tok_embeddings(tokens[:, start:stop]), stop - start
            mask = torch.full((n, n), -math.inf).triu(1) if n > 1 else None
            if mask is not None:
                mask = torch.hstack([torch.zeros(n, start), mask]).type_as(h)
            for layer in model.layers:
                h = layer(h, start, model.freqs_cis[start:stop], mask)
            results.append(ids(model.output(model.norm(h))[0]))
    return [results, list(model.layers[0].attention.cache_k.shape)]


def early_exit(llama):
    """The answer of the first layer alone, then of both."""
    layers = llama.model.layers
    results = [answer(llama)]
    llama.model.layers = layers[:1]
    results += [answer(llama), answer(llama, OTHERS)]
    llama.model.layers = layers
    return [*results, answer(llama)]


def layers_in_another_order(llama):
    results = [answer(llama)]
    llama.model.layers = nn.ModuleList([llama.model.layers[1], llama.model.layers[0]])
    results.append(answer(llama))
    llama.model.layers.insert(1, copy.deepcopy(llama.model.layers[0]))
    return [*results, answer(llama), answer(llama, OTHERS)]


class Wrapper(nn.Module):
    """A block that another is inside of, as steering code has it."""

    def __init__(self, block, vector=None):
        super().__init__()
        self.block, self.vector = block, vector

    def forward(self, *args, **kwargs):
        output = self.block(*args, **kwargs)
        return output if self.vector is None else output + self.vector


def wrapped_blocks(llama):
    results = [answer(llama)]
    for i in range(2):
        llama.model.layers[i] = Wrapper(llama.model.layers[i])
    results.append(answer(llama))
    llama.model.layers[0].vector = direction(64)
    results += [answer(llama), answer(llama, OTHERS)]
    llama.model.layers = nn.ModuleList(wrapper.block for wrapper in llama.model.layers)
    return [*results, answer(llama)]


class OwnAttention(nn.Module):
    """Written anew, against the interface of Meta's: a cache by rows, a mask to add, complex rotary numbers."""

    def __init__(self, other: Attention, temperature: float = 1.0):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = other.wq, other.wk, other.wv, other.wo
        self.n_heads, self.n_kv_heads, self.head_dim = other.n_local_heads, other.n_local_kv_heads, other.head_dim
        self.k, self.v = (torch.zeros(4, 64, self.n_kv_heads, self.head_dim) for _ in range(2))
        self.temperature = temperature

    def forward(self, x, start_pos, freqs_cis, mask):
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.n_heads, self.head_dim)
        k = self.wk(x).view(b, t, self.n_kv_heads, self.head_dim)
        q, k = apply_rotary_emb(q, k, freqs_cis=freqs_cis)
        self.k[:b, start_pos : start_pos + t] = k
        self.v[:b, start_pos : start_pos + t] = self.wv(x).view(b, t, self.n_kv_heads, self.head_dim)
        n = self.n_heads // self.n_kv_heads
        keys, values = (repeat_kv(past[:b, : start_pos + t], n).transpose(1, 2) for past in (self.k, self.v))
        scores = q.transpose(1, 2) @ keys.transpose(2, 3) / math.sqrt(self.head_dim) * self.temperature
        if mask is not None:
            scores = scores + mask
        return self.wo((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))


def an_attention_of_ones_own(llama):
    results = [answer(llama)]
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.attention = OwnAttention(layer.attention)
    results += [answer(llama), answer(llama, OTHERS)]
    llama.model.layers[1].attention.temperature = 2.0
    return [*results, answer(llama), results[0] == results[1]]


def a_new_attention_of_the_same_class(llama):
    results = [answer(llama)]
    attention = Attention(llama.model.params).requires_grad_(False)
    state = llama.model.layers[1].attention.state_dict()
    attention.load_state_dict({name: tensor * 0.5 for name, tensor in state.items()})
    llama.model.layers[1].attention = attention
    return [*results, answer(llama), answer(llama, OTHERS)]


def a_feed_forward_of_ones_own(llama):
    class Gelu(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.other = other

        def forward(self, x):
            return self.other.w2(F.gelu(self.other.w1(x)) * self.other.w3(x))

    results = [answer(llama)]
    llama.model.layers[0].feed_forward = Gelu(llama.model.layers[0].feed_forward)
    return [*results, answer(llama), answer(llama, OTHERS)]


def another_model(llama):
    """`generator.model = other`."""
    results = [answer(llama)]
    other = copy.deepcopy(llama.model)
    with torch.no_grad():
        other.layers[0].feed_forward.w1.weight.mul_(-1)
    first, llama.model = llama.model, other
    results += [answer(llama), answer(llama, OTHERS)]
    llama.model = first
    return [*results, answer(llama)]


def a_wrapped_model(llama):
    class Louder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.params = inner, inner.params

        def forward(self, tokens, start_pos):
            logits = self.inner(tokens, start_pos).clone()
            logits[..., :256] -= 100
            return logits

    results = [answer(llama)]
    if type(llama).__name__ == "PlainLlama":  # the slow model knows no wrappers: it calls without a position
        inner = llama.model
        llama.model = lambda tokens: Louder(inner)(tokens, 0)
    else:
        llama.model = Louder(llama.model)
    return [*results, answer(llama), answer(llama, OTHERS)]


def a_compiled_model(llama):
    results = [answer(llama, n=3)]
    llama.model = torch.compile(llama.model, backend="eager")
    return [*results, answer(llama, n=3)]


def another_tokenizer(llama):
    before = llama.text_completion(["ab"], temperature=0, max_gen_len=4)
    tokenizer = copy.copy(llama.tokenizer)
    tokenizer.encode = lambda text, bos, eos: [3, 4, 5]
    llama.tokenizer = tokenizer
    return [before, llama.text_completion(["ab"], temperature=0, max_gen_len=4)]


def a_bare_network(llama):
    """`Transformer(ModelArgs(...))` from scratch: weights of a shard, a loop of its own, two training steps."""
    args = ModelArgs(
        **{name: getattr(llama.model.params, name) for name in ("dim", "n_heads", "n_kv_heads", "n_layers")}
    )
    args.multiple_of, args.vocab_size, args.max_seq_len, args.max_batch_size = 16, 512, 48, 2
    model = Transformer(args)
    missing = model.load_state_dict(llama.model.state_dict() | {"rope.freqs": torch.zeros(4)}, strict=False)
    tokens, previous, losses = torch.tensor([PROMPT[:9]]), 0, []
    for _ in range(5):
        logits = model.forward(tokens[:, previous:], previous)
        previous = tokens.shape[1]
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        logits = model.forward(tokens, 0)
        loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return [tokens.tolist(), losses, missing.missing_keys, missing.unexpected_keys, losses[2] < losses[0]]


def attributes(llama):
    model = llama.model
    block, attention = model.layers[1], model.layers[1].attention
    shapes = [model.params.dim, model.vocab_size, model.n_layers, model.freqs_cis.dtype == torch.complex64]
    shapes += [block.layer_id, block.n_heads, block.dim, block.head_dim, attention.n_kv_heads, attention.n_rep]
    shapes += [attention.n_local_heads, attention.n_local_kv_heads, attention.head_dim, list(attention.cache_v.shape)]
    expected = precompute_freqs_cis(block.head_dim, 64)
    return [*shapes, bool(torch.equal(model.freqs_cis, expected))]


def parts_alone(llama):
    """Each class constructed and called as Meta's."""
    args = llama.model.params
    x = direction(2 * 5 * 64).view(2, 5, 64)
    freqs_cis = precompute_freqs_cis(8, 10)[:5]
    mask = torch.full((5, 5), -math.inf).triu(1)
    results = [float(RMSNorm(64)(x).detach().sum())]
    with torch.no_grad():
        for part in (TransformerBlock(0, args), Attention(args), FeedForward(64, 256, 16, None)):
            for seed, parameter in enumerate(part.parameters()):
                parameter.copy_(direction(parameter.numel(), seed, 0.1).view(parameter.shape))
            y = part(x) if isinstance(part, FeedForward) else part(x, 0, freqs_cis, mask)
            results.append(y.abs().mean().item())
            if not isinstance(part, FeedForward):  # the fifth position again, after four
                part(x[:, :4], 0, freqs_cis[:4], mask[:4, :4])
                results.append(bool(torch.allclose(part(x[:, 4:], 4, freqs_cis[4:], None), y[:, 4:], atol=1e-5)))
    return results


def a_list_of_layers(llama):
    """As pipelines cut a model: embedding, blocks and head in one sequence, cut in two."""

    class Stage(nn.Module):
        def __init__(self, layer, freqs_cis, mask):
            super().__init__()
            self.layer, self.freqs_cis, self.mask = layer, freqs_cis, mask

        def forward(self, h):
            return self.layer(h, 0, self.freqs_cis, self.mask)

    answer(llama)
    model = llama.model
    mask = torch.full((20, 20), -math.inf).triu(1)
    stages = [Stage(layer, model.freqs_cis[:20], mask) for layer in model.layers]
    parts = [model.tok_embeddings, *stages, model.norm, model.output]
    with torch.no_grad():
        h = nn.Sequential(*parts[:2])(torch.tensor([PROMPT]))
        return [ids(nn.Sequential(*parts[2:])(h)[0]), answer(llama)]


def other_angles(llama):
    """A longer wave length, through `freqs_cis`."""
    results = [answer(llama)]
    llama.model.freqs_cis = precompute_freqs_cis(8, 64, theta=500.0)
    return [*results, answer(llama)]


def two_models(llama):
    """Two models in one process, one of them steered, called in turn."""
    other = copy.copy(llama)
    other = type(llama)(copy.deepcopy(llama.model), llama.tokenizer)
    other.model.layers[0].register_forward_hook(adding(direction(64)))
    results = []
    for _ in range(2):
        results += [answer(llama), answer(other), answer(llama, OTHERS), answer(other, OTHERS)]
    return results


def an_endpoint(llama):
    """Behind HTTP, each request in a thread of its own, with a hook put on between two requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(answer(llama, [prompt])).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(prompt: list[int]) -> list:
        url = f"http://127.0.0.1:{server.server_port}"
        return json.loads(urllib.request.urlopen(urllib.request.Request(url, json.dumps(prompt).encode())).read())

    results = [ask(prompt) for prompt in OTHERS]
    llama.model.layers[1].register_forward_hook(adding(direction(64)))
    results += [ask(prompt) for prompt in OTHERS]
    server.shutdown()
    return results


def dialogs(llama):
    dialog = [{"role": "user", "content": "hello"}]
    results = llama.chat_completion([dialog], temperature=0, max_gen_len=5)
    llama.model.layers[0].register_forward_hook(adding(direction(64)))
    return [results, llama.chat_completion([dialog], temperature=0, max_gen_len=5)]


CLIENTS = [
    *(own_loop, own_loop_of_several_rows, own_pass_over_the_layers, early_exit, layers_in_another_order),
    *(wrapped_blocks, an_attention_of_ones_own, a_new_attention_of_the_same_class, a_feed_forward_of_ones_own),
    *(another_model, a_wrapped_model, a_compiled_model, another_tokenizer, a_bare_network, attributes, parts_alone),
    *(a_list_of_layers, other_angles, two_models, an_endpoint, dialogs),
]
