"""The server under load: `python -m benchmarks.serving --shape llama-3.2-1b`.

Clients send one request after another, streamed, over real HTTP; each answer has a fixed number of tokens. Prints for
1, 8 and 32 clients tokens/s, and the median and 99th percentile of the time to the first token and between tokens. For
comparison, the engine runs alone before and after, with as many sequences; and so does llama-cpp-python's server on the
same weights if it is installed (pip install 'llama-cpp-python[server]' gguf), which takes only texts. `--minutes 2`
keeps 32 clients sending and prints the memory after each half minute.

    python -m benchmarks.serving --clients 8 --requests 3
    python -m benchmarks.serving --mask     # what the mask of a JSON schema costs of a step
"""

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fire

from benchmarks.shapes import default_folder, write_random_checkpoint

ROOT = Path(__file__).resolve().parents[1]
N_PROMPT = 64
WORDS = ["the", "of", "and", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be", "at", "by"]


@dataclass
class Load:
    """What some clients have measured.

    Attributes:
        first: seconds to each first token.
        between: seconds between the tokens of each answer.
        n_tokens: tokens of all answers.
        n_errors: requests that failed.
        seconds: the whole time.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    n_tokens: int = 0
    n_errors: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        ms = lambda values, p: 1000 * percentile(values, p)  # noqa: E731
        return (
            f"{self.n_tokens / self.seconds:7.1f} tokens/s, first token {ms(self.first, 50):6.0f} ms median, "
            f"{ms(self.first, 99):6.0f} ms p99, between tokens {ms(self.between, 50):6.1f} ms median, "
            f"{ms(self.between, 99):6.1f} ms p99, {self.n_errors} errors"
        )


def percentile(values: list[float], p: float) -> float:
    """The smallest value that at least p percent of the values do not exceed."""
    return sorted(values)[max(0, -(-len(values) * p // 100).__int__() - 1)] if values else float("nan")


async def load(
    url: str, model: str, n_clients: int, n_requests: int, n_tokens: int, seconds: float = 0.0, as_text: bool = False
) -> Load:
    """Clients send requests, n_requests each or as many as they can in `seconds`, with prompts of ids or of words."""
    import httpx2

    result = Load()

    async def client(number: int) -> None:
        i = 0
        while i < n_requests or time.perf_counter() - started < seconds:
            prompt: Any = [(7 * j + 131 * number + 17 * i) % 256 + 1000 for j in range(N_PROMPT)]
            prompt = " ".join(map(WORDS.__getitem__, (i % len(WORDS) for i in prompt))) if as_text else prompt
            body = {"model": model, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "stream": True}
            body["stream_options"] = {"include_usage": True}
            i += 1
            try:
                await one(body)
            except (httpx2.HTTPError, ValueError):
                result.n_errors += 1

    async def one(body: dict) -> None:
        begun = last = time.perf_counter()
        n, n_reported = 0, None
        async with http.stream("POST", url + "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk, now = json.loads(line[6:]), time.perf_counter()
                    if "error" in chunk:
                        raise ValueError(chunk["error"]["message"])
                    if not chunk["choices"]:
                        n_reported = chunk["usage"]["completion_tokens"]
                    if not chunk["choices"] or not chunk["choices"][0]["text"]:
                        continue
                    (result.first if n == 0 else result.between).append(now - (begun if n == 0 else last))
                    last, n = now, n + 1
        if n == 0 and n_reported is None:
            raise ValueError("no token")
        result.n_tokens += n if n_reported is None else n_reported

    # One pool of connections, because each would read all certificates first.
    async with httpx2.AsyncClient(timeout=600, limits=httpx2.Limits(max_connections=None)) as http:
        started = time.perf_counter()
        await asyncio.gather(*map(client, range(n_clients)))
    result.seconds = time.perf_counter() - started
    return result


class Server:
    """A server process; ready once the `with` is entered."""

    def __init__(self, command: list[str], url: str = ""):
        self.url = url
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env)

    def __enter__(self) -> "Server":
        for line in self.process.stderr:
            if found := re.search(r"serving \S+ at (\S+)|running on (http\S+)", line):
                self.url = found[1] or found[2]
                break
        else:
            raise RuntimeError(f"the server ended: {self.process.args}")
        import threading

        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def memory(self) -> float:
        """Resident memory, MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000


def offline(folder: str, n_rows: int, n_tokens: int, n_requests: int) -> None:
    """Runs the engine alone on the same prompts, as many at a time as there are clients."""
    from llama import Llama

    llama = Llama.build(folder, None, 512, n_rows, device="cpu")
    prompts = [
        [(7 * j + 131 * number + 17 * i) % 256 + 1000 for j in range(N_PROMPT)]
        for i in range(n_requests)
        for number in range(n_rows)
    ]
    options: dict[str, Any] = {"temperature": 0, "max_gen_len": n_tokens}
    llama.generate(prompts[:n_rows], **options | {"max_gen_len": 4})  # packs
    started = time.perf_counter()
    tokens, _ = llama.generate(prompts, **options)
    seconds = time.perf_counter() - started
    print(json.dumps({"tokens": sum(map(len, tokens)), "seconds": seconds}))


def mask(folder: str, n_steps: int = 200) -> None:
    """Prints the time of a mask beside that of a step of one row."""
    import torch

    from llama import Llama
    from llama.decoding.grammar import Grammars
    from llama.options import DecodingOptions

    llama = Llama.build(folder, None, 512, 1, device="cpu")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["name", "tags"],
        "additionalProperties": False,
    }
    option, grammars = DecodingOptions(json_schema=schema), Grammars(llama.tokenizer, llama.args.vocab_size)
    matcher, tokens = grammars.start(option), []
    logits = torch.randn(llama.args.vocab_size)
    seconds, generator = [], torch.Generator().manual_seed(0)
    for _ in range(n_steps):
        started = time.perf_counter()
        masked, is_whole = matcher.mask(logits, tokens), matcher.is_complete(tokens)
        seconds.append(time.perf_counter() - started)
        token = int(torch.multinomial(masked.softmax(-1), 1, generator=generator))
        if token in llama.tokenizer.stop_tokens or is_whole:
            matcher, tokens = grammars.start(option), []
        else:
            tokens.append(token)
    prompt = [[1000 + i % 256 for i in range(N_PROMPT)]]
    llama.generate(prompt, 4, temperature=0)
    started = time.perf_counter()
    tokens, _ = llama.generate(prompt, 24, temperature=0)
    step = (time.perf_counter() - started) / len(tokens[0])
    median = percentile(seconds, 50)
    print(f"mask {1e6 * median:.0f} µs median, {1e6 * percentile(seconds, 99):.0f} µs p99; a step {1e3 * step:.1f} ms:")
    print(f"a mask is {median / step:.2%} of a step")


