"""One engine for any number of callers: whoever waits for an answer runs the next step for all of them.

There is no thread of our own. A caller that has nothing to do until its sequences end takes the wheel and steps the
engine; the others sleep until one of theirs has ended, and one of them takes over when the driver leaves. So the
sequences of all callers run in one batch, an exception stays with its caller, and a program of one thread pays for a
lock and nothing else. Knows nothing of text.

On several ranks each must run the same steps in the same order, so calls come from one thread a rank there.
"""

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn

from llama.engine import Engine
from llama.kv_cache import Slots
from llama.sequence import Sequence


class SharedEngine:
    """An engine, and the calls that have sequences in it."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.n_steps = 0
        self.lock = threading.RLock()
        self.owners: dict[Sequence, Call] = {}
        self.driver: int | None = None  # the thread that runs a step
        self.sleepers: dict[Call, None] = {}  # in the order they came
        self.only_thread: int | None = None  # of several ranks
        self._changes: deque[tuple[Callable, Any]] = deque()

    def change(self, method: Callable, argument: Any) -> None:
        """Has the engine changed at once, or after the step that it is in. The caller holds the lock."""
        if self.driver is None:
            method(argument)
        else:
            self._changes.append((method, argument))

    def look_again(self) -> bool:
        """Has the engine run its model as it is now, from the next step on, if that may be another than it was.

        It may where somebody holds the model, or has hooked or patched all models. Returns whether it may. Raises as
        `Engine.check`.
        """
        with self.lock:
            self.engine.model_is_held |= self.engine.patches.found
            if not self.engine.model_is_held:
                return False
            if self.driver is None:
                self.engine.look_again()
            else:  # which looks before its next step
                self.engine.check(self.engine.opened)
            return True

    def exchange(self, model: nn.Module) -> None:
        """Has the engine run another model from the next step on. Raises as `Engine.check`, and keeps the old one."""
        with self.lock:
            self.engine.check(model)
            before, self.engine.opened, self.engine.model_is_held = self.engine.opened, model, True
            try:
                self.look_again()
            except BaseException:
                self.engine.opened = before
                raise

    def drive(self) -> None:
        """Runs one step without the lock, and wakes those whom it concerns."""
        self.driver = threading.get_ident()
        self.lock.release()
        try:
            ended = self.engine.step()
        except BaseException:
            ended = [s for s in [*self.owners] if s.finish_reason is not None]
            raise
        finally:
            self.lock.acquire()
            self.driver = None
            self.n_steps += 1
            for sequence in ended:
                if (owner := self.owners.pop(sequence, None)) is not None:
                    del owner._open[sequence]
                    owner._n_slots -= sequence.n_slots
                    owner.end(sequence)
            for call in self.sleepers:
                if call.has_news:
                    call.news.notify()
            while self._changes:
                method, argument = self._changes.popleft()
                method(argument)


class Call(contextlib.AbstractContextManager):
    """One caller's sequences. Leaving its `with` cancels those that have not ended; their slots are free then.

    Raises:
        RuntimeError: on several ranks, if the calls so far came from another thread.
    """

    def __init__(self, shared: SharedEngine):
        if dist.get_world_size() > 1:
            here = threading.get_ident()
            if shared.only_thread not in (None, here):
                raise RuntimeError(
                    f"a call from a second thread, {threading.current_thread().name!r}, in a run of "
                    f"{dist.get_world_size()} processes: expected calls from one thread, the same ones in each process"
                )
            shared.only_thread = here
        if shared.look_again():
            with shared.lock:
                shared.change(Slots.outdate, shared.engine.slots)
        self.shared = shared
        self.news = threading.Condition(shared.lock)
        self._open: dict[Sequence, None] = {}
        self._ended: list[Any] = []  # what `step` returns next
        self._n_slots = 0  # of those that are open
        self._wants_steps = False

    def __exit__(self, *_: object) -> None:
        with _HeldInterrupts(), self.shared.lock:
            for sequence in self._open:
                del self.shared.owners[sequence]
            if self._open:
                self.shared.change(self.shared.engine.cancel, set(self._open))
            self._open, self._ended = {}, []

    @property
    def has_room(self) -> bool:
        """Whether a sequence more would keep the slots busy: add as long as it is so, and the queue stays short."""
        return self._n_slots < len(self.shared.engine.slots)

    @property
    def n_open(self) -> int:
        """How many sequences run or wait, or have ended and not been returned by `step`."""
        return len(self._open) + len(self._ended)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the engine's queue, behind those of every caller."""
        with _HeldInterrupts(), self.shared.lock:
            self.shared.owners[sequence] = self
            self._open[sequence] = None
            self._n_slots += sequence.n_slots
            self.shared.change(self.shared.engine.add, sequence)

    def cancel(self, sequences: set[Sequence]) -> None:
        """Forgets some of the sequences; their slots are free before the next step."""
        with _HeldInterrupts(), self.shared.lock:
            if is_open := sequences & self._open.keys():
                self.shared.change(self.shared.engine.cancel, is_open)
            for sequence in is_open:
                del self.shared.owners[sequence], self._open[sequence]
                self._n_slots -= sequence.n_slots
            self._ended = [sequence for sequence in self._ended if sequence not in sequences]

    def step(self, every: bool = False) -> list[Sequence]:
        """Lets the engine run until some of this call's sequences have ended, and returns these; [] if none are open.

        Args:
            every: whether to come back after each step of the engine, to look at the tokens so far.

        Raises:
            KeyboardInterrupt: Ctrl-C in the main thread, once the step that it runs has ended.
            Exception: whatever a step that ran in this thread raised. The sequences of all callers that were in
                progress have failed then.
        """
        shared = self.shared
        with _HeldInterrupts() as held, shared.lock:
            n_steps = shared.n_steps
            try:
                while self._open and not self._ended and not (every and shared.n_steps > n_steps) and not held.came:
                    if shared.driver is None:
                        shared.drive()
                    elif shared.driver == threading.get_ident():
                        raise RuntimeError("a logits_processor called the model that runs it: expected another model")
                    else:
                        self._sleep(every, held)
            finally:
                if shared.driver is None and shared.sleepers:  # somebody else takes the wheel
                    next(iter(shared.sleepers)).news.notify()
            ended, self._ended = self._ended, []
            return ended

    @property
    def has_news(self) -> bool:
        """Whether this call, which sleeps, wants to be woken."""
        return bool(self._ended) or self._wants_steps

    def end(self, sequence: Sequence) -> None:
        """Has `step` return a sequence, which has ended."""
        self._ended.append(sequence)

    def _sleep(self, every: bool, held: "_HeldInterrupts") -> None:
        """Waits until another thread has news for this call, or leaves it the wheel."""
        self._wants_steps = every
        self.shared.sleepers[self] = None
        held.waits = True
        try:
            self.news.wait()
        finally:
            held.waits = False
            del self.shared.sleepers[self]


class _HeldInterrupts:
    """Holds Ctrl-C back while the main thread changes what all callers share, and raises it afterwards.

    A second Ctrl-C is raised at once, and so is the first while `waits` is set. In other threads, and where the program
    has a handler of its own, nothing is done.
    """

    came = waits = False

    def __enter__(self) -> "_HeldInterrupts":
        is_main = threading.current_thread() is threading.main_thread()
        self._holds = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._holds:
            signal.signal(signal.SIGINT, self._hold)
        return self

    def _hold(self, *_: object) -> None:
        if self.came or self.waits:
            raise KeyboardInterrupt
        self.came = True

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.came and kind is None:
            raise KeyboardInterrupt
