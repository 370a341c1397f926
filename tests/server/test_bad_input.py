"""Any bad input gets a 4xx in OpenAI's shape, or a closed connection, and running answers go on."""

import contextlib
import json
import re
import resource
import select
import socket
import threading

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx2", reason="the openai package brings it")
pytest.importorskip("schemathesis")

from pydantic import ValidationError  # noqa: E402
from running import Server  # noqa: E402

from benchmarks.server_checks import check_requests  # noqa: E402
from llama.server.protocol import ChatRequest  # noqa: E402

BODY = {"messages": [{"role": "user", "content": "What is 21 + 34?"}], "temperature": 0, "max_tokens": 12}
PATH = "/v1/chat/completions"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server():
    with Server("--max_seq_len", "256", "--no_web", "--max_body", "200000") as running:
        yield running


@pytest.fixture(scope="module")
def expected(server) -> str:
    return ask(server)


@pytest.fixture(autouse=True)
def a_running_answer_is_not_touched(server, expected):
    """A client gets the same answer during and after each test as before; the test starts after its first line."""
    found: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with httpx.stream("POST", server.url + PATH, json={**BODY, "stream": True}, timeout=120) as response:
            pieces = []
            for line in response.iter_lines():
                begun.set()
                if line.startswith("data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
        found.append("".join(pieces))

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(120)
    yield
    thread.join(120)
    assert found == [expected] and ask(server) == expected


def ask(server: Server) -> str:
    response = httpx.post(server.url + "/v1/chat/completions", json=BODY, timeout=120)
    return response.json()["choices"][0]["message"]["content"]


def send(server: Server, body: bytes, path: str = PATH) -> "httpx.Response":
    return httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"}, timeout=60)


MALFORMED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe{}",
    b"{'messages': 1}",
    b"[" * 100_000,
    b'{"messages":' * 10_000,
    json.dumps(BODY | {"temperature": float("nan")}).encode(),
    json.dumps(BODY | {"temperature": float("inf")}).encode(),
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    json.dumps(BODY | {"messages": "hello"}).encode(),
    json.dumps(BODY | {"messages": [1, 2]}).encode(),
    json.dumps(BODY | {"messages": [{"role": "assistant", "content": "I begin"}]}).encode(),
    json.dumps(BODY | {"stop": [""]}).encode(),
    json.dumps(BODY | {"seed": 2**70}).encode(),
    json.dumps(BODY | {"regex": "(" * 3000}).encode(),
    json.dumps(BODY | {"grammar": "start: start"}).encode(),
]


def test_a_malformed_body_is_a_4xx_in_openais_shape(server):
    with httpx.Client(timeout=60) as client:
        for body in MALFORMED:
            response = client.post(server.url + PATH, content=body, headers={"Content-Type": "application/json"})
            assert 400 <= response.status_code < 500, (body[:50], response.text)
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}, body[:50]


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{}] * 9},
        {"messages": [{"role": "user", "content": [{}] * 2000}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}] * 9}]},
        {"logit_bias": {str(i): "x" for i in range(2000)}},
        {f"k{i}": 0 for i in range(9)},
        {"stream": True, "stream_options": {f"k{i}": 0 for i in range(9)}},
        {"tools": [{}] * 9},
        {"choice": [1] * 9},
    ],
    ids=lambda more: next(iter(more)),
)
def test_only_the_first_of_many_mistakes_is_reported(more):
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(BODY | more)
    assert caught.value.error_count() <= 2  # of one element


def test_a_text_or_a_list_that_cannot_fit_is_refused_before_it_is_tokenized(server):
    for text in ({"prompt": "x" * 150_000}, {"messages": [{"role": "user", "content": "x" * 150_000}]}):
        path = PATH if "messages" in text else "/v1/completions"
        response = send(server, json.dumps(text).encode(), path)
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
        assert re.search(r"at least \d+ tokens: expected at most 256", response.json()["error"]["message"])
    response = send(server, json.dumps({"prompt": ["x"] * 30_000}).encode(), "/v1/completions")
    assert response.status_code == 400 and "30000 answers: expected at most" in response.json()["error"]["message"]


