"""`llama finetune` and `llama merge` as a user types them: a file in, a model out, a mistake in one line."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import DEMO, ROOT
from training_helpers import write_rows

from llama import Llama


def command(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "llama", *map(str, args)], capture_output=True, text=True, timeout=240, cwd=ROOT
    )


def test_finetune_writes_an_adapter_a_log_and_curves_and_merge_folds_it_in(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", n=40)
    with data.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "alone"}]}) + "\n")
    out = tmp_path / "out"
    args = ["--ckpt_dir", DEMO, "--lora_rank", "4", "--lora_targets", "wq,wv", "--max_seq_len", "256", "--lr", "1e-2"]
    result = command("finetune", data, out, *args, "--batch_tokens", "512", "--eval_share", "0.1", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "1 rows have no turn of the assistant (the first is line 41)" in result.stderr
    log = [json.loads(line) for line in (tmp_path / "out.training" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] and "eval_loss" in log[-1]
    assert {"step", "loss", "lr", "gradient_norm", "tokens", "tokens_per_s", "share_of_peak"} <= log[0].keys()
    assert (tmp_path / "out.training" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    merged = command("merge", DEMO, out, tmp_path / "merged", "--dtype", "float32")
    assert merged.returncode == 0, merged.stderr
    prompt = [[1, 2, 3]]
    folded, adapted = (
        Llama.build(Path(folder), max_seq_len=64, dtype="float32", **options).generate(prompt, 8, 0, logprobs=True)
        for folder, options in ((tmp_path / "merged", {}), (DEMO, {"adapter": out}))
    )
    assert folded[0] == adapted[0]


def test_the_example_draws_learns_and_asks_again(tmp_path):
    script = ROOT / "example_rejection_finetuning.py"
    small = ["--rounds", "1", "-n", "4", "--n_prompts", "6", "--n_unseen", "4", "--epochs", "1"]
    result = subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path / "out"), *small],
        capture_output=True,
        text=True,
        timeout=580,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert "before: 100.0% at 0, " in result.stdout and "after round 1: " in result.stdout
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "out" / "right-1.jsonl").read_text().splitlines()]
    assert rows and all(row["messages"][1]["role"] == "assistant" for row in rows)


def test_a_mistake_is_one_line(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", n=4)
    for args, message in [
        ((data, tmp_path / "out", "--ckpt_dir", DEMO, "--epochs", "-1"), "--epochs = -1.0: expected a number above 0"),
        ((data, data, "--ckpt_dir", DEMO), "exists and is not an empty directory"),
        ((tmp_path / "no.jsonl", tmp_path / "out", "--ckpt_dir", DEMO), "there is no file"),
    ]:
        result = command("finetune", *args)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
