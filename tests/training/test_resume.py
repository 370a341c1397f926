"""A run that is killed, at any moment, and started again ends with the weights of one that was not, to the bit."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, torchrun
from training_helpers import run, write_rows

from llama.checkpoint.meta import open_shard
from llama.training import Diverged, Options, finetune, saves
from llama.training.report import read_log

OPTIONS = {"max_seq_len": 128, "batch_tokens": 300, "epochs": 100, "steps": 30, "lr": 1e-3, "save_every": 2}
OPTIONS |= {"eval_share": 0.1, "eval_every": 10}
SCRIPT = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
from llama.training import Options, finetune
from llama.training.trainer import Trainer
data, out, ckpt, size, options, pause = sys.argv[1:]
open(f"{out}.pid.{os.environ.get('RANK', 0)}", "w").write(str(os.getpid()))
plain = Trainer.step
def slower(self, number, passes):  # so that a kill falls between steps, into one, and into saves
    time.sleep(float(pause))
    return plain(self, number, passes)
Trainer.step = slower
finetune(data, out, ckpt, Options(**json.loads(options)), model_parallel_size=int(size), device="cpu", progress=False)
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "checklist.chk"}


def untimed_log(folder: Path) -> list[dict]:
    timed = ("tokens_per_s", "share_of_peak")
    return [{name: value for name, value in line.items() if name not in timed} for line in read_log(folder)]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_killed_at_three_random_moments_ends_with_the_same_weights_to_the_bit(write_checkpoint, tmp_path, kind):
    ckpt, data = write_checkpoint(), write_rows(tmp_path / "rows.jsonl")
    options = OPTIONS | ({"lora_rank": 4} if kind == "lora" else {})
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(data)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    rest = [str(ckpt), "1", json.dumps(options), "0.05"]
    subprocess.run([*command, str(tmp_path / "whole"), *rest], env=env, check=True, timeout=580)
    rng, log, done = random.Random(7), tmp_path / "out.training" / "log.jsonl", 0
    for _ in range(3):
        with subprocess.Popen([*command, str(tmp_path / "out"), *rest], env=env) as process:
            until = done + rng.randint(3, 8)
            while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= until):
                time.sleep(0.01)
            time.sleep(rng.random() * 0.1)
            process.send_signal(signal.SIGKILL)
        done = saves.newest(tmp_path / "out.training")
        assert done and not (tmp_path / "out").exists()
    subprocess.run([*command, str(tmp_path / "out"), *rest], env=env, check=True, timeout=580)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert untimed_log(tmp_path / "out.training") == untimed_log(tmp_path / "whole.training")
    assert not list((tmp_path / "out.training").glob("step-*"))  # the result is written: its saves go


@pytest.mark.parametrize("size", [1, 2])
def test_two_processes_killed_and_started_again_end_with_the_same_weights_to_the_bit(write_checkpoint, tmp_path, size):
    ckpt, data = write_checkpoint(), write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [ckpt, size, json.dumps(OPTIONS | {"steps": 12})]
    whole = torchrun(2, tmp_path / "script.py", data, tmp_path / "whole", *arguments, "0", timeout=580)
    assert whole.returncode == 0, whole.stderr[-3000:]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "script.py"), str(data), str(tmp_path / "out"), *map(str, arguments), "0.1"]
    log = tmp_path / "out.training" / "log.jsonl"
    with subprocess.Popen(command, env=env) as process:
        while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= 5):
            time.sleep(0.01)
        for rank in (0, 1):
            with contextlib.suppress(ProcessLookupError):  # it has ended because the other one did
                os.kill(int((tmp_path / f"out.pid.{rank}").read_text()), signal.SIGKILL)
    assert saves.newest(tmp_path / "out.training") in (4, 6) and not (tmp_path / "out").exists()
    again = torchrun(2, tmp_path / "script.py", data, tmp_path / "out", *arguments, "0", timeout=580)
    assert again.returncode == 0, again.stderr[-3000:]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_other_data_or_parameters_do_not_go_on_with_a_run(write_checkpoint, tmp_path, monkeypatch):
    ckpt, data = write_checkpoint(), write_rows(tmp_path / "rows.jsonl")
    other_data, other_ckpt = write_rows(tmp_path / "other.jsonl", seed=1), write_checkpoint("second", seed=1)

    def stopped(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llama.training.sft.write_result", stopped)
        run(data, tmp_path / "out", ckpt, steps=2)
    for changed, message in [
        ((data, ckpt, {"lr": 2e-3}), r"started otherwise: lr was 0.001 and is 0.002. Start it so, or pass --force"),
        ((other_data, ckpt, {}), "data was '119 examples, "),
        ((data, other_ckpt, {}), "base was "),
        ((data, ckpt, {"lora_rank": 2}), "lora_rank was None and is 2"),
    ]:
        rows, base, options = changed
        with pytest.raises(ValueError, match=message):
            run(rows, tmp_path / "out", base, **{"steps": 2} | options)
    run(data, tmp_path / "out", ckpt, steps=2)  # the same goes on
    assert (tmp_path / "out" / "consolidated.00.pth").is_file()
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        run(data, tmp_path / "out", ckpt, steps=2)


@pytest.fixture
def small_files():
    """No file may become larger than so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(n_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_save_whole_and_nothing_else(tmp_path, small_files):
    module = torch.nn.Linear(200, 200)
    optimizer = torch.optim.AdamW(module.parameters())
    state = saves.state_of(module, [optimizer])
    saves.save(tmp_path, 3, state)
    expected = module.weight.detach().clone()
    module.weight.data.zero_()
    small_files(50_000)
    with pytest.raises(OSError, match=r"step-00000004 could not be written; the save before it is whole"):
        saves.save(tmp_path, 4, state)
    small_files(resource.RLIM_INFINITY)
    assert saves.newest(tmp_path) == 3 and [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    saves.load(tmp_path, 3, state)
    assert torch.equal(module.weight, expected)


def test_a_save_runs_no_code_and_a_damaged_one_is_refused(tmp_path):
    import pickle

    state = saves.state_of(module := torch.nn.Linear(2, 2), [torch.optim.AdamW(module.parameters())])
    saves.save(tmp_path, 1, state)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    index = tmp_path / "step-00000001" / ".metadata"
    whole = index.read_bytes()
    index.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"the index names posix.mkdir, which no save has: refused"):
        saves.load(tmp_path, 1, state)
    assert not (tmp_path / "evil").exists()
    index.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        saves.load(tmp_path, 1, state)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(write_checkpoint, tmp_path, capsys):
    ckpt, data = write_checkpoint(), write_rows(tmp_path / "rows.jsonl")
    options = {"max_seq_len": 128, "batch_tokens": 300, "epochs": 100, "clip": 0.0, "save_every": 100}
    import llama.training.trainer as trainer

    plain = trainer.LanguageLoss.forward
    calls = []

    def broken(self, batch):
        calls.append(1)
        return plain(self, batch) * (float("nan") if len(calls) > 5 else 1.0)

    trainer.LanguageLoss.forward = broken
    try:
        with pytest.raises(Diverged, match="step 6: the loss is nan"):
            finetune(data, tmp_path / "out", ckpt, Options(**options, steps=8), progress=False)
    finally:
        trainer.LanguageLoss.forward = plain
    warned = capsys.readouterr().err
    assert "warning: step 6: the loss is nan" in warned and "has the state after step 5" in warned
    assert saves.newest(tmp_path / "out.training") == 5 and not (tmp_path / "out").exists()
    finetune(data, tmp_path / "out", ckpt, Options(**options, steps=8), progress=False)  # it goes on from there
    assert [line["step"] for line in read_log(tmp_path / "out.training")] == list(range(1, 9))
    finetune(data, tmp_path / "whole", ckpt, Options(**options, steps=8), progress=False)
    a, b = (open_shard(tmp_path / name / "consolidated.00.pth") for name in ("out", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)