def test_a_client_that_is_still_sending_a_too_large_body_gets_the_413(server):
    size = 20_000_000
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        link.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % size)
        select.select([link], [], [], 60)  # now it is refused, and the client goes on sending
        link.sendall(b"x" * size)
        assert link.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_wrong_paths_and_methods_have_openais_shape(server):
    assert httpx.get(server.url + "/v2/nothing").json()["error"]["type"] == "not_found_error"
    response = httpx.get(server.url + "/v1/chat/completions")
    assert response.status_code == 405 and "error" in response.json()


def test_a_body_of_100_mb_is_refused_before_it_is_read(server):
    before = server.memory()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        link.sendall(HEAD + b"Content-Length: 104857600\r\n\r\n")
        assert link.recv(4096).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        link.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = b""
        try:
            for _ in range(1600):
                link.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except OSError:
            pass  # the server has closed the connection
        try:
            answer = link.recv(4096)
        except OSError:
            answer = b""
        assert answer == b"" or answer.startswith(b"HTTP/1.1 413 ")
    assert server.memory() - before < 50_000_000


def test_many_large_bodies_at_once_are_refused_before_all_are_in_memory(server):
    before = server.memory()
    links, statuses = [], []
    try:
        for _ in range(60):  # each sends nearly the 200,000 bytes that are allowed, and does not finish
            links.append(link := socket.create_connection(("127.0.0.1", server.port), timeout=60))
            link.sendall(HEAD + b"Content-Length: 190000\r\n\r\n" + b"x" * 180_000)
            link.settimeout(0.05 if len(links) < 60 else 60)
            with contextlib.suppress(TimeoutError):
                statuses.append(link.recv(4096).split(b" ")[1])
        assert b"429" in statuses and set(statuses) == {b"429"}
    finally:
        for link in links:
            link.close()
    assert server.memory() - before < 30_000_000


def test_endless_headers_close_the_connection_and_leave_no_memory_in_use(server):
    before = server.memory()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        link.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for i in range(200_000):
                link.sendall(b"X-%d: %s\r\n" % (i, b"x" * 100))
    assert server.memory() - before < 20_000_000


def test_what_is_not_http_is_a_400_or_closed(server):
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00", b"HELO\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
            link.sendall(garbage)
            link.shutdown(socket.SHUT_WR)
            answer = link.recv(4096)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


def test_a_client_that_reads_a_byte_at_a_time_gets_its_answer_and_delays_nobody(server):
    body = json.dumps(BODY | {"stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        link.sendall(HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        read = b""
        while len(read) < 50:
            read += link.recv(1)
        ask(server)
        while more := link.recv(1):
            read += more
    assert read.rstrip().endswith(b"0") and b"[DONE]" in read


def test_silent_and_half_open_connections_block_nothing_and_memory_is_bounded(server):
    before = server.memory()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    links = []
    try:
        for i in range(min(10_000, most - 200)):
            link = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            if i % 2:
                with contextlib.suppress(OSError):  # above the limit the server closes it at once
                    link.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost")
            links.append(link)
    finally:
        for link in links:
            link.close()
    is_served = False
    while not is_served:  # until the server has noticed that they are gone
        with contextlib.suppress(httpx.TransportError):
            is_served = httpx.get(server.url + "/health", timeout=60).status_code == 200
    assert server.memory() - before < 100_000_000


def test_made_up_requests_give_no_500(server):
    """Valid and invalid ones, from the OpenAPI document; `python -m benchmarks.server_checks` sends a thousand."""
    statuses = check_requests(server.url, 56)
    assert sum(statuses.values()) >= 56 and statuses[200] >= 5 and statuses[400] > 20
