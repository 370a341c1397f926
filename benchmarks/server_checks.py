"""The server's random tests at full size: `python -m benchmarks.server_checks`.

schemathesis makes up requests from a server's OpenAPI document, half of which violate it: none may get a 500. And the
embedded checkpoint answers with generated JSON schemas at temperature 1: every answer that ends by itself must be
valid. Needs the extra `test`.

    python -m benchmarks.server_checks --requests 1000 --schemas 2000
"""

import collections
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fire
import torch

from llama import Llama
from llama.decoding.grammar import Grammars
from llama.options import DecodingOptions

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo" / "checkpoint"
SUM = [{"role": "user", "content": "What is 21 + 34?"}]


def random_schema(rng: random.Random, depth: int = 0, defs: tuple[str, ...] = ()) -> dict:
    """A schema of objects, arrays, enums, bounded numbers and `$ref`, nested up to three deep."""
    kinds = ["integer", "number", "enum", "boolean", "null", "string"]
    kind = rng.choice(kinds + (["object", "array"] * 3 if depth < 3 else []) + (["ref"] if defs else []))
    if kind == "ref":
        return {"$ref": f"#/$defs/{rng.choice(defs)}"}
    if kind == "integer":
        low = rng.randint(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
    if kind == "number":
        low = rng.randint(-100, 100)
        return {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 50)}
    if kind == "enum":
        return {"enum": rng.sample(["a", "b c", 1, 2.5, None, True, "é", 'x"y'], rng.randint(1, 4))}
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(1, 8)}
    if kind == "array":
        low = rng.randint(0, 2)
        items = random_schema(rng, depth + 1, defs)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if kind == "object":
        names = rng.sample(["id", "name", "a b", "ß", "x"], rng.randint(1, 3))
        properties = {name: random_schema(rng, depth + 1, defs) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def schemas(n: int) -> list[dict]:
    """n schemas, the same each time."""
    made = []
    for seed in range(n):
        rng = random.Random(seed)
        defs = {"p": random_schema(rng, 2), "q": random_schema(rng, 3)} if seed % 2 else {}
        made.append({**random_schema(rng, 0, tuple(defs)), **({"$defs": defs} if defs else {})})
    return made


def check_schemas(llama: Llama, n: int) -> int:
    """Answers with n schemas at temperature 1; how many ended by themselves. Raises ValidationError if one is wrong."""
    import jsonschema

    wanted = schemas(n)
    prompts = [llama.formatter.encode_dialog_prompt(SUM)] * n
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 1, "max_gen_len": 200}
    n_ended = 0
    for schema, (answer,) in zip(wanted, llama.answer(prompts, json_schema=wanted, **options)):
        if answer.finish_reason == "stop":
            n_ended += 1
            jsonschema.validate(json.loads(answer.text), schema)
    return n_ended


def check_greedy(llama: Llama, n: int) -> int:
    """Compares greedy answers with those of trying every token; returns the number of tokens. Raises AssertionError."""
    prompt = llama.formatter.encode_dialog_prompt(SUM)
    grammars, n_tokens = Grammars(llama.tokenizer, llama.args.vocab_size), 0
    for schema in schemas(n):
        at_the_start = grammars.start(DecodingOptions(json_schema=schema))._matcher

        def try_every_token(ids: torch.Tensor, logits: torch.Tensor, matcher: Any = at_the_start) -> torch.Tensor:
            matcher = matcher.deep_copy()
            matcher.try_consume_tokens(ids[0, len(prompt) :].tolist())
            for token in logits[0].argsort(descending=True).tolist():
                may_end = token in llama.tokenizer.stop_tokens and matcher.is_accepting()
                if may_end or matcher.deep_copy().try_consume_tokens([token]) == 1:
                    return torch.full_like(logits, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)
            raise AssertionError("no token fits")

        ((slow,),) = llama.answer([prompt], temperature=0, max_gen_len=60, logits_processor=try_every_token)
        ((fast,),) = llama.answer([prompt], temperature=0, max_gen_len=60, json_schema=schema)
        assert fast.tokens == slow.tokens, (schema, fast.text, slow.text)
        n_tokens += len(fast.tokens)
    return n_tokens


def _mend(path: str, body: dict) -> None:
    """Corrects what is nearly always wrong in a made-up request, so that the server looks at the rest of it."""
    body.pop("model", None)
    if "/v1/" in path:
        body["max_tokens"] = 2  # long answers are tested elsewhere
    if isinstance(messages := body.get("messages"), list):
        messages += SUM  # the last message must be the user's
        if "/v1/" not in path and len(messages) % 2:
            body.pop("prompt", None)
    if isinstance(tokens := body.get("tokens"), list) and len(tokens) % 2:
        body["tokens"] = [token % 3000 if isinstance(token, int) else token for token in tokens]


def check_requests(url: str, n: int) -> dict[int, int]:
    """Sends about n made-up requests; returns the count of each status. AssertionError if one is 500 or above."""
    import httpx2
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode

    statuses: dict[int, int] = collections.Counter()
    operations = [result.ok() for result in schemathesis.openapi.from_url(url + "/openapi.json").get_all_operations()]
    posts = [operation for operation in operations if operation.method == "post"]
    with httpx2.Client(timeout=120) as client:
        for operation in operations:

            def check(case) -> None:
                if isinstance(case.body, dict):
                    _mend(case.path, case.body)
                made = case.as_transport_kwargs(base_url=url)
                headers = {k: v for k, v in made["headers"].items() if k.lower() != "content-length"}
                what = {"headers": headers, "json": made.get("json"), "params": made.get("params")}
                response = client.request(made["method"], made["url"], **what)
                statuses[response.status_code] += 1
                assert response.status_code < 500, (made, response.text)

            modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if operation in posts else [None]
            how = settings(
                max_examples=-(-n // len(posts) // 2) if operation in posts else 3,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=[*HealthCheck],
            )
            for mode in modes:
                made_up = operation.as_strategy(**({} if mode is None else {"generation_mode": mode}))
                how(given(case=made_up)(check))()
    return dict(sorted(statuses.items()))


def main(requests: int = 1000, schemas: int = 2000, greedy: int = 100) -> None:
    """Checks and prints.

    Args:
        requests: how many requests to make up.
        schemas: how many answers with a schema.
        greedy: how many schemas to answer greedily too, and by trying every token.
    """
    command = [sys.executable, "-m", "llama", "serve", "--port", "0", "--device", "cpu", "--no_web"]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stderr:
                if found := re.match(r"serving \S+ at (\S+)", line):
                    statuses = check_requests(found[1], requests)
                    break
        finally:
            server.terminate()
    took = time.perf_counter() - started
    print(f"{sum(statuses.values())} made-up requests, by status: {statuses}; {took:.0f} s", flush=True)
    started = time.perf_counter()
    llama = Llama.build(DEMO, None, 512, 16, device="cpu", dtype="float32")
    n_ended = check_schemas(llama, schemas)
    took = time.perf_counter() - started
    print(f"{schemas} schemas: {n_ended} answers ended by themselves, all of them valid; {took:.0f} s", flush=True)
    n_tokens = check_greedy(llama, greedy)
    print(f"{greedy} schemas: {n_tokens} greedy tokens, all of them those of trying every token")


if __name__ == "__main__":
    fire.Fire(main)
