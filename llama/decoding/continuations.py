"""How likely a model finds given continuations of given contexts, and whether it would choose them itself.

What answers a question of multiple choice. Each context is run once, whatever number of continuations it has, and only
the positions that predict a continuation reach the output matrix. Knows token ids and not text.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from llama import parallel
from llama.engine import LOGITS_CHUNK, PREFILL_TOKENS, UNUSABLE_LOGITS
from llama.sampling import token_logprobs

if TYPE_CHECKING:
    from llama.generation import Llama

Pair = tuple[list[int], list[int]]


@torch.inference_mode()
def continuation_logprobs(llama: "Llama", pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """For each (context, continuation): the continuation's log-probability, and whether greedy decoding gives it.

    Args:
        llama: the model.
        pairs: ids of both, at least one each; together at most max_seq_len + 1, for the last is not run.

    Raises:
        ValueError, TypeError: ids are out of range or too many, or open streams hold every slot.
        RuntimeError: the model's logits cannot be used.
    """
    limit = llama.model.args.max_seq_len + 1
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation or len(context) + len(continuation) > limit:
            found = f"a context of {len(context)} tokens and a continuation of {len(continuation)}"
            raise ValueError(f"pair {index} has {found}: expected at least one each, and {limit} together at most")
        llama.check_prompt(index, [*context, *continuation], any_length=True)
    by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (context, _) in enumerate(pairs):
        by_context[tuple(context)].append(index)
    # The longest first: rows that are run together are about as long, and too little memory shows at once.
    contexts = sorted(by_context, key=lambda c: (-len(c), c))
    mine = contexts[parallel.replica() :: parallel.n_replicas()]
    results: list[tuple[int, tuple[float, bool]]] = []
    with parallel.fail_at_once(), llama._engine.reserve() as first:
        n_slots = len(llama._engine.slots) - first
        if n_slots == 0:
            raise ValueError("every slot is held by a stream: close one first, or build with a larger max_batch_size")
        for start in range(0, len(mine), n_slots):
            groups = [(list(c), [(i, pairs[i][1]) for i in by_context[c]]) for c in mine[start : start + n_slots]]
            results += _score_contexts(llama, groups, first)
    gathered = [pair for part in parallel.gather_from_replicas(results) for pair in part]
    return [result for _, result in sorted(gathered)]


def _score_contexts(llama: "Llama", groups: list[tuple], first_slot: int) -> list[tuple[int, tuple[float, bool]]]:
    """Scores the continuations of some contexts, each context in a slot: (index, result) of each.

    The first continuation of each is run behind its context, and the others in its place, one after the other.
    """
    # Continuations that differ in their last token alone, which is not run, share a pass.
    queues = []
    for context, continuations in groups:
        alike: dict[tuple[int, ...], list] = defaultdict(list)
        for index, continuation in continuations:
            alike[tuple(continuation[:-1])].append((index, continuation))
        queues.append([(context, list(alike[inputs])) for inputs in alike])
    results: list[tuple[int, tuple[float, bool]]] = []
    for turn in range(max(map(len, queues))):
        rows = [(slot, *queue[turn]) for slot, queue in enumerate(queues) if turn < len(queue)]
        for slot, context, targets in rows if turn else []:  # behind keys that are there
            ids = [context[-1], *targets[0][1][:-1]]
            hidden = _run(llama, [ids], [len(context) - 1], first_slot + slot)
            results += _score(llama, hidden[0], targets)
        if turn == 0:
            inputs = [context + targets[0][1][:-1] for _, context, targets in rows]
            per_pass = max(1, PREFILL_TOKENS // max(map(len, inputs)))
            for i in range(0, len(rows), per_pass):
                hidden = _run(llama, inputs[i : i + per_pass], [0] * len(inputs[i : i + per_pass]), first_slot + i)
                for row, (_, context, targets) in zip(hidden, rows[i : i + per_pass]):
                    results += _score(llama, row[len(context) - 1 :], targets)
    return results


def _run(llama: "Llama", rows: list[list[int]], starts: list[int], slot: int) -> torch.Tensor:
    """Hidden states of rows from `slot` on, right-padded to one width: [B, T, dim]."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=llama.model.rotary.device)
    return llama.model.hidden_states(tokens, starts, slice(slot, slot + len(rows)))


def _score(llama: "Llama", hidden: torch.Tensor, targets: list[tuple[int, list[int]]]) -> list[tuple]:
    """Results from the hidden states [T.., dim] that predict continuations which differ in their last token alone."""
    n = len(targets[0][1])
    sums, greedy = [0.0] * len(targets), [True] * len(targets)
    for start in range(0, n, LOGITS_CHUNK):
        stop = min(start + LOGITS_CHUNK, n)
        logits = llama.model.logits(hidden[start:stop])
        if not bool(logits.amax(dim=-1).isfinite().all()):
            raise RuntimeError(UNUSABLE_LOGITS)
        likeliest = logits.argmax(dim=-1).tolist()
        for i, (_, continuation) in enumerate(targets):
            part = continuation[start:stop]
            ids = torch.tensor(part, device=logits.device)
            sums[i] += math.fsum(token_logprobs(logits, ids).tolist())
            greedy[i] = greedy[i] and likeliest == part
    return [(index, (total, same)) for (index, _), total, same in zip(targets, sums, greedy)]
