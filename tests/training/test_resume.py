"""A run that is killed at any moment and started again ends with the same weights, to the bit."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import run_python
from training_helpers import FORKS, run, write_rows

from llama import Llama
from llama.checkpoint.meta import open_shard
from llama.training import Diverged, saves
from llama.training.report import read_log

OPTIONS = {"max_seq_len": 128, "batch_tokens": 300, "epochs": 100, "steps": 12, "lr": 1e-3, "save_every": 2}
OPTIONS |= {"eval_share": 0.1, "eval_every": 5}
# Runs each case, and runs it again with three kills, each when the log has some number of lines.
SCRIPT = """
data, ckpt, folder, cases = sys.argv[1:4] + [json.loads(sys.argv[4])]
plain = Trainer.step

def start_run(out, n_processes, size, options, pause):
    def slower(self, number, passes):  # so that kills hit steps, saves, and the time between
        time.sleep(pause)
        return plain(self, number, passes)
    Trainer.step = slower
    where = {"model_parallel_size": size, "device": "cpu", "progress": False}
    return start(n_processes, lambda: finetune(data, out, ckpt, Options(**options), **where))

rng = random.Random(7)
for name, n_processes, size, options in cases:
    assert not any(ended(start_run(f"{folder}/{name}", n_processes, size, options, 0)))
    log, n_lines, killed = f"{folder}/{name}-killed.training/log.jsonl", 0, []
    for _ in range(3):
        ranks = start_run(f"{folder}/{name}-killed", n_processes, size, options, 0.05)
        until = n_lines + rng.randint(2, 3)
        while n_lines < until and os.waitpid(ranks[0], os.WNOHANG) == (0, 0):
            time.sleep(0.01)
            n_lines = len(open(log).readlines()) if os.path.exists(log) else 0
        time.sleep(rng.random() * 0.1)
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        killed += ended(ranks)
        saves = [d for d in os.listdir(f"{folder}/{name}-killed.training") if d.startswith("step-")]
        n_lines = max([int(d[5:]) for d in saves], default=0)
    assert killed == [signal.SIGKILL] * len(killed) and not os.path.exists(f"{folder}/{name}-killed"), killed
    assert not any(ended(start_run(f"{folder}/{name}-killed", n_processes, size, options, 0)))
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "checklist.chk"}


def untimed_log(folder: Path) -> list[dict]:
    timed = ("tokens_per_s", "share_of_peak")
    return [{name: value for name, value in line.items() if name not in timed} for line in read_log(folder)]


CASES = {  # the number of processes, the model-parallel size, options
    "lora": (1, 1, {"lora_rank": 4}),
    "replicas": (2, 1, {}),
    "split": (2, 2, {}),
}


def test_a_run_killed_at_three_random_moments_ends_with_the_same_weights_to_the_bit(write_checkpoint, tmp_path):
    ckpt, data = write_checkpoint(n_layers=1), write_rows(tmp_path / "rows.jsonl")
    cases = [(name, n, size, OPTIONS | options) for name, (n, size, options) in CASES.items()]
    result = run_python(FORKS + SCRIPT, data, ckpt, tmp_path, json.dumps(cases), timeout=580, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-3000:]
    for name in CASES:
        killed, whole = tmp_path / f"{name}-killed", tmp_path / name
        assert files_of(killed) == files_of(whole), name
        logs = [untimed_log(folder.with_name(f"{folder.name}.training")) for folder in (killed, whole)]
        assert logs[0] == logs[1] and len(logs[0]) == OPTIONS["steps"], name
        assert not list(tmp_path.glob("*.training/step-*"))  # the saves are removed when the result is written


