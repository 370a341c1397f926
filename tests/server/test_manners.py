"""Limits, clients that leave, requests that come too late, and how the server stops."""

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx2", reason="the openai package brings it")

from conftest import DEMO, split_checkpoint  # noqa: E402
from running import Server  # noqa: E402

LONG = {"prompt": "Once upon a time", "max_tokens": 480, "temperature": 1.0, "seed": 1, "logit_bias": {}}
SHORT = {"prompt": "Once upon a time", "max_tokens": 2, "temperature": 0}
SMALL = ("--max_seq_len", "512", "--no_web")


def never_ending(server: Server, n_more: int = 0) -> dict:
    """A request whose answer fills the whole context: its regex allows no end token."""
    tokenizer = httpx.post(server.url + "/tokenize", json={"prompt": "x"}).json()
    return {**LONG, "max_tokens": tokenizer["max_model_len"] - 10, "regex": "[a-z ]{2000,}", "seed": n_more}


def metric(server: Server, name: str) -> float:
    text = httpx.get(server.url + "/metrics").text
    return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])


def wait_for(condition, seconds: float = 60) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.01)


def begin(server: Server, **more) -> tuple["httpx.Client", "httpx.Response", Iterator[str]]:
    """Begins a stream; returns when its first chunk has come, with an iterator over the others."""
    client = httpx.Client(timeout=120)
    request = client.build_request(
        "POST", server.url + "/v1/completions", json=never_ending(server) | {"stream": True} | more
    )
    response = client.send(request, stream=True)
    assert response.status_code == 200
    chunks = response.iter_text()
    next(chunks)
    return client, response, chunks


@pytest.fixture(scope="module")
def server():
    with Server(*SMALL, "--max_batch_size", "1", "--max_waiting", "1", "--max_body", "20000") as running:
        yield running


# An engine that sends before each step how many answers run and wait, and runs the step when it is told to.
GATED = f"""
import os, socket
from llama import Llama
from llama.server import Settings, serve

def load():
    llama = Llama.build({str(DEMO)!r}, max_seq_len=512, max_batch_size=3, device="cpu", dtype="float32")
    engine, step = llama._engine, llama._engine.step
    gate = socket.create_connection(("127.0.0.1", int(os.environ["GATE"])))
    def gated():
        gate.sendall(b"%d %d\\n" % (len(engine.running), len(engine.waiting)))
        assert gate.recv(1)
        return step()
    engine.step = gated
    return llama

serve(load, Settings(port=0, no_web=True, max_waiting=1), "m")
"""


class Gated:
    """A server whose engine steps when it is told to, with three running answers and one that waits.

    Attributes:
        links: the clients' connections. The first answer has 30 tokens, the others fill the context; three stream.
    """

    def __init__(self, server: Server, gate: socket.socket):
        self._gate, self._counts = gate, gate.makefile()
        self.links: list[socket.socket] = []
        for streamed in (True, True, False, True):
            what = {"max_tokens": 30} if not self.links else {"regex": "[a-z ]{2000,}"}
            body = json.dumps(LONG | {"stream": streamed} | what).encode()
            self.links.append(link := socket.create_connection(("127.0.0.1", server.port), timeout=60))
            link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            link.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            if len(self.links) == 1:
                self.step_until("1 0")
                self.step()
        self.step_until("3 1")

    def step(self) -> None:
        self._gate.sendall(b"x")

    def step_until(self, expected: str) -> None:
        """Steps until the engine reports the expected numbers of running and waiting answers."""
        while (found := self._counts.readline().strip()) != expected:
            assert found, "the engine is gone"
            self.step()

    def counts(self) -> str:
        """How many answers run and wait, before the next step."""
        return self._counts.readline().strip()


@pytest.fixture
def gated():
    ear = socket.create_server(("127.0.0.1", 0))
    with ear, Server(code=GATED, GATE=str(ear.getsockname()[1])) as server:
        gate = ear.accept()[0]
        gate.settimeout(60)
        yield server, Gated(server, gate)


