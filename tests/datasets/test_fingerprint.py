"""A model's fingerprint: any change of the model changes it, and nothing else does."""

import json

import pytest
import torch
from conftest import SMALL, random_model, torchrun, write_byte_tokenizer

from llama import Llama, Tokenizer
from llama.checkpoint import convert
from llama.datasets.fingerprint import fingerprint, weights_digest


def test_a_change_of_any_weight_changes_it():
    model = random_model(**SMALL)
    before = weights_digest(model)
    for name, parameter in model.named_parameters():
        saved = parameter.clone()
        with torch.no_grad():
            parameter.mul_(1.01)
            assert weights_digest(model) != before, name
            parameter.copy_(saved)
    assert weights_digest(model) == before


def test_swapped_matrices_change_it():
    model = random_model(**SMALL)
    before = weights_digest(model)
    first, second = (layer.feed_forward.w1 for layer in model.layers)
    first.weight, second.weight = second.weight, first.weight
    assert weights_digest(model) != before


SCRIPT = """
import json, sys
from llama import Llama
from llama.datasets.fingerprint import fingerprint
found = []
for folder in sys.argv[1:]:
    llama = Llama.build(folder, max_seq_len=64, max_batch_size=2, device="cpu")
    found.append(fingerprint(llama))
    llama.generate([[1, 2, 3]], 4)  # packs the matrices
    found.append(fingerprint(llama))
print(json.dumps(found))
"""


def test_any_number_of_processes_and_any_layout_have_the_same_fingerprint(write_checkpoint, tmp_path):
    """Four processes with two key heads, so that two processes share each. No share cuts a group of int4 in two."""
    folders = [write_checkpoint(n_kv_heads=2), tmp_path / "int8", tmp_path / "int4"]
    folders.append(write_checkpoint("bfloat16", torch.bfloat16, dim=512, multiple_of=512))
    for kind in ("int8", "int4"):
        convert.quantize(folders[3], tmp_path / kind, kind)
    (tmp_path / "script.py").write_text(SCRIPT)
    runs = [torchrun(n, tmp_path / "script.py", *folders) for n in (1, 2, 4)]
    assert [run.returncode for run in runs] == [0, 0, 0], [run.stderr for run in runs]
    alone, *others = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    assert others == [alone, alone]
    assert alone[::2] == alone[1::2] and len({found["weights"] for found in alone}) == 4


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model_has_another_fingerprint(write_checkpoint, kind):
    folder = write_checkpoint(dim=128, dtype=torch.bfloat16)
    plain, rounded, again = (
        fingerprint(Llama.build(folder, max_seq_len=64, device="cpu", quantize=quantize))["weights"]
        for quantize in (None, kind, kind)
    )
    assert plain != rounded == again


def test_a_tokenizers_digest_depends_on_its_vocabulary_not_on_its_file(write_checkpoint, tmp_path):
    folder = write_checkpoint(vocab_size=600)
    convert.convert(folder, tmp_path / "hf", to="hf")
    digest = Tokenizer(folder / "tokenizer.model").digest
    assert Tokenizer(tmp_path / "hf" / "tokenizer.json").digest == digest
    write_byte_tokenizer(tmp_path / "larger.model", 345)
    assert Tokenizer(tmp_path / "larger.model").digest != digest


def test_a_sentencepiece_model_has_a_digest_too(stories):
    assert len(Tokenizer(stories / "tokenizer.model").digest) == 16
