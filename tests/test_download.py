"""`download.sh` against a local HTTP server that serves small stand-ins for the models, and misbehaves on request.

Every test runs the script as a user does, in a fresh folder, with a PATH that holds curl or wget but not both, and with
no proxy or configuration file of the machine's. It knows nothing of the package `llama`.
"""

import hashlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "download.sh"
TOOLS = ["awk", "cat", "cp", "cut", "dd", "df", "head", "mkdir", "mv", "rm", "sed", "sleep", "tr", "wc"]
QUERY = "Policy=eyJ_abc~&Signature=s3cr3t-&Key-Pair-Id=K1"
SECRET = "s3cr3t"

missing = [tool for tool in ["bash", "md5sum", *TOOLS] if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"download.sh needs {', '.join(missing)}")


class Seen(NamedTuple):
    """A request as the server saw it; `sent` is how many bytes of body went out."""

    path: str
    range: str | None
    status: int
    sent: int


Fault = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` with ranges. `server.faults[path]` is a list: each request takes and obeys its first."""

    server: "Server"

    def do_GET(self) -> None:
        url = re.sub(r"^http://[^/]*/", "/", self.path)  # a proxy is asked for the whole URL
        path, _, query = url.partition("?")
        self.name = path.lstrip("/")
        faults = self.server.faults.get(self.name, [])
        body = self.server.files.get(self.name)
        if query != QUERY:
            self.answer(403, b"<?xml version='1.0'?><Error>AccessDenied</Error>", "application/xml")
        elif faults:
            faults.pop(0)(self, body or b"")
        elif body is None:
            self.answer(404, b"<html>no such file</html>", "text/html")
        else:
            self.serve(body)

    def serve(self, body: bytes, ranges: bool = True, stop_after: int | None = None) -> None:
        """`body`, or what Range asks of it; the connection breaks off after `stop_after` bytes."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "") if ranges else None
        start = int(asked[1]) if asked else 0
        if asked and start >= len(body):
            self.answer(416, b"", headers={"Content-Range": f"bytes */{len(body)}"})
            return
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if asked else {}
        self.answer(206 if asked else 200, body[start:], headers=headers, stop_after=stop_after)

    def answer(
        self,
        status: int,
        body: bytes,
        content_type: str = "binary/octet-stream",
        headers: dict[str, str] | None = None,
        stop_after: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = body[:stop_after]
        self.wfile.write(sent)
        self.wfile.flush()
        self.server.seen.append(Seen(self.name, self.headers.get("Range"), status, len(sent)))
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.seen: list[Seen] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/*?{QUERY}"

    def requests(self, path: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.path == path]


def breaks_off(after: int, ranges: bool = True) -> Fault:
    return lambda handler, body: handler.serve(body, ranges=ranges, stop_after=after)


def answers(status: int, body: bytes = b"<html>error</html>", content_type: str = "text/html") -> Fault:
    return lambda handler, _: handler.answer(status, body, content_type)


def ignores_range(handler: Handler, body: bytes) -> None:
    handler.serve(body, ranges=False)


def sends_other_bytes(handler: Handler, body: bytes) -> None:
    headers = {"Content-Range": f"bytes 0-{len(body) - 1}/{len(body)}"}
    handler.answer(206, body, headers=headers)


def corrupt(handler: Handler, body: bytes) -> None:
    handler.serve(body[:-1] + bytes([body[-1] ^ 1]))


def checklist(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in files.items()).encode()


def blob(seed: int, size: int = 100_000) -> bytes:
    return b"PK\x03\x04" + random.Random(seed).randbytes(size)


L3 = "8b_instruction_tuned"
SHARD = f"{L3}/consolidated.00.pth"
L3_FOLDER = "Meta-Llama-3-8B-Instruct"
L2_TOKENIZER = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02" + bytes(range(256))  # how the real one begins


def put_llama3(server: Server, remote: str, shards: int) -> dict[str, bytes]:
    files = {f"consolidated.{i:02d}.pth": blob(i) for i in range(shards)}
    files |= {"params.json": b'{"dim": 4096}\n', "tokenizer.model": b"IQ== 0\nIg== 1\n"}
    files["checklist.chk"] = checklist(files)
    server.files |= {f"{remote}/{name}": data for name, data in files.items()}
    server.files |= {"LICENSE": b"META LLAMA 3 COMMUNITY LICENSE\n", "USE_POLICY": b"# Policy\n"}
    return files


def put_llama2(server: Server, remote: str, shards: int) -> dict[str, bytes]:
    files = {f"consolidated.{i:02d}.pth": blob(i + 50) for i in range(shards)} | {"params.json": b'{"dim": 4096}\n'}
    files["checklist.chk"] = checklist(files)
    server.files |= {f"{remote}/{name}": data for name, data in files.items()}
    root = {"tokenizer.model": L2_TOKENIZER, "tokenizer_checklist.chk": checklist({"tokenizer.model": L2_TOKENIZER})}
    server.files |= root | {"LICENSE": b"LLAMA 2 LICENSE\n", "USE_POLICY.md": b"# Policy\n"}
    return files | root


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def link_tools(folder: Path, *tools: str) -> Path:
    folder.mkdir()
    for tool in tools:
        (folder / tool).symlink_to(str(shutil.which(tool)))
    return folder


class Script:
    """`download.sh` in a folder of its own, and the environment it runs in."""

    def __init__(self, folder: Path, bin: Path) -> None:
        self.home = folder / "home"
        self.target = folder / "target"
        self.home.mkdir()
        self.env = {"PATH": str(bin), "HOME": str(self.home), "LLAMA_RETRY_WAIT": "0"}

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        command = [str(shutil.which("bash")), str(SCRIPT), "--dir", str(self.target), *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            env=self.env | env,
            cwd=self.home,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            restore_signals=False,  # so that a file size limit is an error of write(), as a full disk is
        )

    def run(self, *args: str, stdin: str = "", **env: str) -> tuple[int, str]:
        process = self.start(*args, **env)
        output, _ = process.communicate(stdin, timeout=60)
        assert SECRET not in output
        assert list(self.home.iterdir()) == []  # nothing outside the target folder
        return process.returncode, output

    def files(self, folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.target / folder).iterdir())}

    def part(self, folder: str, name: str) -> Path:
        return self.target / folder / f"{name}.part"


@pytest.fixture(params=["curl", "wget"])
def client(request: pytest.FixtureRequest) -> str:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture
def script(tmp_path: Path, client: str) -> Script:
    return Script(tmp_path, link_tools(tmp_path / "bin", "md5sum", client, *TOOLS))


@pytest.fixture
def one_script(tmp_path: Path) -> Script:
    """With one client only, for what is decided before it is called."""
    client = next((name for name in ["curl", "wget"] if shutil.which(name)), None)
    if client is None:
        pytest.skip("neither curl nor wget is installed")
    return Script(tmp_path, link_tools(tmp_path / "bin", "md5sum", client, *TOOLS))


# ---------------------------------------------------------------- what it downloads


def test_llama3_model_arrives_whole_with_its_licence(server: Server, script: Script) -> None:
    files = put_llama3(server, L3, 1)
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 0, output
    papers = {name: server.files[name] for name in ["LICENSE", "USE_POLICY"]}
    assert script.files(L3_FOLDER) == files | papers


def test_llama2_models_get_the_tokenizer_into_each_folder_and_fetch_it_once(server: Server, script: Script) -> None:
    small, large = put_llama2(server, "llama-2-7b", 1), put_llama2(server, "llama-2-13b-chat", 2)
    code, output = script.run("--url", server.url, "7b,13B-chat")
    assert code == 0, output
    papers = {name: server.files[name] for name in ["LICENSE", "USE_POLICY.md"]}
    assert script.files("llama-2-7b") == small | papers
    assert script.files("llama-2-13b-chat") == large | papers
    assert len(server.requests("tokenizer.model")) == len(server.requests("LICENSE")) == 1


@pytest.mark.parametrize(
    ("name", "remote", "folder", "shards"),
    [
        ("8b", "8b_pre_trained", "Meta-Llama-3-8B", 1),
        ("70B", "70b_pre_trained", "Meta-Llama-3-70B", 8),
        ("meta-llama/Meta-Llama-3-70B-Instruct", "70b_instruction_tuned", "Meta-Llama-3-70B-Instruct", 8),
        ("llama-2-70b", "llama-2-70b", "llama-2-70b", 8),
        ("70B-chat", "llama-2-70b-chat", "llama-2-70b-chat", 8),
        ("Llama-2-7b-chat", "llama-2-7b-chat", "llama-2-7b-chat", 1),
        ("13B", "llama-2-13b", "llama-2-13b", 2),
    ],
)
def test_each_model_has_its_names_folder_and_shards(
    server: Server, one_script: Script, name: str, remote: str, folder: str, shards: int
) -> None:
    (put_llama2 if remote.startswith("llama-2") else put_llama3)(server, remote, shards)
    code, output = one_script.run(name, LLAMA_URL=server.url)
    assert code == 0, output
    assert len([file for file in one_script.files(folder) if file.endswith(".pth")]) == shards


def test_url_and_models_are_asked_for_and_read_from_standard_input(server: Server, script: Script) -> None:
    put_llama3(server, L3, 1)
    put_llama3(server, "8b_pre_trained", 1)
    code, output = script.run(stdin=f"{server.url}\n8B, 8b-instruct\n")
    assert code == 0, output
    assert "signed URL" in output and "llama-3-70b-instruct" in output
    assert {path.name for path in script.target.iterdir()} == {"Meta-Llama-3-8B", L3_FOLDER}


def test_a_complete_model_is_not_fetched_again(server: Server, script: Script) -> None:
    put_llama2(server, "llama-2-7b", 1)
    assert script.run("7B", LLAMA_URL=server.url)[0] == 0
    server.seen.clear()
    code, output = script.run("7B", LLAMA_URL=server.url)
    assert (code, server.seen) == (0, [])
    assert "complete" in output


def test_only_the_missing_file_of_a_model_is_fetched(server: Server, script: Script) -> None:
    files = put_llama3(server, "70b_pre_trained", 8)
    assert script.run("70B", LLAMA_URL=server.url)[0] == 0
    server.seen.clear()
    (script.target / "Meta-Llama-3-70B/consolidated.03.pth").unlink()
    assert script.run("70B", LLAMA_URL=server.url)[0] == 0
    assert [seen.path.split("/")[1] for seen in server.seen] == ["checklist.chk", "consolidated.03.pth"]
    assert files.items() <= script.files("Meta-Llama-3-70B").items()


def test_a_licence_the_server_lacks_does_no_harm(server: Server, script: Script) -> None:
    put_llama3(server, L3, 1)
    del server.files["LICENSE"]
    server.faults["USE_POLICY"] = [answers(403)]
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 0, output
    assert "LICENSE" not in script.files(L3_FOLDER)


def test_a_checklist_of_only_some_files_checks_those_and_names_the_others(server: Server, script: Script) -> None:
    files = put_llama3(server, L3, 1)
    server.files[f"{L3}/checklist.chk"] = checklist({"consolidated.00.pth": files["consolidated.00.pth"]})
    server.faults[f"{L3}/params.json"] = [breaks_off(5)]
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 0, output
    assert "params.json: in no checklist" in output and "consolidated.00.pth: in no" not in output
    assert script.files(L3_FOLDER)["params.json"] == files["params.json"]


# ---------------------------------------------------------------- broken downloads


def test_a_download_that_breaks_off_goes_on_where_it_stopped(server: Server, script: Script) -> None:
    files = put_llama3(server, L3, 1)
    size = len(files["consolidated.00.pth"])
    server.faults[SHARD] = [breaks_off(50_000)]
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 0, output
    first, second = server.requests(SHARD)
    assert (first.range, second.range) == (None, "bytes=50000-")
    assert second.sent == size - 50_000
    assert script.files(L3_FOLDER)["consolidated.00.pth"] == files["consolidated.00.pth"]


def test_attempts_are_bounded_and_the_part_is_kept_for_the_next_run(server: Server, script: Script) -> None:
    files = put_llama3(server, L3, 1)
    server.faults[SHARD] = [breaks_off(20_000) for _ in range(3)]
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url, LLAMA_RETRIES="3")
    assert code == 1
    assert f"{L3_FOLDER}/consolidated.00.pth: the connection failed or broke off" in output and "proxy" in output
    assert script.part(L3_FOLDER, "consolidated.00.pth").stat().st_size == 60_000
    assert "consolidated.00.pth" not in script.files(L3_FOLDER)
    assert script.run("8B-Instruct", LLAMA_URL=server.url)[0] == 0
    assert server.requests(SHARD)[-1].range == "bytes=60000-"
    assert script.files(L3_FOLDER)["consolidated.00.pth"] == files["consolidated.00.pth"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_half_way_it_leaves_a_part_and_resumes(server: Server, script: Script, number: signal.Signals) -> None:
    files = put_llama3(server, L3, 1)
    shard, released = files["consolidated.00.pth"], threading.Event()

    def stalls(handler: Handler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:65_536])
        handler.wfile.flush()
        released.wait(30)

    server.faults[SHARD] = [stalls]
    process = script.start("8B-Instruct", LLAMA_URL=server.url)
    part, tick = script.part(L3_FOLDER, "consolidated.00.pth"), threading.Event()
    while not (part.exists() and part.stat().st_size >= 32_768):
        assert process.poll() is None
        tick.wait(0.005)
    os.killpg(process.pid, number)  # the script and its curl or wget, as Ctrl-C does
    output, _ = process.communicate(timeout=30)
    released.set()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "consolidated.00.pth" not in script.files(L3_FOLDER)
    kept = part.stat().st_size
    assert 32_768 <= kept <= 65_536 and shard.startswith(part.read_bytes())

    assert script.run("8B-Instruct", LLAMA_URL=server.url)[0] == 0
    last = server.requests(SHARD)[-1]
    assert (last.range, last.sent) == (f"bytes={kept}-", len(shard) - kept)
    assert script.files(L3_FOLDER)["consolidated.00.pth"] == shard
    assert number != signal.SIGINT or "Interrupted" in output


@pytest.mark.parametrize("bad", [ignores_range, breaks_off(50_000, ranges=False)])
def test_a_server_that_ignores_range_yields_no_glued_file(server: Server, script: Script, bad: Fault) -> None:
    files = put_llama3(server, L3, 1)
    server.faults[SHARD] = [breaks_off(30_000), bad, ignores_range, ignores_range]
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 0, output
    assert server.requests(SHARD)[1].range == "bytes=30000-"
    assert script.files(L3_FOLDER)["consolidated.00.pth"] == files["consolidated.00.pth"]


def test_a_range_other_than_the_one_asked_for_is_not_glued_on(server: Server, script: Script) -> None:
    files = put_llama3(server, L3, 1)
    server.files[f"{L3}/checklist.chk"] = checklist({"params.json": files["params.json"]})  # no md5 to help
    server.faults[SHARD] = [breaks_off(30_000), sends_other_bytes]
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 0, output
    assert script.files(L3_FOLDER)["consolidated.00.pth"] == files["consolidated.00.pth"]


def test_attempts_that_bring_a_mebibyte_do_not_count(server: Server, script: Script) -> None:
    files = {"consolidated.00.pth": blob(7, 4 << 20)}
    put_llama3(server, L3, 1)
    server.files |= {SHARD: files["consolidated.00.pth"], f"{L3}/checklist.chk": checklist(files)}
    server.faults[SHARD] = [breaks_off(1_100_000) for _ in range(3)]
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url, LLAMA_RETRIES="2")
    assert code == 0, output
    assert len(server.requests(SHARD)) == 4


def test_a_server_that_ignores_range_and_always_breaks_off_is_given_up(server: Server, script: Script) -> None:
    put_llama3(server, L3, 1)
    server.faults[SHARD] = [breaks_off(30_000, ranges=False) for _ in range(100)]
    code, _ = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 1
    assert len(server.requests(SHARD)) <= 10


def test_a_part_that_is_already_whole_is_taken_without_a_second_download(server: Server, script: Script) -> None:
    files = put_llama3(server, L3, 1)
    part = script.part(L3_FOLDER, "consolidated.00.pth")
    part.parent.mkdir(parents=True)
    part.write_bytes(files["consolidated.00.pth"])
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 0, output
    assert [seen.status for seen in server.requests(SHARD)] == [416]
    assert script.files(L3_FOLDER)["consolidated.00.pth"] == files["consolidated.00.pth"]


@pytest.mark.parametrize("name", ["consolidated.00.pth.part", "consolidated.00.pth"])
@pytest.mark.parametrize("size", [50_000, 300_000])
def test_wrong_bytes_left_by_something_else_are_replaced(server: Server, script: Script, name: str, size: int) -> None:
    files = put_llama3(server, L3, 1)
    (script.target / L3_FOLDER).mkdir(parents=True)
    (script.target / L3_FOLDER / name).write_bytes(blob(99, size))
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 0, output
    assert script.files(L3_FOLDER)["consolidated.00.pth"] == files["consolidated.00.pth"]


def test_a_truncated_file_under_its_final_name_is_completed(server: Server, script: Script) -> None:
    files = put_llama3(server, L3, 1)
    shard = files["consolidated.00.pth"]
    (script.target / L3_FOLDER).mkdir(parents=True)
    (script.target / L3_FOLDER / "consolidated.00.pth").write_bytes(shard[:70_000])
    assert script.run("8B-Instruct", LLAMA_URL=server.url)[0] == 0
    assert [seen.range for seen in server.requests(SHARD)] == ["bytes=70000-"]
    assert script.files(L3_FOLDER)["consolidated.00.pth"] == shard


def test_a_corrupt_file_is_named_and_removed_and_the_others_arrive(server: Server, script: Script) -> None:
    put_llama3(server, "70b_pre_trained", 8)
    server.faults["70b_pre_trained/consolidated.02.pth"] = [corrupt]
    code, output = script.run("70B", LLAMA_URL=server.url)
    assert code == 1
    summary = output[output.index("Not everything") :]
    assert "consolidated.02.pth: the md5" in summary and summary.count("consolidated.") == 1
    names = script.files("Meta-Llama-3-70B")
    assert not [name for name in names if name.startswith("consolidated.02.pth")]
    assert len([name for name in names if name.endswith(".pth")]) == 7


def test_a_full_disk_says_so_and_keeps_the_part(server: Server, script: Script) -> None:
    files = put_llama3(server, L3, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, limit[1]))
    try:
        process = script.start("8B-Instruct", LLAMA_URL=server.url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"{L3_FOLDER}/consolidated.00.pth: cannot write: no space left" in output
    assert files["consolidated.00.pth"].startswith(script.part(L3_FOLDER, "consolidated.00.pth").read_bytes())
    assert script.run("8B-Instruct", LLAMA_URL=server.url)[0] == 0
    assert server.requests(SHARD)[-1].status == 206


# ---------------------------------------------------------------- answers that are no file


def test_a_403_says_what_to_do_and_asks_for_no_more_files(server: Server, script: Script) -> None:
    put_llama3(server, L3, 1)
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url.replace("Key-Pair-Id=K1", "Key-Pair-Id=K2"))
    assert code == 1
    assert f"{L3_FOLDER}/checklist.chk: 403" in output
    for advice in ["24 hours", "number of downloads", "Copy link address", "https_proxy", "quotes"]:
        assert advice in output
    assert len(server.seen) == 1
    assert script.files(L3_FOLDER) == {}


def test_a_link_that_expires_half_way_keeps_the_part(server: Server, script: Script) -> None:
    files = put_llama3(server, L3, 1)
    server.faults[SHARD] = [breaks_off(40_000), answers(403, b"<?xml?><Error/>", "application/xml")]
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 1 and "24 hours" in output
    part = script.part(L3_FOLDER, "consolidated.00.pth")
    assert part.read_bytes() == files["consolidated.00.pth"][:40_000]


def test_a_missing_file_is_named_and_not_retried(server: Server, script: Script) -> None:
    put_llama3(server, L3, 1)
    del server.files[f"{L3}/tokenizer.model"]
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 1
    assert f"{L3_FOLDER}/tokenizer.model: 404" in output and "24 hours" not in output
    assert len(server.requests(f"{L3}/tokenizer.model")) == 1
    assert "consolidated.00.pth" in script.files(L3_FOLDER)
    assert not [name for name in script.files(L3_FOLDER) if name.startswith("tokenizer.model")]


def test_a_server_that_fails_twice_is_asked_a_third_time(server: Server, script: Script) -> None:
    files = put_llama3(server, L3, 1)
    server.faults[SHARD] = [answers(500), answers(503)]
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 0, output
    assert [seen.status for seen in server.requests(SHARD)] == [500, 503, 200]
    assert script.files(L3_FOLDER)["consolidated.00.pth"] == files["consolidated.00.pth"]


def test_a_server_that_keeps_failing_is_given_up_and_named(server: Server, script: Script) -> None:
    put_llama3(server, L3, 1)
    server.faults[SHARD] = [answers(502) for _ in range(9)]
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url, LLAMA_RETRIES="4")
    assert code == 1
    assert "consolidated.00.pth: the server failed (502)" in output
    assert len(server.requests(SHARD)) == 4
    assert not [name for name in script.files(L3_FOLDER) if name.startswith("consolidated")]


@pytest.mark.parametrize(
    ("page", "content_type"),
    [
        (b"<html><body>Please log in</body></html>", "text/html; charset=utf-8"),
        (b"\xef\xbb\xbf\n <?xml version='1.0'?><Error/>", "binary/octet-stream"),
        (b"Access denied by your company", "text/html"),
    ],
)
@pytest.mark.parametrize("had", [0, 20_000])
def test_a_web_page_with_status_200_never_ends_up_in_a_pth(
    server: Server, script: Script, page: bytes, content_type: str, had: int
) -> None:
    """`had`: with a part of the file there already, which a page that says what it is leaves alone."""
    files = put_llama3(server, L3, 1)
    del server.files[f"{L3}/checklist.chk"]
    server.files[f"{L3}/checklist.chk"] = checklist({"params.json": files["params.json"]})  # no md5 to help
    server.faults[SHARD] = ([breaks_off(had)] if had else []) + [answers(200, page * 1000, content_type)] * 2
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 1
    assert "consolidated.00.pth: the server (or a proxy, or a login page) sent a web page" in output
    left = [data for name, data in script.files(L3_FOLDER).items() if name.startswith("consolidated")]
    kept = [files["consolidated.00.pth"][:had]] if had and "html" in content_type else []
    assert left == kept


def test_a_page_instead_of_the_checklist_ends_the_model(server: Server, script: Script) -> None:
    put_llama3(server, L3, 1)
    server.faults[f"{L3}/checklist.chk"] = [answers(200)]
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url)
    assert code == 1 and "checklist.chk" in output
    assert server.requests(SHARD) == [] and script.files(L3_FOLDER) == {}


def test_a_dead_network_names_the_proxy(script: Script) -> None:
    closed = Server()
    closed.server_close()
    code, output = script.run("8B", "70B", LLAMA_URL=closed.url)
    assert code == 1
    assert "Meta-Llama-3-8B/checklist.chk" in output and "https_proxy" in output
    assert not (script.target / "Meta-Llama-3-70B").exists()


# ---------------------------------------------------------------- the URL and the names


@pytest.mark.parametrize(
    "mangle",
    [
        lambda url: url.replace("&", "&amp;"),
        lambda url: url.replace("&", "&amp;amp;"),
        lambda url: f" \t'{url}'\n",
        lambda url: f"\u201c{url}\u201d\r\n",
        lambda url: f"<{url[:40]}\n  {url[40:]}>",
        lambda url: re.sub(r"([*?&=])", r"\\\1", url),
        lambda url: url.replace("*", "%2A"),
    ],
    ids=["amp", "amp twice", "quotes", "smart quotes", "wrapped", "backslashes", "percent"],
)
def test_a_url_mangled_on_its_way_is_mended(server: Server, one_script: Script, mangle: Callable[[str], str]) -> None:
    put_llama3(server, L3, 1)
    code, output = one_script.run("--url", mangle(server.url), "8B-Instruct")
    assert code == 0, output


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://127.0.0.1:9/file?Policy=s3cr3t", "no * before"),
        ("http://127.0.0.1:9/file", "no * before"),
        ("http://127.0.0.1:9/?Policy=*", "no * before"),
        ("https://l.facebook.com/l.php?u=https%3A%2F%2Fx.llamameta.net%2F%2A%3FPolicy%3Ds3cr3t&h=A", "redirect by l.f"),
        ("https://urldefense.com/v3/__https://x.llamameta.net/*?Policy=x__;Kw!!s3cr3t", "redirect by urldefense.com"),
        ("https://mail.example.com/*?to=https%3A%2F%2Fx.llamameta.net", "redirect by mail.example.com"),
        ("x.llamameta.net/*?Policy=s3cr3t", "must start with https://"),
        ("", "no URL"),
    ],
)
def test_a_url_that_cannot_be_right_is_refused_before_anything_runs(
    one_script: Script, url: str, complaint: str
) -> None:
    code, output = one_script.run("8B", LLAMA_URL=url)
    assert code == 2 and complaint in output
    assert not one_script.target.exists()


@pytest.mark.parametrize("names", [["8B", "9B"], ["llama-3-8b;7B"], ["../8B"], ["*"], [","]])
def test_an_unknown_model_is_refused_before_anything_runs(server: Server, one_script: Script, names: list[str]) -> None:
    code, output = one_script.run(*names, LLAMA_URL=server.url)
    assert code == 2 and ("llama-2-13b-chat" in output or "no model named" in output)
    assert server.seen == [] and not one_script.target.exists()


def test_the_url_shows_in_no_process_list(server: Server, script: Script, client: str, tmp_path: Path) -> None:
    put_llama3(server, L3, 1)
    spy = tmp_path / "spy"
    link_tools(spy, "md5sum", *TOOLS)
    real, record = shutil.which(client), tmp_path / "arguments"
    (spy / client).write_text(f'#!{shutil.which("bash")}\nprintf "%s\\n" "$@" >>"{record}"\nenv=$(export)\n'
                              f'printf "%s\\n" "$env" >>"{record}"\nexec {real} "$@"\n')  # fmt: skip
    (spy / client).chmod(0o755)
    code, output = script.run("8B-Instruct", LLAMA_URL=server.url, PATH=str(spy))
    assert code == 0, output
    assert "consolidated.00.pth.part" in record.read_text() and SECRET not in record.read_text()


# ---------------------------------------------------------------- the machine it runs on


def test_http_proxy_is_honoured(server: Server, script: Script) -> None:
    files = put_llama3(server, L3, 1)
    url = f"http://llama.invalid/*?{QUERY}"  # a host that only the proxy can be asked for
    code, output = script.run("8B-Instruct", LLAMA_URL=url, http_proxy=f"http://127.0.0.1:{server.server_port}")
    assert code == 0, output
    assert files.items() <= script.files(L3_FOLDER).items()


def test_md5_of_macos_serves_where_there_is_no_md5sum(server: Server, tmp_path: Path, client: str) -> None:
    bin = link_tools(tmp_path / "bin", client, *TOOLS)
    (bin / "md5").write_text(f'#!{shutil.which("bash")}\n[ "$*" = -q ] && {shutil.which("md5sum")} | cut -c 1-32\n')
    (bin / "md5").chmod(0o755)
    put_llama3(server, L3, 1)
    script = Script(tmp_path, bin)
    server.faults[SHARD] = [corrupt]
    assert script.run("8B-Instruct", LLAMA_URL=server.url)[0] == 1
    assert script.run("8B-Instruct", LLAMA_URL=server.url)[0] == 0


@pytest.mark.parametrize(
    ("tools", "complaint"), [(["md5sum"], "needs curl or wget"), (["curl"], "needs md5sum (Linux) or md5 (macOS)")]
)
def test_a_missing_tool_is_named(server: Server, tmp_path: Path, tools: list[str], complaint: str) -> None:
    bin = link_tools(tmp_path / "bin", *TOOLS)
    for tool in tools:
        (bin / tool).symlink_to("/bin/true")
    code, output = Script(tmp_path, bin).run("8B", LLAMA_URL=server.url)
    assert code == 2 and complaint in output


def test_help_and_list_need_neither_url_nor_network(tmp_path: Path) -> None:
    script = Script(tmp_path, link_tools(tmp_path / "bin", *TOOLS))
    assert "LLAMA_URL" in script.run("--help")[1]
    code, output = script.run("--list")
    assert code == 0 and len(output.splitlines()) == 11
