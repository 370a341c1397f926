"""What scripts do to a model that they opened: each in a process of its own, beside the slow plain model's results.

    PYTHONPATH=.:tests python tests/clients/test_clients.py [NAME …]

runs them, or some, on the plain model, and records what they get there in plain_results.json.
"""

import json
import math
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import changing
import looking
import plain
import pytest
import rebuilding
import torch
import unseen

from llama import parallel

RECORDED = Path(__file__).parent / "plain_results.json"
CLIENTS = [client for module in (looking, changing, rebuilding, unseen) for client in module.CLIENTS]
# Forks processes from one that has imported everything already: a client takes a moment, and sees no other's traces.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "llama", "plain", "looking", "changing", "rebuilding", "unseen"])


def run(client: Callable, kind: str, folder: Path, results: Connection) -> None:
    """In the client's process: sends what it returns, or how it failed."""
    try:
        torch.set_num_threads(1)
        parallel.initialize(device=torch.device("cpu"))
        results.send(json.dumps(client(plain.build(kind, folder))))
    except BaseException:
        results.send(traceback.format_exc())
        raise


def result(client: Callable, kind: str, folder: Path) -> list:
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=run, args=(client, kind, folder, theirs))
    process.start()
    theirs.close()
    sent = ours.recv()
    process.join()
    assert process.exitcode == 0, sent
    return json.loads(sent)


def alike(a: object, b: object) -> bool:
    """Equal; numbers that are not whole up to rounding."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4)
    return a == b


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
def test_a_client_gets_what_the_plain_model_gives(client, tmp_path):
    fast, slow = result(client, "fast", tmp_path), json.loads(RECORDED.read_text())[client.__name__]
    assert alike(fast, slow), f"{client.__name__}:\n{fast}\nthe plain model:\n{slow}"


def test_there_are_at_least_forty_clients_and_their_changes_show(tmp_path):
    assert len(CLIENTS) >= 40
    before, *after = result(looking.steering_vector_on_and_off, "plain", tmp_path)
    assert after[0] != before and after[1] == before  # a comparison of equal answers would show nothing
    recorded = json.loads(RECORDED.read_text())
    assert recorded[looking.steering_vector_on_and_off.__name__] == [before, *after]
    assert recorded.keys() == {client.__name__ for client in CLIENTS}


if __name__ == "__main__":
    recorded = json.loads(RECORDED.read_text())
    with tempfile.TemporaryDirectory() as folder:
        for c in CLIENTS:
            if c.__name__ in sys.argv or not sys.argv[1:]:
                recorded[c.__name__] = result(c, "plain", Path(folder))
    lines = [f"  {json.dumps(name)}: {json.dumps(recorded[name])}" for name in (c.__name__ for c in CLIENTS)]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
