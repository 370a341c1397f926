"""The losses: the negative log-likelihood of the learned tokens, or of preferring the chosen answers.

Each is a module whose `forward` takes a batch and returns a sum, so that the caller can add up passes and processes
and divide once. Knows nothing of optimizers or data files.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llama.model import Transformer
from llama.training.batches import IGNORED, Batch

LOGITS_AT_A_TIME = 4096  # positions whose logits are in memory at once


class LanguageLoss(nn.Module):
    """The summed cross-entropy of the learned tokens, in nats.

    Args:
        model: its cache is not used.
        recompute: whether the backward pass computes the layers' activations again instead of keeping them: a third
            more computation, a fraction of the memory (Chen et al. 2016, arXiv 1604.06174).
        temperature: divides the logits, as in sampling. For answers that were drawn at a temperature and selected, use
            that temperature: they are samples of that distribution.
    """

    def __init__(self, model: Transformer, recompute: bool = False, temperature: float = 1.0):
        super().__init__()
        self.model, self.recompute, self.temperature = model, recompute, temperature

    @staticmethod
    def weight(batch: Batch) -> int:
        """How many tokens are learned: the sum is divided by this."""
        return int((batch.targets != IGNORED).sum())

    def forward(self, batch: Batch) -> torch.Tensor:
        hidden = hidden_states(self.model, batch, self.recompute)
        learned = batch.targets != IGNORED
        hidden, targets = hidden[learned], batch.targets[learned]  # [n_learned, dim], [n_learned]
        if len(targets) <= LOGITS_AT_A_TIME:
            return _nll_sum(self.model, self.temperature, hidden, targets)
        parts = zip(hidden.split(LOGITS_AT_A_TIME), targets.split(LOGITS_AT_A_TIME))
        sums = [checkpoint(_nll_sum, self.model, self.temperature, *part, use_reentrant=False) for part in parts]
        return torch.stack(sums).sum()


class PreferenceLoss(nn.Module):
    """The sum of -log sigmoid(reward of the chosen - reward of the rejected), after Bradley and Terry.

    Ouyang et al. 2022, arXiv 2203.02155, equation 1. The reward is a linear function of the last token's hidden state.

    Args:
        model: its output matrix is removed.
        score: the head's weight, [1, dim]; the same on every rank.
        recompute: as in `LanguageLoss`.
    """

    def __init__(self, model: Transformer, score: torch.Tensor, recompute: bool = False):
        super().__init__()
        self.model, self.recompute = model, recompute
        model.output = nn.Identity()
        self.score = nn.Linear(model.args.dim, 1, bias=False)
        self.score.weight = nn.Parameter(score)

    @staticmethod
    def weight(batch: Batch) -> int:
        """How many pairs a batch has: the sum is divided by this."""
        return len(batch.ends) // 2

    def rewards(self, batch: Batch) -> torch.Tensor:
        """One reward for each document, float32 [n_documents]."""
        rows, columns = batch.ends.unbind(1)
        last = hidden_states(self.model, batch, self.recompute)[rows, columns]  # [n_documents, dim]
        with torch.autocast(last.device.type, enabled=False):
            return F.linear(last.float(), self.score.weight.float()).squeeze(-1)

    def forward(self, batch: Batch) -> torch.Tensor:
        rewards = self.rewards(batch)
        if len(rewards) < 2:  # an empty batch: one id, no pair
            return 0 * rewards.sum()
        chosen, rejected = rewards.view(-1, 2).unbind(1)
        return -F.logsigmoid(chosen - rejected).sum()


def hidden_states(model: Transformer, batch: Batch, recompute: bool = False) -> torch.Tensor:
    """The input of the output matrix, [B, T, dim]. No document sees another, or the cache."""
    rotary, mask = model.rotary[batch.positions], batch.mask
    x = model.tok_embeddings(batch.tokens)
    for block in model.layers:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, None, rotary, mask, use_reentrant=False)
        else:
            x = block(x, None, rotary, mask)
    return model.norm(x)


def _nll_sum(model: Transformer, temperature: float, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model.logits(hidden)
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.float() / temperature, targets, reduction="sum")