def test_clients_that_leave_free_their_slots_or_places_in_the_queue_within_one_step_streaming_or_not(gated):
    server, engine = gated
    for link in engine.links[1:]:
        link.close()
    for _ in range(2):  # whose answers come after the server has seen the clients leave
        httpx.get(server.url + "/health")
    engine.step()
    assert engine.counts() == "1 0"


def test_a_full_queue_is_a_429_with_retry_after_and_the_running_answer_goes_on(gated):
    server, engine = gated
    refused = httpx.post(server.url + "/v1/completions", json=SHORT, timeout=60)
    assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert httpx.get(server.url + "/health").status_code == 200
    assert (metric(server, "llama_running"), metric(server, "llama_waiting")) == (3, 1)
    engine.step()
    engine.step_until("3 0")  # the first answer has its 30 tokens, and the one that waited has its slot
    text = b""
    while not text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        text += engine.links[0].recv(4096)
    assert text.startswith(b"HTTP/1.1 200 ") and text.count(b"data: {") > 20


def test_a_request_for_more_answers_than_can_ever_wait_is_a_400(server):
    refused = httpx.post(server.url + "/v1/completions", json=SHORT | {"prompt": ["a", "b", "c"]})
    assert refused.status_code == 400 and "3 answers: expected at most 2" in refused.json()["error"]["message"]


def test_a_large_body_is_a_413_whether_its_length_is_announced_or_not(server):
    body = json.dumps(SHORT | {"prompt": "x" * 30_000}).encode()
    headers = {"Content-Type": "application/json"}
    for content in (body, iter([body[:15_000], body[15_000:]])):  # the second is sent in chunks
        response = httpx.post(server.url + "/v1/completions", content=content, headers=headers)
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


def test_keys_from_all_three_sources_are_accepted_and_nothing_else_is(tmp_path):
    file = tmp_path / "keys"
    file.write_text("from-file\n\n")
    keys = ("--api_key", "first,second", "--api_key_file", str(file))
    with Server(*SMALL, *keys, LLAMA_API_KEY="from-environment") as server:
        ask = lambda **headers: httpx.get(server.url + "/v1/models", headers=headers).status_code  # noqa: E731
        for key in ("first", "second", "from-file", "from-environment"):
            assert ask(Authorization=f"Bearer {key}") == 200
        for wrong in ("Bearer third", "Bearer", "Bearer first,second", "first", "Basic !!", ""):
            assert ask(Authorization=wrong) == 401
        assert ask() == 401
        assert httpx.get(server.url + "/metrics").status_code == 401
        assert httpx.get(server.url + "/health").status_code == 200
        assert "first" not in server.log and "from-file" not in server.log


def test_no_prompt_and_no_answer_is_in_the_log_unless_asked_for(server):
    with Server(*SMALL, "--log_content") as other:
        for running, is_there in ((server, False), (other, True)):
            asked = SHORT | {"prompt": "a secret"}
            answer = httpx.post(running.url + "/v1/completions", json=asked, timeout=60).json()
            text = answer["choices"][0]["text"]
            if is_there:
                wait_for(lambda: "answer " in other.log)
            assert ("a secret" in running.log) == is_there
            assert (json.dumps(text) in running.log) == is_there


def test_a_browser_page_of_another_origin_may_call_the_server_only_if_it_is_named(server):
    ask = lambda server, origin: httpx.get(server.url + "/v1/models", headers={"Origin": origin}).headers  # noqa: E731
    assert "access-control-allow-origin" not in ask(server, "https://example.org")
    with Server(*SMALL, "--cors_origins", "https://example.org") as other:
        assert ask(other, "https://example.org")["access-control-allow-origin"] == "https://example.org"
        assert "access-control-allow-origin" not in ask(other, "https://example.com")


