"""One engine for any number of callers: one of the waiting callers runs the steps for all of them.

There is no background thread. One of the waiting callers, the driver, steps the engine. The others sleep until one of
their sequences has ended. When the driver's own sequences have ended, another caller becomes the driver. So the
sequences of all callers run in one batch, an exception reaches the caller that it belongs to, and a program with one
thread pays only for a lock. Knows nothing of text.

All ranks must run the same steps in the same order, so with several ranks all calls must come from one thread of each.
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
        self.driver: int | None = None  # the thread that is running a step
        self.sleepers: dict[Call, None] = {}  # in the order in which they went to sleep
        self.only_thread: int | None = None  # the thread that may call, with several ranks
        self._changes: deque[tuple[Callable, Any]] = deque()

    def change(self, method: Callable, argument: Any) -> None:
        """Calls method(argument), which changes the engine: now, or after the current step. Needs the lock."""
        if self.driver is None and not self._changes:
            method(argument)
            return
        self._changes.append((method, argument))
        while self.driver is None and self._changes:
            method, argument = self._changes.popleft()
            method(argument)

    def refresh_model(self) -> bool:
        """Takes over changes that callers may have made to the model. Returns whether they may have made any.

        They may if somebody has a reference to the model, or if there are global hooks or patched classes. Raises as
        `Engine.check`.
        """
        with self.lock:
            self.engine.model_is_held |= self.engine.patches.found
            if not self.engine.model_is_held:
                return False
            if self.driver is None:
                self.engine.refresh_model()
            else:  # the driver's next step refreshes it
                self.engine.check(self.engine.module)
            return True

    def exchange(self, model: nn.Module) -> None:
        """Replaces the model from the next step on. Raises as `Engine.check`, and then keeps the old one."""
        with self.lock:
            self.engine.check(model)
            before, self.engine.module, self.engine.model_is_held = self.engine.module, model, True
            try:
                self.refresh_model()
            except BaseException:
                self.engine.module = before
                raise

    def drive(self) -> None:
        """Runs one step without the lock. Then wakes the callers whose sequences have ended."""
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
                    owner._has_room_again = True
                    owner.end(sequence)
            for call in self.sleepers:
                if call._has_room_again or call._wakes_every_step:
                    call.wake_up.notify()
            while self._changes:
                method, argument = self._changes.popleft()
                method(argument)


class Call(contextlib.AbstractContextManager):
    """One caller's sequences. Leaving the `with` block cancels those that have not ended, and frees their slots.

    Raises:
        RuntimeError: there are several ranks, and earlier calls came from another thread.
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
        if shared.refresh_model():
            with shared.lock:
                shared.change(Slots.outdate, shared.engine.slots)
        self.shared = shared
        self.wake_up = threading.Condition(shared.lock)
        self._open: dict[Sequence, None] = {}
        self._ended: list[Any] = []  # what `step` returns next
        self._n_slots = 0  # that the open sequences need
        self._has_room_again = False  # a sequence has ended since `step` returned
        self._wakes_every_step = False

    def __exit__(self, *_: object) -> None:
        with _HeldInterrupts(), self.shared.lock:
            if self._open:
                self.cancel(set(self._open))
            self._ended = []

    @property
    def has_room(self) -> bool:
        """Whether this call's sequences leave a slot free. Add sequences only then, and the queue stays short."""
        return self._n_slots < len(self.shared.engine.slots)

    @property
    def n_open(self) -> int:
        """How many sequences `step` has yet to return."""
        return len(self._open) + len(self._ended)

    def add(self, sequence: Sequence) -> None:
        """Appends a sequence to the engine's queue, which all callers share."""
        with _HeldInterrupts(), self.shared.lock:
            self.shared.owners[sequence] = self
            self._open[sequence] = None
            self._n_slots += sequence.n_slots
            self.shared.change(self.shared.engine.add, sequence)

    def cancel(self, sequences: set[Sequence]) -> None:
        """Cancels some of the sequences. Their slots are free before the next step."""
        with _HeldInterrupts(), self.shared.lock:
            if is_open := sequences & self._open.keys():
                self.shared.change(self.shared.engine.cancel, is_open)
            for sequence in is_open:
                del self.shared.owners[sequence], self._open[sequence]
                self._n_slots -= sequence.n_slots
            self._ended = [sequence for sequence in self._ended if sequence not in sequences]

    def step(self, every: bool = False) -> list[Sequence]:
        """Runs the engine until some of this call's sequences have ended, and returns them; [] if none are open.

        `Jobs` returns [] too, if a sequence has ended and its job has not: the slot is free for another job.

        Args:
            every: whether to return after each step of the engine, so that the caller can read the tokens so far.

        Raises:
            KeyboardInterrupt: on Ctrl-C, in the main thread, at the end of its current step.
            Exception: a step in this thread raised it. All callers' sequences in progress have failed.
        """
        shared = self.shared
        with _HeldInterrupts() as held, shared.lock:
            n_steps = shared.n_steps
            try:
                while self._open and not (self._ended or self._has_room_again or held.received):
                    if every and shared.n_steps > n_steps:
                        break
                    if shared.driver is None:
                        shared.drive()
                    elif shared.driver == threading.get_ident():
                        raise RuntimeError("a logits_processor called the model that runs it: expected another model")
                    else:
                        self._sleep(every, held)
            finally:
                if shared.driver is None and shared.sleepers:  # the next driver
                    next(iter(shared.sleepers)).wake_up.notify()
            ended, self._ended, self._has_room_again = self._ended, [], False
            return ended

    def end(self, sequence: Sequence) -> None:
        """Notes that a sequence has ended. `step` returns it."""
        self._ended.append(sequence)

    def _sleep(self, every: bool, held: "_HeldInterrupts") -> None:
        """Sleeps until the driver has ended one of this call's sequences, or until this call must drive."""
        self._wakes_every_step = every
        self.shared.sleepers[self] = None
        held.is_waiting = True
        try:
            self.wake_up.wait()
        finally:
            held.is_waiting = False
            del self.shared.sleepers[self]


class _HeldInterrupts:
    """Delays Ctrl-C while the main thread changes state that all callers share, and raises it afterwards.

    A second Ctrl-C is raised at once, and so is the first while `is_waiting` is set. Does nothing in other threads, or
    if the program has its own handler.
    """

    received = is_waiting = False

    def __enter__(self) -> "_HeldInterrupts":
        is_main = threading.current_thread() is threading.main_thread()
        self._holds = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._holds:
            signal.signal(signal.SIGINT, self._hold)
        return self

    def _hold(self, *_: object) -> None:
        if self.received or self.is_waiting:
            raise KeyboardInterrupt
        self.received = True

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.received and kind is None:
            raise KeyboardInterrupt
