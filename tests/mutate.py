"""Damages files and values at random, and holds what must come of it: a result, or an error that says what is wrong."""

import contextlib
import copy
import json
import random
import signal
import time
from collections.abc import Callable, Iterator
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


def damaged_json(rng: random.Random, content: Any) -> bytes:
    """A JSON text whose values are changed in one to three places; now and then one that is damaged as text too."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = _with_a_change(rng, content)
    text = json.dumps(content)
    if rng.random() < 0.02:
        text = text.replace(rng.choice(("0", "1", "true", "null", "{}")), "[" * 100_000 + "]" * 100_000, 1)
    return damaged(rng, text.encode()) if rng.random() < 0.1 else text.encode()


def _with_a_change(rng: random.Random, content: Any) -> Any:
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
        parent[key] = rng.choice((place + 1, place - 1, -place, place * 2, place * 10**6, float(place), str(place)))
    elif how == 3:
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], place
    else:
        parent[key] = copy.deepcopy(rng.choice(STRANGE))
    return content


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


def is_refused(call: Callable[[], object], names: tuple[str, ...], kinds: tuple[type, ...], seconds: float) -> bool:
    """Whether a call raises one of these exceptions, in time, with one of the names in its message; no other is right.

    `kinds` are taken exactly: a UnicodeDecodeError is no ValueError here.
    """
    started = time.perf_counter()
    try:
        with time_limit(seconds):
            call()
        return False
    except Exception as error:
        assert type(error) in kinds, f"{type(error).__name__}: {str(error)[:300]}"
        assert any(name in str(error) for name in names), f"{names} not in: {str(error)[:300]}"
        assert len(str(error)) < 2000, f"a message of {len(str(error))} characters: {str(error)[:300]}"
        return True
    finally:
        assert time.perf_counter() - started < 2 * seconds
