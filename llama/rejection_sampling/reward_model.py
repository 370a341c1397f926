"""Reward models: a Llama with a scalar head, and the ids that it reads for a dialog.

The directories are Hugging Face's `LlamaForSequenceClassification` with one label, as the public Llama 3 reward models
are. The reward is the head's value at the last token of a text (Ouyang et al. 2022, arXiv 2203.02155; Touvron et al.
2023, arXiv 2307.09288). Knows nothing of where answers come from.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from llama import parallel
from llama.checkpoint.config import REWARD_MODEL, args_from_config, context_length, read_json
from llama.checkpoint.huggingface import HuggingFaceCheckpoint
from llama.checkpoint.loading import load_weights
from llama.checkpoint.meta import require_directory
from llama.checkpoint.open import find_tokenizer
from llama.model import ModelArgs, Transformer
from llama.tokenizer import ChatFormat, Dialog, Tokenizer
from llama.tokenizer.chat_template import read_chat_files

# The most positions of a forward pass, padding included.
BATCH_TOKENS = 4096


class RewardTransformer(Transformer):
    """The network up to its last norm, with a vector instead of the output matrix. It has no cache."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        del self.output
        self.score = nn.Linear(args.dim, 1, bias=False)  # whole on each rank

    def rewards(self, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Ids [B, T], padded on the right, and the index of each row's last token [B] -> float32 [B]."""
        hidden = self.hidden_states(tokens)[torch.arange(len(tokens), device=tokens.device), last]  # [B, dim]
        return F.linear(hidden.float(), self.score.weight.float()).squeeze(-1)


class RewardModel:
    """A reward model and its tokenizer. `RewardModel.build` makes one."""

    @staticmethod
    def build(
        ckpt_dir: str | os.PathLike,
        tokenizer: Tokenizer | None = None,
        model_parallel_size: int | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> "RewardModel":
        """Loads a reward model, in a plain `python` or in each process of a torchrun.

        Args:
            ckpt_dir: Hugging Face's directory, with config.json and safetensors files.
            tokenizer: for a model whose directory has no tokenizer.
            model_parallel_size, device, dtype: as in `Llama.build`.

        Raises:
            FileNotFoundError: a directory or file is missing.
            ValueError: it is not a reward model of one label; a file is broken; its vocabulary is not the tokenizer's.
        """
        dtype = parallel.dtype_by_name(dtype)
        device = parallel.pick_device(device)
        parallel.initialize(model_parallel_size, device)
        with parallel.fail_together():
            tokenizer, checkpoint, pad_id = _open(Path(ckpt_dir), tokenizer)
            with torch.device("meta"):
                model = RewardTransformer(checkpoint.args)
            load_weights(model, checkpoint, dtype or parallel.pick_dtype(checkpoint.dtype, device), device)
        return RewardModel(model, tokenizer, pad_id)

    def __init__(self, model: RewardTransformer, tokenizer: Tokenizer, pad_id: int | None = None):
        self.model, self.tokenizer, self.pad_id = model, tokenizer, pad_id
        self.formatter = ChatFormat(tokenizer)

    def encode(self, prompt: str | Dialog, answer: str) -> list[int]:
        """The ids of a text and its continuation, or of a dialog and its answer up to the end of the turn."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt + answer, bos=True)
        return self.formatter.encode_answered(prompt, answer)

    @torch.inference_mode()
    def score(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """The reward of each text, given as ids. As in Transformers, padding ids at its end do not count.

        Raises:
            ValueError: a text is empty or too long for the model. Nothing has run then.
        """
        rows, limit = [], self.model.args.max_seq_len
        for index, text in enumerate(texts):
            row = list(text)
            while len(row) > 1 and row[-1] == self.pad_id:
                row.pop()
            if not 0 < len(row) <= limit:
                raise ValueError(f"text {index} has {len(row):,} tokens: expected 1 to {limit:,} for the reward model")
            rows.append(row)
        rewards = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))  # similar lengths need less padding
        with parallel.fail_at_once():
            while order:
                width = len(rows[order[0]])
                n = max(1, BATCH_TOKENS // width)
                batch, order = order[:n], order[n:]
                device = self.model.rotary.device
                tokens = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in batch], device=device)
                last = torch.tensor([len(rows[i]) - 1 for i in batch], device=device)
                for i, reward in zip(batch, self.model.rewards(tokens, last).tolist()):
                    rewards[i] = reward
        return rewards


def _open(ckpt_dir: Path, tokenizer: Tokenizer | None) -> tuple[Tokenizer, HuggingFaceCheckpoint, int | None]:
    """A reward model's tokenizer, its weights, and its padding id."""
    expected = "config.json and model.safetensors of a reward model, as Transformers writes them"
    require_directory("reward model", ckpt_dir, expected)
    if not (ckpt_dir / "config.json").is_file():
        found = "Meta's checkpoint of a language model" if (ckpt_dir / "params.json").is_file() else "no config.json"
        raise ValueError(f"{ckpt_dir} has {found}: expected {expected}")
    config = read_json(ckpt_dir / "config.json", "a reward model's")
    labels = config.get("id2label")
    n_labels = len(labels) if isinstance(labels, dict) else config.get("num_labels", 1)
    if config.get("architectures") == [REWARD_MODEL] and n_labels != 1:
        raise ValueError(f"{ckpt_dir} has {n_labels} labels (num_labels): expected 1, the reward")
    if any((ckpt_dir / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        tokenizer = Tokenizer(find_tokenizer(ckpt_dir))
        read_chat_files(tokenizer, ckpt_dir)
    elif tokenizer is None:
        find_tokenizer(ckpt_dir)  # raises an error that names the directory's files
    max_seq_len = context_length(config, ckpt_dir)
    config |= {"tie_word_embeddings": False}  # the head replaces the output matrix
    args = args_from_config(config, ckpt_dir, tokenizer.n_words, max_seq_len, 1, REWARD_MODEL)
    return tokenizer, HuggingFaceCheckpoint(ckpt_dir, args, reward_head=True), config.get("pad_token_id")
