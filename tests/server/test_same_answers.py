"""64 requests at once, half of them streamed, some cancelled half-way: each finished answer equals the offline one."""

import asyncio
import os
import signal

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai")

from conftest import DEMO, split_checkpoint  # noqa: E402
from running import Server  # noqa: E402

from llama import Llama  # noqa: E402

N = 64


def requests() -> list[tuple[list[dict], dict]]:
    found = []
    for i in range(N):
        asked = f"What is {10 + i} + {99 - i}?" if i % 3 else f"Tell me about the number {i}."
        how = {"temperature": 0} if i % 2 else {"temperature": 1.0, "seed": 1000 + i, "top_p": 0.95}
        found.append(([{"role": "user", "content": asked}], {"max_tokens": 4 + i % 9, **how}))
    return found


async def ask_all(url: str) -> list[str | None]:
    """The answers; None if the client has left after its second chunk."""
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def ask(i: int, messages: list[dict], options: dict) -> str | None:
            create = client.chat.completions.create
            if i % 4 < 2:
                found = await create(model="m", messages=messages, **options)
                return found.choices[0].message.content
            text, n_chunks = "", 0
            async with await create(model="m", messages=messages, stream=True, **options) as stream:
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                    n_chunks += 1
                    if i % 8 == 3 and n_chunks == 3:
                        return None
            return text

        return await asyncio.gather(*(ask(i, *request) for i, request in enumerate(requests())))


@pytest.fixture(scope="module")
def alone(demo: Llama) -> list[str]:
    """The answers of `Llama.chat_completion`, one call after the other."""
    answers = []
    for messages, options in requests():
        given = {"top_p": 1.0, **options}
        (prediction,) = demo.chat_completion([messages], max_gen_len=given.pop("max_tokens"), **given)
        answers.append(prediction["generation"]["content"])
    return answers


@pytest.mark.parametrize("processes", [1, 2])
def test_64_requests_at_once_get_the_same_answers_as_each_alone(processes, alone, tmp_path):
    folder = DEMO if processes == 1 else split_checkpoint(DEMO, tmp_path / "split", 2, "rows")
    options = ("--ckpt_dir", str(folder), "--model_name", "m", "--max_seq_len", "512", "--no_web")
    with Server(*options, processes=processes) as server:
        answers = asyncio.run(ask_all(server.url))
        os.kill(server.ranks[0], signal.SIGTERM)
        assert server.process.wait(60) == 0  # all ranks have ended
    assert sum(answer is None for answer in answers) == N // 8
    assert [a for a in answers if a is not None] == [e for e, a in zip(alone, answers) if a is not None]