def test_a_request_that_takes_too_long_is_a_504_and_frees_its_slot():
    with Server(*SMALL, "--timeout", "0.2", "--max_batch_size", "1", "--max_seq_len", "2048") as server:
        response = httpx.post(server.url + "/v1/completions", json=never_ending(server), timeout=60)
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        wait_for(lambda: metric(server, "llama_waiting") == 0)
        with httpx.Client(timeout=60) as client:
            body = never_ending(server) | {"stream": True}
            text = client.post(server.url + "/v1/completions", json=body).text
        assert '"code":"timeout"' in text and "[DONE]" not in text


def test_after_sigterm_running_answers_finish_new_requests_are_refused_and_the_exit_code_is_0():
    with Server("--no_web", "--max_seq_len", "100") as server:
        client, _, running = begin(server)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not listens(server))
        assert "".join(running).endswith("data: [DONE]\n\n")
        client.close()
        assert server.process.wait(60) == 0


def test_an_answer_that_outlasts_the_grace_gets_an_error_and_the_exit_code_is_0():
    with Server(*SMALL, "--grace", "0.1", "--max_seq_len", "4096") as server:
        client, _, running = begin(server)
        server.process.send_signal(signal.SIGTERM)
        assert "the server was stopped" in "".join(running)
        client.close()
        assert server.process.wait(60) == 0


def listens(server: Server) -> bool:
    try:
        httpx.get(server.url + "/health", timeout=5)
        return True
    except httpx.TransportError:
        return False


def test_the_server_ends_when_another_rank_is_killed(tmp_path):
    folder = split_checkpoint(DEMO, tmp_path / "split", 2, "rows")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Started as torchrun would, but without torchrun, which would end the server anyway.
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = (*SMALL, "--ckpt_dir", str(folder))
    follower = Server(*options, wait=False, RANK="1", LOCAL_RANK="1", **place)
    try:
        with Server(*options, RANK="0", LOCAL_RANK="0", **place) as server:
            assert httpx.post(server.url + "/v1/completions", json=SHORT, timeout=60).status_code == 200
            follower.process.send_signal(signal.SIGKILL)
            started = time.monotonic()
            assert server.process.wait(60) not in (0, None)
            assert time.monotonic() - started < 15
    finally:
        follower.process.send_signal(signal.SIGKILL)


def test_if_the_model_cannot_be_loaded_the_process_ends_and_prints_the_reason():
    with Server("--ckpt_dir", "/nowhere", wait=False) as server:
        assert server.process.wait(60) == 1
        assert "the engine has failed: FileNotFoundError" in server.log


BREAKS = f"""
import os, threading
from llama import Llama
from llama.server import Settings, serve

def load():
    if os.environ.get("SLOWLY"):
        threading.Event().wait()
    llama = Llama.build({str(DEMO)!r}, max_seq_len=512, device="cpu", dtype="float32")
    step, steps = llama._engine.step, iter(range(40))
    def broken():
        if next(steps, None) is None:
            raise RuntimeError("the device is on fire")
        return step()
    llama._engine.step = broken
    return llama

serve(load, Settings(port=0, no_web=True), "m")
"""


def test_a_failed_engine_fails_its_requests_and_the_process_ends_with_1():
    with Server(code=BREAKS) as server:
        client, _, running = begin(server)
        assert "the device is on fire" in "".join(running)
        client.close()
        assert server.process.wait(60) == 1


def test_while_the_model_is_loading_every_endpoint_returns_503():
    with Server(code=BREAKS, wait=False, SLOWLY="1") as server:
        health = httpx.get(server.url + "/health", timeout=60)
        assert health.status_code == 503 and health.json()["error"]["code"] == "loading"
        assert httpx.post(server.url + "/v1/completions", json=SHORT, timeout=60).status_code == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def test_a_bad_option_of_the_server_is_an_error_before_anything_is_loaded(tmp_path):
    for options, message in (
        (("--port", "70000"), "port = 70000"),
        (("--api_key", ""), "at least one key"),
        (("--api_key_file", str(tmp_path / "none")), "No such file"),
        (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1:0"),
        (("--max_waiting", "-1"), "max_waiting = -1"),
    ):
        server = Server(*options, wait=False)
        assert server.process.wait(60) == 2
        wait_for(lambda server=server, message=message: message in server.log)
