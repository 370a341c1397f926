"""Damages files and values at random, and holds what must come of it: a result, or an error that says what is wrong.

Everything is drawn from a `random.Random` of the caller's, so that a case can be had again by its number.
"""

import contextlib
import copy
import json
import random
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# What stands in a file in place of a number, a name or a list. The large numbers are the ones that hang a loop or fill
# the memory if nothing checks them.
STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 255, 1 << 16, 1 << 31, 1 << 40, -(1 << 40), 1 << 63, 10**30, 10**400),
    *(0.5, -0.5, 1e-320, 1e300, float("inf"), float("-inf"), float("nan")),
    *("", "x", "2", "\0", "\ud800", "é" * 300, "/etc/passwd", "../x", "a" * 5000),
    *([], {}, [[]], [None], [1, 2], {"x": 1}, {"": {}}, [{}]),
]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one to four changes: bits flipped, bytes overwritten, cut out, doubled, put in, or the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64, 1000))
        piece = changed[at : at + length]
        noise = rng.choice((rng.randbytes(length), b"\0" * length, b"\xff" * length, b"9" * length, b"\n"))
        how = rng.randrange(7)
        if how <= 1 and piece:
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            changed[at : at + length] = noise
        elif how == 3:
            changed[at : at + length] = b""
        elif how == 4:
            changed[at:at] = piece
        elif how == 5:
            changed[at:at] = noise
        elif rng.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON text whose values are changed in one to three places; now and then one that is damaged as text too."""
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = changed(rng, content)
    text = json.dumps(content)
    if rng.random() < 0.02:  # deeper than any parser goes
        text = text.replace(rng.choice(("0", "1", "true", "null", "{}")), "[" * 100_000 + "]" * 100_000, 1)
    return damaged(rng, text.encode()) if rng.random() < 0.1 else text.encode()


def changed(rng: random.Random, content: Any) -> Any:
    """Lists and dictionaries with one change: a value lost, doubled, swapped, made another number or a strange one."""
    content = copy.deepcopy(content)
    place, parent, key = content, None, None
    while isinstance(place, (dict, list)) and place and (parent is None or rng.random() < 0.8):
        parent, key = place, rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place = parent[key]
    if parent is None:
        return rng.choice(STRANGE)
    how = rng.randrange(8)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice(("x", "", "vocab", *parent))] = place
    elif how == 1:
        parent.insert(key, place)
    elif how == 2 and isinstance(place, (int, float)):
        parent[key] = rng.choice((place + 1, place - 1, -place, place * 2, place * 1000, str(place), f"{place}.0"))
    elif how == 3:
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], place
    else:
        parent[key] = copy.deepcopy(rng.choice(STRANGE))
    return content


def count_refused(
    path: Path,
    damage: Callable[[random.Random, bytes], bytes],
    read: Callable[[], object],
    n: int,
    kinds: tuple[type[Exception], ...] = (ValueError, FileNotFoundError),
    seconds: float = 5,
) -> int:
    """Damages a file n times and reads it: it is read, or refused with its directory in the message. The file is whole
    again at the end.

    Args:
        path: the file.
        damage: makes its new contents of the old.
        read: reads it.
        n: how many times.
        kinds: the exceptions that are right. They are taken exactly: a UnicodeDecodeError is no ValueError here.
        seconds: how long a read may take.
    """
    data, refused = path.read_bytes(), 0
    with memory_limit(300_000_000):
        for number in range(n):
            path.write_bytes(damage(random.Random(f"{path.name} {number}"), data))
            try:
                refused += is_refused(read, [str(path.parent)], kinds, seconds)
            except AssertionError as error:
                raise AssertionError(f"case {number} of {path.name}: {error}") from error.__context__
    path.write_bytes(data)
    return refused


def is_refused(
    call: Callable[[], object], names: Iterable[str], kinds: tuple[type[Exception], ...], seconds: float
) -> bool:
    """Whether a call raises an exception of these kinds with one of the names in it. No other is right."""
    started = time.perf_counter()
    try:
        with time_limit(seconds):
            call()
        return False
    except Exception as error:
        assert type(error) in kinds, f"{type(error).__name__}: {str(error)[:300]}"
        assert "MemoryError" not in str(error), str(error)[:300]
        assert any(name in str(error) for name in names), f"none of {list(names)} in: {str(error)[:300]}"
        assert len(str(error)) < 2000, f"a message of {len(str(error))} characters: {str(error)[:300]}"
        return True
    finally:
        assert time.perf_counter() - started < 2 * seconds


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer."""

    def end(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit(n_bytes: int) -> Iterator[None]:
    """Holds that the process's memory grows by at most n_bytes meanwhile, at its highest.

    What would take far more than that gets a MemoryError, so that a mistake does not take the machine's memory.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now
    before = _memory("VmRSS")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + n_bytes + 4_000_000_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    grown = _memory("VmHWM") - before
    assert grown < n_bytes, f"memory grew by {grown:,} bytes"


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
