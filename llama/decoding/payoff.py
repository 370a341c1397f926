"""Decides whether to use proposals: times decode steps with and without them, and takes the faster way.

A pass over several positions takes longer than over one, and the draft itself takes time. How long depends on the
machine, the number of sequences and the text, so both are measured. Proposals that lose are switched off after a few
steps. They are tried again once the time that the last trial lost is a hundredth of the time since. No answer depends
on these decisions. Knows nothing of models or tokens.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist

TRIAL = 4  # steps of a trial with proposals
WINDOW = 16  # steps with proposals between two decisions
DECISIONS = 4  # after this many decisions for proposals, some steps without them are timed again
PROBE = 2  # how many steps
WAITS = range(64, 1 << 14)  # steps without proposals between two trials
SHARE = 0.01  # of the time that trials may lose


class Payoff:
    """Decides for each number of rows, rounded to powers of two, whether the next step should have proposals.

    Args:
        group: the ranks that run the same steps. The clock of the first rank decides for all of them.
        device: where tensors must be so that this group can broadcast them.
        clock: returns seconds.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.group, self.device, self.clock = group, device, clock
        self._trials: dict[int, Trials] = {}

    def at(self, n_rows: int) -> "Trials":
        """Returns the trials for about this many rows."""
        size = n_rows.bit_length()
        if size not in self._trials:
            self._trials[size] = Trials(self._first_ranks)
        return self._trials[size]

    def _first_ranks(self, decision: list[int]) -> list[int]:
        """Returns the decision of the first rank."""
        if self.group is None or dist.get_world_size(self.group) == 1:
            return decision
        numbers = torch.tensor(decision, device=self.device)
        dist.broadcast(numbers, src=dist.get_global_rank(self.group, 0), group=self.group)
        return numbers.tolist()


class Trials:
    """Records the times of steps with and without proposals, and decides which come next.

    Decisions come after a number of steps, never after a time, so all ranks decide at the same step.
    """

    def __init__(self, agreed: Callable[[list[int]], list[int]]):
        self._agreed = agreed
        self.proposing = True  # whether the next step should have proposals
        self._left = TRIAL  # steps until the next decision
        self._n_decisions = 0  # since steps without proposals were timed
        self._is_first = True
        self._without: deque[float] = deque(maxlen=9)  # seconds of steps without proposals
        self._with: deque[float] = deque(maxlen=WINDOW)  # seconds of steps with proposals,
        self._tokens: deque[float] = deque(maxlen=WINDOW)  # and how many tokens each row got in them
        self._spent = self._got = 0.0  # seconds and tokens since the last decision

    def note_with(self, seconds: float, tokens: float) -> None:
        """Records a step with proposals: its seconds, the draft's included, and how many tokens each row got."""
        if self._is_first:  # slower than the others: it packs the draft and touches memory for the first time
            self._is_first = False
            return
        self._with.append(seconds)
        self._tokens.append(tokens)
        self._spent += seconds
        self._got += tokens
        self._count()

    def note_without(self, seconds: float, proposing: float = 0.0) -> None:
        """Records a step without proposals, after `proposing` seconds in which the draft found none."""
        self._without.append(seconds)
        self._spent += proposing
        if not self.proposing:
            self._count()

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.proposing, self._left = map(int, self._agreed(self._decide()))

    def _decide(self) -> list[int]:
        """Whether to propose, and how many steps until the next decision."""
        if self.proposing:
            self._n_decisions += 1
            if not self._without or self._n_decisions > DECISIONS:
                self._n_decisions = 0
                return [False, PROBE]
        elif not self._with:  # a wait is over
            return [True, TRIAL]
        without = statistics.median(self._without)
        pays = statistics.median(self._with) <= statistics.mean(self._tokens) * without
        lost, self._spent, self._got = self._spent - self._got * without, 0.0, 0.0
        if pays:
            return [True, WINDOW]
        self._n_decisions = 0
        self._with.clear()
        self._tokens.clear()
        wait = lost / SHARE / max(without, 1e-9)
        return [False, int(min(max(wait, WAITS.start), WAITS.stop))]