def test_a_run_does_not_go_on_with_other_data_or_parameters(write_checkpoint, tmp_path, monkeypatch):
    ckpt, data = write_checkpoint(), write_rows(tmp_path / "rows.jsonl")
    other_data, other_ckpt = write_rows(tmp_path / "other.jsonl", seed=1), write_checkpoint("second", seed=1)

    def stopped(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llama.training.sft.write_result", stopped)
        run(data, tmp_path / "out", ckpt, steps=2)
    assert saves.newest(tmp_path / "out.training") == 2
    for changed, message in [
        ((data, ckpt, {"lr": 2e-3}), r"differently: lr was 0.001 and is 0.002. Start it so, or pass --force"),
        ((other_data, ckpt, {}), "data was '119 examples, "),
        ((data, other_ckpt, {}), "base was "),
        ((data, ckpt, {"lora_rank": 2}), "lora_rank was None and is 2"),
    ]:
        rows, base, options = changed
        with pytest.raises(ValueError, match=message):
            run(rows, tmp_path / "out", base, **{"steps": 2} | options)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llama.training.saves.remove_all", stopped)
        run(data, tmp_path / "out", ckpt, steps=2)  # the same run goes on, and is killed when it has written its result
    before = files_of(tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        run(data, tmp_path / "out", ckpt, steps=3)
    run(data, tmp_path / "out", ckpt, steps=2)
    assert files_of(tmp_path / "out") == before and not list(tmp_path.glob("*.training/step-*"))
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        run(data, tmp_path / "out", ckpt, steps=2)


@pytest.fixture
def small_files():
    """No file may exceed this many bytes, as on a full disk."""
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


def test_after_the_disk_was_full_a_run_goes_on_from_its_last_save(write_checkpoint, tmp_path, mount_disk, monkeypatch):
    small_disk = mount_disk("3m")
    ckpt, data = write_checkpoint(n_layers=1), write_rows(tmp_path / "rows.jsonl", n=40)
    options = {"steps": 6, "save_every": 2, "lora_rank": 16}
    run(data, tmp_path / "whole", ckpt, **options)
    others, plain = small_disk / "others", saves.dcp.save

    def room_for_all_but_the_last_bytes(state, **more) -> None:
        if saves.newest(small_disk / "out.training") == 2 and not others.exists():
            n_bytes = sum(tensor.nbytes for tensor in state.values())
            others.write_bytes(bytes((shutil.disk_usage(small_disk).free - n_bytes) // 4096 * 4096))
        plain(state, **more)

    monkeypatch.setattr(saves.dcp, "save", room_for_all_but_the_last_bytes)
    with pytest.raises(OSError, match=r"step-00000004 could not be written; the save before it is whole: .*"):
        run(data, small_disk / "out", ckpt, **options)
    left = {path.name for path in (small_disk / "out.training").iterdir()}
    assert left == {"run.json", "log.jsonl", "step-00000002"} and not (small_disk / "out").exists()
    with pytest.raises(OSError, match=r"step-00000004 needs [\d,]+ bytes, and [\d,]+ are free"):  # found before writing
        others.write_bytes(bytes(others.stat().st_size + 8192))
        run(data, small_disk / "out", ckpt, **options)
    others.unlink()
    others.mkdir()
    run(data, small_disk / "out", ckpt, **options)
    assert files_of(small_disk / "out") == files_of(tmp_path / "whole")


def test_a_full_disk_leaves_nothing_of_a_checkpoint(write_checkpoint, tmp_path, small_files):
    llama = Llama.build(write_checkpoint(), max_seq_len=64, max_batch_size=1, train=True)
    before = set(tmp_path.iterdir())
    small_files(50_000)
    with pytest.raises(OSError, match="could not be written, and nothing of it is left"):
        llama.save(tmp_path / "saved", "hf")
    small_files(resource.RLIM_INFINITY)
    assert set(tmp_path.iterdir()) == before


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    first, second = (saves.run_folder(tmp_path / "run", {"lr": 1}, force) for force in (False, True))
    with first, pytest.raises(FileExistsError, match="another process is training in"):
        second.__enter__()
    with saves.run_folder(tmp_path / "run", {"lr": 1}, force=False):
        pass


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


def test_a_loss_that_is_nan_stops_the_run_and_keeps_the_last_good_state(write_checkpoint, tmp_path, capsys):
    ckpt, data = write_checkpoint(), write_rows(tmp_path / "rows.jsonl")
    options = {"clip": 0.0, "save_every": 100, "steps": 8}
    import llama.training.trainer as trainer

    plain = trainer.LanguageLoss.forward
    calls = []

    def broken(self, batch):
        calls.append(1)
        return plain(self, batch) * (float("nan") if len(calls) > 5 else 1.0)

    trainer.LanguageLoss.forward = broken
    try:
        with pytest.raises(Diverged, match="step 6: the loss is nan"):
            run(data, tmp_path / "out", ckpt, **options)
    finally:
        trainer.LanguageLoss.forward = plain
    warned = capsys.readouterr().err
    assert "warning: step 6: the loss is nan" in warned and "has the state after step 5" in warned
    assert saves.newest(tmp_path / "out.training") == 5 and not (tmp_path / "out").exists()
    run(data, tmp_path / "out", ckpt, **options)  # it goes on from there
    assert [line["step"] for line in read_log(tmp_path / "out.training")] == list(range(1, 9))
    run(data, tmp_path / "whole", ckpt, **options)
    a, b = (open_shard(tmp_path / name / "consolidated.00.pth") for name in ("out", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)
