"""Whether proposals pay: steps with them and without are timed, and the faster way is taken.

A pass over several positions takes longer than one over a single position, and a draft takes time of its own. How much
depends on the machine, on how many sequences run, and on the text, so nothing is assumed: proposals that lose are left
after a few steps, and tried again once what the last try has lost is a hundredth of the time since. Knows nothing of
models or tokens; no answer depends on it.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist

TRIAL = 4  # steps of a try with proposals
WINDOW = 16  # steps with proposals from one look at their times to the next
LOOKS = 4  # after so many looks a few steps are timed without proposals, for the machine may have become faster
PROBE = 2  # how many
WAITS = range(64, 1 << 14)  # steps without proposals from one try to the next
SHARE = 0.01  # of the time, which tries that lose may cost


class Payoff:
    """For each number of rows, as powers of two, whether the next step should have proposals.

    Args:
        group: the ranks that run the same steps. The first one's clock decides for all of them.
        device: where a number can be that this group passes on.
        clock: seconds since some time.
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
        """The trials of about so many rows."""
        size = n_rows.bit_length()
        if size not in self._trials:
            self._trials[size] = Trials(self._first_ranks)
        return self._trials[size]

    def _first_ranks(self, decision: list[int]) -> list[int]:
        """What the first rank has decided."""
        if self.group is None or dist.get_world_size(self.group) == 1:
            return decision
        numbers = torch.tensor(decision, device=self.device)
        dist.broadcast(numbers, src=dist.get_global_rank(self.group, 0), group=self.group)
        return numbers.tolist()


class Trials:
    """Times of steps with proposals and without, and which of them come next.

    Decisions are due after a number of steps, and never after a time: so ranks come to them together.
    """

    def __init__(self, agreed: Callable[[list[int]], list[int]]):
        self._agreed = agreed
        self.proposing = True  # whether the next step should have proposals
        self._left = TRIAL  # steps until the next decision
        self._looks = 0  # since steps without proposals were timed
        self._is_first = True
        self._without: deque[float] = deque(maxlen=9)  # seconds of steps without proposals
        self._with: deque[float] = deque(maxlen=WINDOW)  # seconds of steps with proposals,
        self._tokens: deque[float] = deque(maxlen=WINDOW)  # and the tokens that each row got of them
        self._spent = self._got = 0.0  # seconds and tokens since the last decision

    def note_with(self, seconds: float, tokens: float) -> None:
        """Notes a step with proposals, their making included, that gave each row so many tokens."""
        if self._is_first:  # the draft has been packed in it, and memory was touched for the first time
            self._is_first = False
            return
        self._with.append(seconds)
        self._tokens.append(tokens)
        self._spent += seconds
        self._got += tokens
        self._count()

    def note_without(self, seconds: float, looked: float = 0.0) -> None:
        """Notes a step without proposals; `looked` seconds went by before it, as there was none to make."""
        self._without.append(seconds)
        self._spent += looked
        if not self.proposing:
            self._count()

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.proposing, self._left = map(int, self._agreed(self._decide()))

    def _decide(self) -> list[int]:
        """Whether to propose, and how many steps until the next decision."""
        if self.proposing:
            self._looks += 1
            if not self._without or self._looks > LOOKS:
                self._looks = 0
                return [False, PROBE]
        elif not self._with:  # a wait is over
            return [True, TRIAL]
        without = statistics.median(self._without)
        pays = statistics.median(self._with) <= statistics.mean(self._tokens) * without
        lost, self._spent, self._got = self._spent - self._got * without, 0.0, 0.0
        if pays:
            return [True, WINDOW]
        self._looks = 0
        self._with.clear()
        self._tokens.clear()
        wait = lost / SHARE / max(without, 1e-9)
        return [False, int(min(max(wait, WAITS.start), WAITS.stop))]
