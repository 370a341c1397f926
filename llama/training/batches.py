"""Divides the examples of a run into steps, and a step into the tensors of its forward passes.

The examples of a step depend on the data, the seed and `batch_tokens` alone: not on packing, the number of passes or
the number of processes. So its loss does not depend on these either. Knows nothing of models.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama.layers.attention import Mask
from llama.training.examples import Document, Example

IGNORED = -100  # a target that is not in the loss: the default `ignore_index` of `cross_entropy`


@dataclass
class Batch:
    """The input of one forward pass.

    Attributes:
        tokens: ids, [B, T]; padded on the right with 0.
        positions: the position of each id in its document, [B, T].
        documents: the index, in its row, of each id's document, [B, T]; padding has the next index. None if each row
            is one document: then attention is causal and needs no mask.
        targets: the id that follows each position, [B, T]; IGNORED where it is not learned.
        ends: row and column of the last id of each document, [n_documents, 2], in the order of the examples.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor | None
    targets: torch.Tensor
    ends: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if value is None else value.to(device) for value in vars(self).values()))

    @property
    def mask(self) -> Mask:
        """True where a query sees a key: in its own document, up to itself. [B, 1, T, T], or "causal"."""
        if self.documents is None:
            return "causal"
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return same.tril()[:, None]


def plan_steps(
    examples: Sequence[Example], batch_tokens: int, epochs: float, seed: int, max_steps: int | None = None
) -> list[list[int]]:
    """The indices of each step's examples. Every epoch is shuffled anew, and cut into steps of `batch_tokens`.

    A step has as many examples as fit, and at least one. `epochs` may be a fraction.
    """
    steps: list[list[int]] = []
    for epoch in range(-int(-epochs // 1)):
        order = list(range(len(examples)))
        random.Random(f"{seed} {epoch}").shuffle(order)
        order = order[: round(len(order) * min(1.0, epochs - epoch))]
        room = 0
        for index in order:
            if room < examples[index].n_tokens:
                steps.append([])
                room = batch_tokens
            steps[-1].append(index)
            room -= examples[index].n_tokens
    return steps[:max_steps]


def cut_into_passes(examples: Sequence[Example], pass_tokens: int, n_replicas: int) -> list[list[Example]]:
    """Divides a step's examples into passes of about equal size, at most `pass_tokens` each.

    The number of passes is a multiple of the number of replicas. A pass exceeds `pass_tokens` only if one example does.
    Some passes are empty if there are fewer examples than replicas.
    """
    total = sum(example.n_tokens for example in examples)
    n_passes = max(1, min(-(-total // pass_tokens), len(examples)))
    n_passes = -(-n_passes // n_replicas) * n_replicas
    while True:
        passes: list[list[Example]] = [[] for _ in range(n_passes)]
        filled = [0] * n_passes
        for example in sorted(examples, key=lambda example: -example.n_tokens):
            shortest = filled.index(min(filled))
            passes[shortest].append(example)
            filled[shortest] += example.n_tokens
        if n_passes >= len(examples) or max(filled) <= pass_tokens:
            return passes
        n_passes += n_replicas


def collate(examples: Sequence[Example], width: int, pack: bool = True) -> Batch:
    """The tensors of a pass: documents packed into rows of at most `width`, or each in its own row.

    Packing puts the longest document first, each into the first row with room. Without examples the batch is one id
    that is not learned, so that a replica with nothing to do still joins the others' collectives.
    """
    documents = [document for example in examples for document in example.documents] or [Document([0], [False])]
    rows: list[list[int]] = []  # indices of documents
    room: list[int] = []
    for index in sorted(range(len(documents)), key=lambda index: -len(documents[index].ids)):
        length = len(documents[index].ids)
        row = next((r for r, left in enumerate(room) if left >= length), None) if pack else None
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(width)
        rows[row].append(index)
        room[row] -= length
    lengths = [sum(len(documents[index].ids) for index in row) for row in rows]
    shape = len(rows), max(lengths)
    tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    owners, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    ends = torch.zeros(len(documents), 2, dtype=torch.long)
    for row, indices in enumerate(rows):
        start = 0
        for place, index in enumerate(indices):
            ids, learned = documents[index].ids, documents[index].learned
            here = slice(start, start + len(ids))
            tokens[row, here] = torch.tensor(ids)
            positions[row, here] = torch.arange(len(ids))
            owners[row, here] = place
            following = [i if is_learned else IGNORED for i, is_learned in zip(ids[1:], learned[1:])]
            targets[row, start : start + len(following)] = torch.tensor(following, dtype=torch.long)
            start += len(ids)
            ends[index] = torch.tensor([row, start - 1])
        owners[row, start:] = len(indices)
    alone = all(len(indices) == 1 for indices in rows)
    return Batch(tokens, positions, None if alone else owners, targets, ends)