def main(
    shape: str = "llama-3.2-1b",
    folder: str | None = None,
    clients: str | int | tuple = (1, 8, 32),
    requests: int = 3,
    tokens: int = 32,
    minutes: float = 0.0,
    mask: bool = False,
    beside: bool = True,
) -> None:
    """Measures and prints.

    Args:
        shape: one of benchmarks.shapes.PARAMS.
        folder: where the checkpoint is or will be; /tmp/llama-benchmarks/SHAPE when left out.
        clients: how many at a time, one number or several.
        requests: how many requests each client sends.
        tokens: how many tokens each answer has.
        minutes: how long 32 clients keep sending.
        mask: measures the mask of a JSON schema instead.
        beside: measures llama-cpp-python's server too, if it is there.
    """
    path = str(folder or default_folder(shape))
    write_random_checkpoint(Path(path), shape)
    if mask:
        _self("mask", path)
        return
    for n in (clients,) if isinstance(clients, int) else tuple(clients):
        rows = min(n, 32)
        alone = [_alone(path, rows, tokens, requests)]
        options = ["--ckpt_dir", path, "--port", "0", "--max_seq_len", "512", "--max_batch_size", str(rows)]
        with Server([sys.executable, "-m", "llama", "serve", "--no_web", "--model_name", "m", *options]) as server:
            asyncio.run(load(server.url, "m", rows, 1, 4))  # packs
            found = asyncio.run(load(server.url, "m", n, requests, tokens))
            print(f"{n} clients: server {found}", flush=True)
            if minutes and n == 32:
                memory = [server.memory()]
                for quarter in range(4):
                    long = asyncio.run(load(server.url, "m", n, 0, tokens, 15 * minutes))
                    memory.append(server.memory())
                    print(f"quarter {quarter + 1} of {minutes:g} minutes: {long}")
                print(f"memory at the start and after each quarter, MB: {', '.join(f'{m:.0f}' for m in memory)}")
        alone.append(_alone(path, rows, tokens, requests))
        mean = sum(alone) / 2
        print(f"{n} clients: engine alone {alone[0]:.1f} tokens/s before, {alone[1]:.1f} after;", end=" ")
        print(f"the server gives {found.n_tokens / found.seconds / mean:.3f} of their mean", flush=True)
        if beside and all(map(importlib.util.find_spec, ("llama_cpp", "gguf", "starlette_context"))):
            theirs = _llama_cpp(path, n, requests, tokens)
            print(f"{n} clients: llama-cpp-python {theirs}")
            ours = found.n_tokens / found.seconds
            print(f"{n} clients: the server gives {ours * theirs.seconds / theirs.n_tokens:.2f} times as much")


def _llama_cpp(path: str, n_clients: int, n_requests: int, n_tokens: int) -> Load:
    """The same load on llama-cpp-python's server."""
    from benchmarks.contestants import gguf_with_words

    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf_with_words(Path(path), WORDS))]
    threads = str(os.cpu_count())
    command += ["--n_threads", threads, "--n_threads_batch", threads, "--n_ctx", "512", "--port", "8977"]
    command += ["--interrupt_requests", "False"]  # else each request interrupts the one that runs
    with Server(command) as server:
        asyncio.run(load(server.url, "m", 1, 1, 4, as_text=True))
        return asyncio.run(load(server.url, "m", n_clients, n_requests, n_tokens, as_text=True))


def _alone(path: str, n_rows: int, n_tokens: int, n_requests: int) -> float:
    """Tokens/s of the engine without a server."""
    found = json.loads(_self("offline", path, n_rows, n_tokens, n_requests, capture=True).splitlines()[-1])
    return found["tokens"] / found["seconds"]


def _self(what: str, *args: object, capture: bool = False) -> str:
    """Runs a function of this file in a new process."""
    code = f"from benchmarks.serving import {what}; {what}(*{args!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=capture, text=True)
    return run.stdout


if __name__ == "__main__":
    fire.Fire(main)
