"""Fifty steps here and fifty with Transformers and PEFT: the same first weights, the same data, the same order."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import (
    decaying,
    hugging_face,
    language_loss,
    padded,
    relative_difference,
    run,
    steps_of,
    train_with_transformers,
    write_pairs,
    write_rows,
)

from llama import Llama
from llama.adapters import merge
from llama.checkpoint.convert import convert
from llama.checkpoint.meta import open_shard

TOLERANCE = 1e-4


def differences(log: list[dict], theirs: list[float]) -> float:
    assert len(log) == len(theirs) == 50
    return max(abs(line["loss"] - loss) for line, loss in zip(log, theirs))


def test_full_fine_tuning_has_the_losses_and_weights_of_transformers(write_checkpoint, tmp_path):
    ckpt, data = write_checkpoint(), write_rows(tmp_path / "rows.jsonl")
    log = run(data, tmp_path / "out", ckpt, to="hf", weight_decay=0.1, pass_tokens=128)
    model = hugging_face(ckpt, tmp_path / "hf")
    losses = train_with_transformers(model, steps_of(data, ckpt), language_loss, weight_decay=0.1)
    assert differences(log, losses) < TOLERANCE and losses[-1] < losses[0] - 0.5
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = {name: p.detach() for name, p in model.named_parameters()}
    assert relative_difference(ours, theirs) < TOLERANCE


def logits(ckpt, ids, **options) -> torch.Tensor:
    model = Llama.build(ckpt, max_seq_len=64, max_batch_size=1, dtype="float32", **options).model
    model.cache = None
    with torch.no_grad():
        return model(ids)


def test_an_adapter_has_the_losses_weights_and_logits_of_peft(write_checkpoint, tmp_path):
    from peft import PeftModel

    ckpt, data = write_checkpoint(), write_rows(tmp_path / "rows.jsonl")
    run(data, tmp_path / "first", ckpt, lora_rank=4, lr=1e-30, steps=1)  # PEFT starts with the same A
    log = run(data, tmp_path / "out", ckpt, lora_rank=4, lr=5e-3)
    base = hugging_face(ckpt, tmp_path / "hf")
    ids = torch.randint(512, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base(ids).logits
    model = PeftModel.from_pretrained(base, tmp_path / "first", is_trainable=True)
    losses = train_with_transformers(model, steps_of(data, ckpt), language_loss, lr=5e-3)
    assert differences(log, losses) < TOLERANCE and losses[-1] < losses[0] - 0.5
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    model.save_pretrained(tmp_path / "theirs")
    assert relative_difference(ours, load_file(tmp_path / "theirs" / "adapter_model.safetensors")) < TOLERANCE

    model.load_adapter(tmp_path / "out", "ours")
    model.set_adapter("ours")
    with torch.no_grad():
        theirs = model.eval()(ids).logits
    assert (theirs - plain).abs().max() > 0.5
    assert (logits(ckpt, ids, adapter=tmp_path / "out") - theirs).abs().max() < 1e-5
    merge(ckpt, tmp_path / "out", tmp_path / "merged")
    assert (logits(tmp_path / "merged", ids) - theirs).abs().max() < 1e-5


def test_an_adapter_that_peft_wrote_gives_the_same_logits_here(write_checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model

    ckpt = write_checkpoint(tied_embeddings=True)
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "o_proj", "up_proj"]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=True, init_lora_weights=False)
    model = get_peft_model(hugging_face(ckpt, tmp_path / "hf"), config).eval()
    model.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(512, (1, 40))
    with torch.no_grad():
        theirs = model(ids).logits
    # For a Meta directory, and for a Hugging Face one, which has the rows of queries and keys in another order.
    for folder in (ckpt, tmp_path / "hf"):
        assert (logits(folder, ids, adapter=tmp_path / "theirs") - theirs).abs().max() < 1e-5


def test_a_scalar_head_has_the_losses_weights_and_rewards_of_transformers(write_checkpoint, tmp_path):
    from transformers import LlamaForSequenceClassification

    from llama.rejection_sampling.reward_model import RewardModel

    ckpt, data = write_checkpoint(), write_pairs(tmp_path / "pairs.jsonl")
    run(data, tmp_path / "first", ckpt, head="scalar", lr=1e-30, steps=1)  # Transformers starts with the same head
    log = run(data, tmp_path / "out", ckpt, head="scalar", pass_tokens=150)

    def rewards(model, documents) -> torch.Tensor:
        ids, mask, _ = padded(documents)
        ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
        return model(input_ids=ids, attention_mask=mask).logits[:, 0]

    def loss_of(model, step) -> torch.Tensor:
        chosen, rejected = (rewards(model, [example.documents[k] for example in step]) for k in (0, 1))
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "first", dtype=torch.float32).train()
    steps = steps_of(data, ckpt, pairs=True)
    losses = train_with_transformers(model, steps, loss_of)
    assert differences(log, losses) < TOLERANCE and losses[-1] < 0.5 * losses[0]
    theirs = {name: p.detach() for name, p in model.named_parameters()}
    assert relative_difference(load_file(tmp_path / "out" / "model.safetensors"), theirs) < TOLERANCE
    # Transformers and `--scorer reward:DIR` read the result as a reward model.
    trained = LlamaForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    documents = [d for example in steps[0] for d in example.documents]
    with torch.no_grad():
        expected = rewards(trained, documents)
    found = torch.tensor(RewardModel.build(tmp_path / "out", dtype="float32").score([d.ids for d in documents]))
    assert (found - expected).abs().max() < 1e-4


def test_a_saved_model_is_read_by_transformers_and_back_and_answers_with_its_new_weights(write_checkpoint, tmp_path):
    ckpt = write_checkpoint(tied_embeddings=True, dtype=torch.bfloat16)
    llama = Llama.build(ckpt, max_seq_len=64, max_batch_size=2, train=True)
    assert llama.model.norm.weight.dtype == torch.float32  # in bfloat16 rounding would lose most steps
    prompt = [[1, 2, 3, 4]]
    before = llama.generate(prompt, 8, temperature=0)[0]
    optimizer = decaying(llama.model, 0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    for _ in range(3):  # each step has its own graph, although the model has a cache
        loss = torch.nn.functional.cross_entropy(llama.model(torch.tensor(prompt))[0], torch.tensor([7, 7, 7, 7]))
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in llama.model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        after = llama.generate(prompt, 8, temperature=0)[0]
    assert before != after == [[7] * 8]
    ids = torch.randint(512, (1, 20))
    with torch.no_grad():
        expected = llama.model(ids)
    for to in ("meta", "hf"):
        llama.save(tmp_path / to, to, shards=2)
        assert (logits(tmp_path / to, ids) - expected).abs().max() < 1e-6
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)(ids).logits
    assert (theirs - expected).abs().max() < 1e-4
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"]
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        llama.save(tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "again", "meta")


def test_a_model_that_was_built_to_answer_is_saved_bit_for_bit(write_checkpoint, tmp_path):
    ckpt = write_checkpoint()
    llama = Llama.build(ckpt, max_seq_len=64, max_batch_size=1)
    llama.generate([[1, 2, 3]], 4)  # packs the matrices
    llama.save(tmp_path / "saved")
    saved, original = (open_shard(folder / "consolidated.00.pth") for folder in (tmp_path / "saved", ckpt))
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in saved)
