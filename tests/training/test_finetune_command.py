"""`llama finetune` and `llama merge` as a user types them: a file in, a model out, a mistake in one line."""

import json

import pytest
from conftest import DEMO
from training_helpers import write_rows

import example_rejection_finetuning
from llama import Llama
from llama.cli.commands import main


def test_finetune_writes_an_adapter_a_log_and_curves_and_merge_folds_it_in(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", n=40)
    with data.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "alone"}]}) + "\n")
    out = tmp_path / "out"
    args = [
        "--ckpt_dir",
        str(DEMO),
        "--lora_rank",
        "4",
        "--lora_targets",
        "wq,wv",
        "--max_seq_len",
        "256",
        "--lr",
        "1e-2",
    ]
    args += ["--batch_tokens", "512", "--eval_share", "0.1", "--device", "cpu"]
    main(["finetune", str(data), str(out), *args])
    assert "1 row has no turn of the assistant (the first is line 41)" in capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "out.training" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] and "eval_loss" in log[-1]
    assert {"step", "loss", "lr", "gradient_norm", "tokens", "tokens_per_s", "share_of_peak"} <= log[0].keys()
    assert (tmp_path / "out.training" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    main(["merge", str(DEMO), str(out), str(tmp_path / "merged"), "--dtype", "float32"])
    prompt = [[1, 2, 3]]
    folded, adapted = (
        Llama.build(folder, max_seq_len=64, dtype="float32", **options).generate(prompt, 8, 0, logprobs=True)
        for folder, options in ((tmp_path / "merged", {}), (DEMO, {"adapter": out}))
    )
    assert folded[0] == adapted[0]


def test_the_example_draws_learns_and_asks_again(tmp_path, capsys):
    small = {"rounds": 1, "n": 4, "n_prompts": 6, "n_unseen": 4, "epochs": 1}
    example_rejection_finetuning.main(str(tmp_path / "out"), **small)
    shown = capsys.readouterr().out
    assert "before: 100.0% at 0, " in shown and "after round 1: " in shown
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "out" / "right-1.jsonl").read_text().splitlines()]
    assert rows and all(row["messages"][1]["role"] == "assistant" for row in rows)


def test_a_mistake_is_one_line(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", n=4)
    for args, message in [
        ((data, tmp_path / "out", "--epochs", "-1"), "--epochs = -1.0: expected a number above 0"),
        ((data, data), "exists and is not an empty directory"),
        ((tmp_path / "no.jsonl", tmp_path / "out"), "there is no file"),
    ]:
        with pytest.raises(SystemExit) as end:
            main(["finetune", *map(str, args), "--ckpt_dir", str(DEMO), "--device", "cpu"])
        shown = capsys.readouterr().err
        assert end.value.code == 2 and message in shown and shown.count("\n") == 1, shown
