"""What several test files need: places, small random checkpoints, and real processes, alone and as ranks of a run."""

import base64
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import pytest
import torch
import torch.distributed as dist

import llama.engine
from llama import Llama, ModelArgs, Transformer, parallel
from llama.decode_step import DecodeStep

# Tests run beside each other: threads of the processes that they start would wait for each other's most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# In the background a shell has its programs ignore Ctrl-C, and those that they start too: tests that press it need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LLAMA_TEST_FILES") or ROOT.parent / "shared")  # CONTRIBUTING.md lists the files
DEMO = ROOT / "demo" / "checkpoint"


def shared(*parts: str) -> Path:
    """A path among the files that a clone does not have, or a skip that says so."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"there is no {path}: CONTRIBUTING.md says what belongs there, and LLAMA_TEST_FILES where it is")
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compile", action="store_true", help="decode with the compiled step everywhere (slow to start)")
    choices = ["pretended", "cuda"]
    parser.addoption("--device", choices=choices, default="pretended", help="where tests/test_cuda.py runs")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_card: needs a compiler for CUDA, which a pretended card has not")


@pytest.fixture(scope="session", autouse=True)
def compile_everywhere(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--compile"):
        llama.engine.DecodeStep = functools.partial(DecodeStep, compile=True)


@pytest.fixture(scope="session")
def stories() -> Path:
    """Real trained Llama 2 weights: 260 thousand parameters, grouped KV heads, a SentencePiece tokenizer."""
    return shared("checkpoints", "stories260K")


@pytest.fixture(scope="session")
def demo() -> Llama:
    """The embedded checkpoint, float32."""
    return Llama.build(DEMO, max_seq_len=512, max_batch_size=8, device="cpu", dtype="float32")


@pytest.fixture(scope="session", autouse=True)
def process_groups() -> None:
    torch.set_num_threads(1)  # the models are small, and on a busy machine threads wait for each other for ever
    parallel.initialize(device=torch.device("cpu"))


def write_byte_tokenizer(path: Path, n_tokens: int = 256) -> None:
    """A tiktoken file of all bytes, then made-up pairs of them: n_tokens ranks, 256 special tokens after them."""
    ranks = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(n_tokens - 256)]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks)))


def random_model(seed: int = 0, std: float = 0.1, **shape) -> Transformer:
    """A float32 model on the CPU with random weights, norms included."""
    model = Transformer(ModelArgs(**shape))
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(std, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


SMALL = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 16, "vocab_size": 512}


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a directory as Meta's with random weights and a tokenizer of bytes; returns its path."""

    def write(name: str = "ckpt", dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Path:
        shape = SMALL | changes
        folder = tmp_path / name
        folder.mkdir()
        model = random_model(seed, **shape)
        state = {key: value.detach().to(dtype) for key, value in model.state_dict().items()}
        if shape.get("tied_embeddings"):
            del state["output.weight"]
            shape.pop("tied_embeddings")
        torch.save(state, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps(shape))
        write_byte_tokenizer(folder / "tokenizer.model", shape["vocab_size"] - 256)
        return folder

    return write


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of its own, of a size such as "52k". The test is skipped where that is not allowed."""
    folder = tmp_path / "disk"
    is_mounted = False

    def mount(size: str) -> Path:
        nonlocal is_mounted
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system is not allowed here")
        is_mounted = True
        return folder

    yield mount
    if is_mounted:
        subprocess.run(["umount", str(folder)], check=True)


def ranks(n_processes: int, *words: object, input: str = "", timeout: float = 120) -> subprocess.CompletedProcess:
    """Runs `python WORDS` as n real processes, each of one thread, on the CPU: forks, told what torchrun tells ranks.

    They share one standard input, with `input` in it.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(n_processes), "LOCAL_WORLD_SIZE": str(n_processes)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "GROUP_RANK": "0"}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    runs = [(list(words), env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(n_processes)]
    return forks.run_all(runs, input, timeout)


def torchrun(n_processes: int, script: Path, *args: object, timeout: float = 120) -> subprocess.CompletedProcess:
    """As `ranks`, by torchrun itself, which takes seconds to start."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    return subprocess.run(
        [*command, str(script), *map(str, args)], env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def run_python(
    code: str, *args: object, timeout: float = 120, is_forked: bool = True, **variables: str
) -> subprocess.CompletedProcess:
    """Runs a piece of Python in a process of its own, with further environment variables.

    `is_forked` says whether that is a fork of one that has imported the package (`forks`), or started by itself.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    if is_forked:
        return forks.run(["-c", code, *args], env, timeout=timeout)
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def split_checkpoint(source: Path, target: Path, n_shards: int, embedding: str = "columns") -> Path:
    """Writes a one-shard directory again as n shards, as Meta's are cut, each matrix the slow obvious way.

    `embedding` says along which side tok_embeddings is cut: "columns" as in Llama 2, "rows" as in Llama 3.
    """
    target.mkdir(parents=True)
    params = json.loads((source / "params.json").read_text())
    n_heads, n_kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    head_dim = params["dim"] // n_heads
    state = torch.load(source / "consolidated.00.pth", weights_only=True)
    for i in range(n_shards):
        shard = {}
        for name, tensor in state.items():
            part = name.split(".")[-2]
            if part in ("wk", "wv") and n_shards > n_kv_heads:
                head = i // (n_shards // n_kv_heads)
                piece = tensor[head * head_dim : (head + 1) * head_dim]
            elif part in ("wq", "wk", "wv", "w1", "w3", "output") or (part == "tok_embeddings" and embedding == "rows"):
                piece = tensor.tensor_split(n_shards, dim=0)[i]
            elif part in ("wo", "w2", "tok_embeddings"):
                piece = tensor.tensor_split(n_shards, dim=1)[i]
            else:
                piece = tensor
            shard[name] = piece.clone()
        shard["rope.freqs"] = torch.zeros(head_dim // 2)
        torch.save(shard, target / f"consolidated.{i:02d}.pth")
    for name in ("params.json", "tokenizer.model"):
        (target / name).write_bytes((source / name).read_bytes())
    return target
