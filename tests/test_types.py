"""Type checkers accept right client code, and report the right lines of wrong client code."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

RIGHT = """\
import torch

from llama import ChatPrediction, CompletionPrediction, Dialog, Llama


def louder(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits * 2


llama = Llama.build("demo/checkpoint", max_seq_len=256, dtype="float32")
dialogs: list[Dialog] = [[{"role": "user", "content": "What is 21 + 34?"}]]
chats: list[ChatPrediction] = llama.chat_completion(dialogs, temperature=0, max_gen_len=40, stop=["\\n", 7], seed=None)
content: str = chats[0]["generation"]["content"]
reason: str = chats[0]["finish_reason"]
texts: list[CompletionPrediction] = llama.text_completion(["a"], num_beams=4, top_p=[0.5], logit_bias={5: -1.0})
length: int = len(texts[0]["generation"])
tokens, logprobs = llama.generate([[1, 2], [3]], 5, logprobs=True, top_k=[1, None], logits_processor=louder)
for piece in llama.stream_chat("Who are you?", temperature=0.5, truncate="left"):
    print(piece.upper())
scores: list[float] = llama.perplexity(["a text"])
"""

WRONG = """\
from llama import Llama

llama = Llama.build("demo/checkpoint")
llama.text_completion(["a"], temprature=0.5)
llama.chat_completion([[{"role": "robot", "content": "x"}]])
llama.generate([[1]], top_k="five")
llama.stream_text("a", max_new_tokens=5)
generation: int = llama.text_completion(["a"])[0]["generation"]
llama.text_completion(["a"])[0]["txet"]
Llama.build("demo/checkpoint", torch_dtype="float16")
"""

# What these libraries hold is not looked into: minutes for nothing.
MYPY = """\
[mypy]
strict = True
follow_imports = silent
[mypy-torch.*,tiktoken.*,fairscale.*,tqdm.*,sentencepiece.*]
follow_imports = skip
ignore_missing_imports = True
"""


@pytest.fixture
def clients(tmp_path):
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    return tmp_path


def found(command, folder) -> tuple[set[int], str]:
    """The lines of wrong.py with an error, and the whole output."""
    result = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    said = result.stdout + result.stderr
    return {int(line) for line in re.findall(r"wrong\.py:(\d+)(?::\d+)? ?[-:] error", said)}, said


def test_mypy_strict_accepts_a_right_client_and_names_the_lines_of_a_wrong_one(clients):
    pytest.importorskip("mypy", reason="pip install mypy to check types")
    (clients / "mypy.ini").write_text(MYPY.replace("strict = True", f"strict = True\nmypy_path = {ROOT}"))
    lines, said = found([sys.executable, "-m", "mypy", "right.py", "wrong.py"], clients)
    assert lines == {4, 5, 6, 7, 8, 9, 10} and "right.py" not in said.replace("wrong.py", ""), said
    assert 'Unexpected keyword argument "temprature" for "text_completion" of "Llama"' in said


def test_pyright_accepts_a_right_client_and_names_the_lines_of_a_wrong_one(clients):
    pytest.importorskip("basedpyright", reason="pip install basedpyright, which brings pyright with its Node, to check")
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)], "include": ["right.py", "wrong.py"]}
    (clients / "pyrightconfig.json").write_text(json.dumps(settings))
    lines, said = found([sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable], clients)
    assert lines == {4, 5, 6, 7, 8, 9, 10} and "right.py" not in said, said
    assert 'No parameter named "temprature"' in said
