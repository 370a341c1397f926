"""`download.sh` against a local HTTP server that serves small stand-ins for the models, and misbehaves on request.

Every test runs the script as a user does, in a fresh folder, with a PATH that holds only the tools it may use, and with
no proxy or configuration file of the machine's. It knows nothing of the package `llama`.
"""

import hashlib
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "download.sh"
BASH = str(shutil.which("bash"))
TOOLS = ["awk", "cat", "cut", "grep", "head", "mkdir", "mv", "rm", "sed", "tr", "wc"]
FILE_SIZE_LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
SECRET = "s3cr3t"
QUERY = f"Policy=eyJ_abc~&Signature={SECRET}-&Key-Pair-Id=K1"

missing = [tool for tool in ["bash", "curl", "md5sum", *TOOLS] if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"download.sh needs {', '.join(missing)}")

# A process in the background inherits SIGINT ignored, and bash cannot trap a signal that was ignored when it started:
# so the signals are set as in a terminal. SIGXFSZ stays ignored, which makes a file size limit look like a full disk.
LAUNCHER = """
import os, resource, signal, sys
for number in [signal.SIGINT, signal.SIGPIPE]:
    signal.signal(number, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""


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
        path, _, query = self.path.partition("?")
        self.name = path.lstrip("/")
        faults = self.server.faults.get(self.name, [])
        body = self.server.files.get(self.name)
        if query != self.server.query:
            self.answer(403, b"<?xml version='1.0'?><Error>AccessDenied</Error>")
        elif faults:
            faults.pop(0)(self, body or b"")
        elif body is None:
            self.answer(404, b"<html>no such file</html>")
        else:
            self.serve(body)

    def serve(self, body: bytes, ranges: bool = True, stop_after: int | None = None) -> None:
        """`body`, or what Range asks of it; the connection breaks off after `stop_after` bytes."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "") if ranges else None
        start = int(asked[1]) if asked else 0
        if asked and start >= len(body):
            self.answer(416, b"", f"bytes */{len(body)}")
        elif asked:
            self.answer(206, body[start:], f"bytes {start}-{len(body) - 1}/{len(body)}", stop_after)
        else:
            self.answer(200, body, stop_after=stop_after)

    def answer(self, status: int, body: bytes, content_range: str = "", stop_after: int | None = None) -> None:
        sent = body[:stop_after]
        self.server.seen.append(Seen(self.name, self.headers.get("Range"), status, len(sent)))
        self.send_response(status)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.query = QUERY
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.seen: list[Seen] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/*?{self.query}"

    def requests(self, path: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.path == path]


def breaks_off(after: int, ranges: bool = True) -> Fault:
    return lambda handler, body: handler.serve(body, ranges=ranges, stop_after=after)


def answers(status: int, body: bytes = b"<html>error</html>") -> Fault:
    return lambda handler, _: handler.answer(status, body)


def ignores_range(handler: Handler, body: bytes) -> None:
    handler.serve(body, ranges=False)


def corrupt(handler: Handler, body: bytes) -> None:
    handler.serve(body[:-1] + bytes([body[-1] ^ 1]))


Files = dict[str, bytes]


def checklist(files: Files) -> bytes:
    return "".join(f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in files.items()).encode()


def blob(seed: str, size: int = 100_000) -> bytes:
    return b"PK\x03\x04" + random.Random(seed).randbytes(size)


MODEL, FOLDER, REMOTE = "8B-Instruct", "Meta-Llama-3-8B-Instruct", "8b_instruction_tuned"
SHARD, CHECKLIST = f"{REMOTE}/consolidated.00.pth", f"{REMOTE}/checklist.chk"
L2_TOKENIZER = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02" + bytes(range(256))  # how the real one begins


def put_model(server: Server, remote: str = REMOTE, shards: int = 1) -> Files:
    """Returns the files that the model's folder must hold at the end."""
    files = {f"consolidated.{i:02d}.pth": blob(f"{remote} {i}") for i in range(shards)} | {
        "params.json": b'{"dim": 4096}\n'
    }
    if remote.startswith("llama-2"):
        tokenizer = {"tokenizer.model": L2_TOKENIZER}
        root = tokenizer | {"tokenizer_checklist.chk": checklist(tokenizer), "USE_POLICY.md": b"# Policy 2\n"}
    else:
        files["tokenizer.model"] = b"IQ== 0\nIg== 1\n"
        root = {"USE_POLICY": b"# Policy 3\n"}
    root["LICENSE"] = b"COMMUNITY LICENSE\n"
    files["checklist.chk"] = checklist(files)
    server.files |= {f"{remote}/{name}": data for name, data in files.items()} | root
    return files | root


def executable(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"#!{BASH}\n{text}\n")
    path.chmod(0o755)


class Script:
    """`download.sh` in a folder of its own, with the server's URL in its environment. Its pauses take no time."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.home, self.bin, self.target = folder / "home", folder / "bin", folder / "my models"
        self.pauses, self.server = folder / "pauses", server
        self.home.mkdir()
        self.bin.mkdir()
        for tool in ["curl", "md5sum", *TOOLS]:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        executable(self.bin / "sleep", f'printf "%s " "$1" >>"{self.pauses}"')

    def start(
        self, *args: str, url: str | None = None, stdin: int = subprocess.PIPE, largest_file: int = FILE_SIZE_LIMIT
    ) -> subprocess.Popen[str]:
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(largest_file)]
        env = {"PATH": str(self.bin), "HOME": str(self.home), "TERM": "dumb"}
        return subprocess.Popen(
            [*launcher, BASH, str(SCRIPT), "--dir", str(self.target), *args],
            env=env | {"LLAMA_URL": self.server.url if url is None else url},
            cwd=self.home,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *args: str, code: int = 0, typed: str = "", url: str | None = None) -> str:
        """What it printed; `code` is the exit status that it must have, `typed` its standard input."""
        process = self.start(*args, url=url)
        output, _ = process.communicate(typed, timeout=60)
        assert process.returncode == code, output
        assert SECRET not in output
        assert list(self.home.iterdir()) == []  # nothing outside the target folder
        return output

    def files(self, folder: str = FOLDER) -> Files:
        return {path.name: path.read_bytes() for path in sorted((self.target / folder).iterdir())}

    def leave(self, name: str, data: bytes) -> None:
        """A file that something else left in the model's folder."""
        (self.target / FOLDER).mkdir(parents=True)
        (self.target / FOLDER / name).write_bytes(data)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Fails when the process ends before, or after a minute."""
    deadline, tick = time.monotonic() + 60, threading.Event()
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        tick.wait(0.005)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def script(tmp_path: Path, server: Server) -> Script:
    return Script(tmp_path, server)


@pytest.fixture
def files(server: Server) -> Files:
    """Those of MODEL, which the server has."""
    return put_model(server)


# ---------------------------------------------------------------- what it downloads


def test_each_model_arrives_whole_in_its_folder_by_any_of_its_names(server: Server, script: Script) -> None:
    models = {
        "8b": ("8b_pre_trained", "Meta-Llama-3-8B", 1),
        "Llama-3-8B-Instruct": ("8b_instruction_tuned", "Meta-Llama-3-8B-Instruct", 1),
        "70B": ("70b_pre_trained", "Meta-Llama-3-70B", 8),
        "meta-llama/Meta-Llama-3-70B-Instruct": ("70b_instruction_tuned", "Meta-Llama-3-70B-Instruct", 8),
        "7b": ("llama-2-7b", "llama-2-7b", 1),
        "llama-2-13b": ("llama-2-13b", "llama-2-13b", 2),
        "LLAMA-2-70B": ("llama-2-70b", "llama-2-70b", 8),
        "7B-chat": ("llama-2-7b-chat", "llama-2-7b-chat", 1),
        "13b-chat": ("llama-2-13b-chat", "llama-2-13b-chat", 2),
        "meta-llama/Llama-2-70b-chat": ("llama-2-70b-chat", "llama-2-70b-chat", 8),
    }
    expected = {folder: put_model(server, remote, shards) for remote, folder, shards in models.values()}
    script.run(*models)
    assert {folder: script.files(folder) for folder in expected} == expected


def test_url_and_models_are_asked_for(server: Server, script: Script, files: Files) -> None:
    put_model(server, "8b_pre_trained")
    output = script.run(url="", typed=f"{server.url}\n8B, 8b-instruct, 8B\n")
    assert "signed URL" in output and "llama-3-70b-instruct" in output
    assert {path.name for path in script.target.iterdir()} == {"Meta-Llama-3-8B", FOLDER}
    assert output.count("-> Meta-Llama-3-8B\n") == 1


def test_a_url_longer_than_a_line_of_a_terminal_is_read(server: Server, script: Script, files: Files) -> None:
    server.query = QUERY + "x" * 6000
    terminal, stdin = pty.openpty()
    process = script.start(MODEL, url="", stdin=stdin)
    wait_until(lambda: not termios.tcgetattr(stdin)[3] & termios.ICANON, process)  # it reads key by key
    os.write(terminal, f"{server.url}\n".encode())
    output, _ = process.communicate(timeout=60)
    os.close(terminal)
    os.close(stdin)
    assert process.returncode == 0, output


def test_a_complete_model_is_checked_and_not_downloaded_again(server: Server, script: Script) -> None:
    put_model(server, "llama-2-7b")
    script.run("7B")
    server.seen.clear()
    script.run("7B")
    assert server.seen == []


def test_only_the_missing_file_of_a_model_is_downloaded(server: Server, script: Script) -> None:
    files = put_model(server, "70b_pre_trained", 8)
    script.run("70B")
    server.seen.clear()
    (script.target / "Meta-Llama-3-70B/consolidated.03.pth").unlink()
    script.run("70B")
    assert [seen.path.split("/")[1] for seen in server.seen] == ["checklist.chk", "consolidated.03.pth"]
    assert script.files("Meta-Llama-3-70B") == files


def test_a_licence_that_the_server_lacks_does_no_harm(server: Server, script: Script, files: Files) -> None:
    put_model(server, "8b_pre_trained")
    server.faults = {"LICENSE": [answers(502)] * 5, "USE_POLICY": [answers(403)]}
    script.run(MODEL, "8B")
    assert "LICENSE" not in script.files() and "LICENSE" in script.files("Meta-Llama-3-8B")


def test_a_file_that_no_checklist_lists_is_named(server: Server, script: Script, files: Files) -> None:
    server.files[CHECKLIST] = checklist({"consolidated.00.pth": files["consolidated.00.pth"]})
    script.leave("params.json.part", b"half of something else")
    output = script.run(MODEL)
    assert re.search(r"params.json\n.*no checklist", output) and not re.search(r"00.pth\n.*no checklist", output)
    assert script.files()["params.json"] == files["params.json"]


# ---------------------------------------------------------------- broken downloads


def test_a_download_that_breaks_off_continues_where_it_stopped(server: Server, script: Script, files: Files) -> None:
    server.faults[SHARD] = [breaks_off(50_000)]
    script.run(MODEL)
    first, second = server.requests(SHARD)
    assert (first.range, second.range) == (None, "bytes=50000-")
    assert second.sent == len(files["consolidated.00.pth"]) - 50_000
    assert script.files() == files


def test_five_attempts_that_bring_nothing_end_the_run(server: Server, script: Script, files: Files) -> None:
    server.faults[SHARD] = [breaks_off(10_000)] * 7 + [answers(502)] * 3 + [breaks_off(0)] * 2
    output = script.run(MODEL, "8B", code=1)
    assert f"{FOLDER}/consolidated.00.pth: no connection" in output and "https_proxy" in output
    assert "not tried" in output and not (script.target / "Meta-Llama-3-8B").exists()
    assert len(server.requests(SHARD)) == 12
    assert script.pauses.read_text().split()[-5:] == ["1", "2", "4", "8", "16"]
    kept = {name: data for name, data in script.files().items() if "00.pth" in name}
    assert kept == {"consolidated.00.pth.part": files["consolidated.00.pth"][:70_000]}
    script.run(MODEL)
    assert server.requests(SHARD)[-1].range == "bytes=70000-"
    assert script.files() == files


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_half_way_it_continues(server: Server, script: Script, files: Files, number: signal.Signals) -> None:
    shard, released = files["consolidated.00.pth"], threading.Event()

    def stalls(handler: Handler, body: bytes) -> None:
        handler.serve(body, stop_after=65_536)
        released.wait(30)

    server.faults[SHARD] = [stalls]
    process = script.start(MODEL)
    part = script.target / FOLDER / "consolidated.00.pth.part"
    wait_until(lambda: part.exists() and part.stat().st_size >= 32_768, process)
    os.killpg(process.pid, number)  # the script and its curl, as Ctrl-C does
    output, _ = process.communicate(timeout=30)
    released.set()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert number != signal.SIGINT or "Interrupted" in output
    assert "consolidated.00.pth" not in script.files() and shard.startswith(part.read_bytes())

    kept = part.stat().st_size
    script.run(MODEL)
    last = server.requests(SHARD)[-1]
    assert (last.range, last.sent) == (f"bytes={kept}-", len(shard) - kept)
    assert script.files() == files


def test_a_server_that_ignores_range_sends_the_file_anew(server: Server, script: Script, files: Files) -> None:
    server.faults[SHARD] = [breaks_off(30_000), breaks_off(50_000, ranges=False), ignores_range]
    script.run(MODEL)
    assert server.requests(SHARD)[1].range == "bytes=30000-"
    assert script.files() == files


def test_a_server_that_only_starts_over_is_given_up(server: Server, script: Script, files: Files) -> None:
    server.faults[SHARD] = [breaks_off(30_000, ranges=False)] * 100
    script.run(MODEL, code=1)
    assert len(server.requests(SHARD)) <= 6


def test_a_part_that_is_already_whole_is_not_downloaded_again(server: Server, script: Script, files: Files) -> None:
    script.leave("consolidated.00.pth.part", files["consolidated.00.pth"])
    script.run(MODEL)
    assert [seen.status for seen in server.requests(SHARD)] == [416]
    assert script.files() == files


@pytest.mark.parametrize("name", ["consolidated.00.pth.part", "consolidated.00.pth"])
@pytest.mark.parametrize("size", [50_000, 300_000])
def test_wrong_bytes_of_another_program_are_replaced(
    server: Server, script: Script, files: Files, name: str, size: int
) -> None:
    script.leave(name, blob("another", size))
    script.run(MODEL)
    assert script.files() == files


def test_half_a_file_under_its_own_name_is_completed(server: Server, script: Script, files: Files) -> None:
    script.leave("consolidated.00.pth", files["consolidated.00.pth"][:70_000])
    script.run(MODEL)
    assert [seen.range for seen in server.requests(SHARD)] == ["bytes=70000-"]
    assert script.files() == files


def test_a_corrupt_file_is_named_and_removed_and_the_others_arrive(server: Server, script: Script) -> None:
    files = put_model(server, "70b_pre_trained", 8)
    server.faults["70b_pre_trained/consolidated.02.pth"] = [corrupt]
    output = script.run("70B", code=1)
    summary = output[output.index("Not everything") :]
    assert re.search("consolidated.02.pth: .*md5", summary) and summary.count("consolidated.") == 1
    del files["consolidated.02.pth"]
    assert script.files("Meta-Llama-3-70B") == files


def test_a_checklist_that_was_wrong_is_fetched_again(server: Server, script: Script, files: Files) -> None:
    server.faults[CHECKLIST] = [answers(200, checklist(files | {"params.json": b"another"}))]
    script.run(MODEL, code=1)
    script.run(MODEL)
    assert script.files() == files


def test_a_full_disk_is_named_and_the_part_is_kept(server: Server, script: Script, files: Files) -> None:
    process = script.start(MODEL, largest_file=65_536)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "is the disk full?" in output
    assert len(server.requests(SHARD)) == 1
    kept = script.files()["consolidated.00.pth.part"]
    assert len(kept) > 0 and files["consolidated.00.pth"].startswith(kept)
    script.run(MODEL)
    assert server.requests(SHARD)[-1].status == 206


# ---------------------------------------------------------------- answers that are no file


def test_a_403_says_what_to_do_and_only_the_next_model_is_tried(server: Server, script: Script, files: Files) -> None:
    server.faults["8b_pre_trained/checklist.chk"] = [answers(403)]
    output = script.run("8B", MODEL, code=1)
    assert "Meta-Llama-3-8B/checklist.chk: 403" in output
    for advice in ["expired", "Request a new one", "does not cover this model", "copy link address", "quotes"]:
        assert advice in output
    assert [seen.path for seen in server.seen if seen.path.startswith("8b_pre")] == ["8b_pre_trained/checklist.chk"]
    assert script.files("Meta-Llama-3-8B") == {} and script.files() == files


def test_a_link_that_expires_half_way_keeps_the_part(server: Server, script: Script) -> None:
    files = put_model(server, "70b_pre_trained", 8)
    server.faults["70b_pre_trained/consolidated.02.pth"] = [breaks_off(40_000), answers(403)]
    assert "expired" in script.run("70B", code=1)
    weights = {name: data for name, data in script.files("Meta-Llama-3-70B").items() if ".pth" in name}
    assert list(weights) == ["consolidated.00.pth", "consolidated.01.pth", "consolidated.02.pth.part"]
    assert weights["consolidated.02.pth.part"] == files["consolidated.02.pth"][:40_000]


def test_a_file_that_the_server_lacks_is_asked_for_once(server: Server, script: Script, files: Files) -> None:
    del server.files[f"{REMOTE}/tokenizer.model"], files["tokenizer.model"]
    output = script.run(MODEL, code=1)
    assert re.search(f"{FOLDER}/tokenizer.model: .*404", output) and "expired" not in output
    assert len(server.requests(f"{REMOTE}/tokenizer.model")) == 1
    assert script.files() == files


@pytest.mark.parametrize("page", [b"<html><body>Please log in</body></html>", b"\xef\xbb\xbf\n <?xml version='1.0'?>"])
@pytest.mark.parametrize("had", [0, 20_000])
def test_a_web_page_never_ends_up_in_a_pth(server: Server, script: Script, files: Files, page: bytes, had: int) -> None:
    server.files[CHECKLIST] = checklist({"params.json": files["params.json"]})  # no md5 to help
    server.faults[SHARD] = ([breaks_off(had)] if had else []) + [answers(200, page * 1000)] * 2
    assert "consolidated.00.pth: a web page came" in script.run(MODEL, code=1)
    assert not [name for name in script.files() if name.startswith("consolidated")]


@pytest.mark.parametrize("text", [b"<html>Please log in</html>", b"Access denied by your company", b""])
def test_no_checklist_no_model(server: Server, script: Script, files: Files, text: bytes) -> None:
    server.faults[CHECKLIST] = [answers(200, text)]
    assert f"{FOLDER}/checklist.chk: " in script.run(MODEL, code=1)
    assert len(server.seen) == 1 and script.files() == {}


def test_without_a_network_the_run_ends_at_its_first_file(script: Script) -> None:
    with socket.socket() as bound:  # and not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        output = script.run("8B", "70B", url=f"http://127.0.0.1:{bound.getsockname()[1]}/*?{QUERY}", code=1)
    assert "Meta-Llama-3-8B/checklist.chk: no connection" in output and "https_proxy" in output
    assert not (script.target / "Meta-Llama-3-70B").exists()


# ---------------------------------------------------------------- the URL, the names, the machine


@pytest.mark.parametrize(
    "mangle",
    [
        lambda url: url.replace("&", "&amp;"),
        lambda url: f" \t'{url}'\n",
        lambda url: f"\u201c{url}\u201d\r\n",
        lambda url: f"<{url[:40]}\n  {url[40:]}>",
        lambda url: re.sub(r"([*?&=])", r"\\\1", url),
    ],
    ids=["amp", "quotes", "smart quotes", "wrapped", "backslashes"],
)
def test_what_mail_programs_and_shells_add_to_the_url_is_removed(
    server: Server, script: Script, files: Files, mangle: Callable[[str], str]
) -> None:
    script.run(f"--url={mangle(server.url)}", MODEL, url="")
    assert script.files() == files


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://127.0.0.1:9/file?Policy=s3cr3t", "this one does not"),
        ("http://127.0.0.1:9/?Policy=*", "this one does not"),
        ("x.llamameta.net/*?Policy=s3cr3t", "this one does not"),
        ("https://l.facebook.com/l.php?u=https%3A%2F%2Fx.llamameta.net%2F%2A%3FPolicy%3Ds3cr3t&h=A", "redirects"),
        ("https://urldefense.com/v3/__https://x.llamameta.net/*?Policy=x__;Kw!!s3cr3t", "redirects"),
        ("", "no URL"),
    ],
)
def test_a_url_that_cannot_be_right_is_refused(script: Script, url: str, complaint: str) -> None:
    assert complaint in script.run("8B", url=url, code=2)
    assert not script.target.exists()


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["8B", "9B"], "'9B'"),
        (["/*"], "'/*'"),
        (["../8B"], "'../8B'"),
        ([","], "no model given"),
        (["--fast"], "--fast"),
        (["--dir"], "--dir needs a value"),
    ],
)
def test_a_wrong_command_is_refused(server: Server, script: Script, args: list[str], complaint: str) -> None:
    assert complaint in script.run(*args, code=2)
    assert server.seen == [] and not script.target.exists()


def test_the_url_is_in_no_argument_and_no_environment_of_a_child(server: Server, script: Script, files: Files) -> None:
    record = script.bin.parent / "record"
    real = shutil.which("curl")
    executable(script.bin / "curl", f'{{ printf "%s\\n" "$@"; export; }} >>"{record}"; exec {real} "$@"')
    script.run(MODEL)
    assert "consolidated.00.pth.part" in record.read_text() and SECRET not in record.read_text()


def test_md5_of_macos_serves_where_md5sum_is_missing(server: Server, script: Script, files: Files) -> None:
    (script.bin / "md5sum").unlink()
    executable(script.bin / "md5", f'[ "$*" = -q ] && {shutil.which("md5sum")} | cut -c 1-32')
    server.faults[SHARD] = [corrupt]
    script.run(MODEL, code=1)
    script.run(MODEL)


@pytest.mark.parametrize(
    ("tool", "complaint"), [("curl", "curl is not installed; install it"), ("md5sum", "neither md5sum")]
)
def test_a_missing_tool_is_named(script: Script, tool: str, complaint: str) -> None:
    (script.bin / tool).unlink()
    assert complaint in script.run("8B", code=2)


def test_help_and_list_need_neither_url_nor_curl(script: Script) -> None:
    (script.bin / "curl").unlink()
    assert "LLAMA_URL" in script.run("--help")
    assert len(script.run("--list").splitlines()) == 11
