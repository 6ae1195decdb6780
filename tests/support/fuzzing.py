"""Seeded damage to files and values, for tests that every door answers it with one clear error.

A campaign is a test over a range of seeds: a few dozen in the default suite, the rest in the slow one. Each case is
made from its seed alone, so that a failure can be run again.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import signal
import string
from collections.abc import Iterator
from typing import Any

import pytest

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "\u2028", "0", "١٢", [], [1], [[]], {}, {"x": 1}, "a" * 10_000,
)  # fmt: skip


def campaign(few: int, many: int) -> pytest.MarkDecorator:
    """Parametrise a test by ``seeds``: 0 to ``few`` in the default suite, up to ``many`` in the slow one."""
    return pytest.mark.parametrize(
        "seeds",
        [
            pytest.param(range(few), id="few"),
            pytest.param(range(few, many), id="many", marks=pytest.mark.slow),
        ],
    )


def damaged(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one fault: bits flipped, bytes cut out, doubled, overwritten or put in, or its end missing."""
    changed = bytearray(data)
    at = rng.randrange(len(data) + 1)
    length = min(rng.choice((1, 2, 8, 64, 1024)), len(data) - at)
    kind = rng.choice(("flip", "cut", "double", "zero", "noise", "insert", "truncate", "append"))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 3, 20))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[at : at + length]
    elif kind == "double":
        changed[at:at] = changed[at : at + length]
    elif kind == "zero":
        changed[at : at + length] = bytes(length)
    elif kind == "noise":
        changed[at : at + length] = rng.randbytes(length)
    elif kind == "insert":
        changed[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
    elif kind == "truncate":
        del changed[at:]
    else:
        changed += rng.randbytes(rng.choice((1, 4, 100)))
    return bytes(changed)


def odd_json(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one part replaced by an odd one, left out, renamed, or one too many."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    container, key = rng.choice(places)
    kind = rng.choice(("replace", "replace", "replace", "remove", "rename", "add"))
    if kind == "replace" or isinstance(container, list):
        container[key] = json.loads(json.dumps(rng.choice(ODD_VALUES)))
    elif kind == "remove":
        del container[key]
    elif kind == "rename":
        container["".join(rng.choices(string.ascii_lowercase, k=5))] = container.pop(key)
    else:
        container["".join(rng.choices(string.ascii_lowercase, k=5))] = rng.choice(ODD_VALUES)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested dicts and lists, as the container and its key or index."""
    for key, entry in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(entry, (dict, list)):
            yield from _places(entry)


@contextlib.contextmanager
def bounded(seconds: int = 20, megabytes: int = 1024) -> Iterator[None]:
    """Fail what runs longer than ``seconds``; let what takes more memory than this on top raise MemoryError."""

    def stop(number: int, frame: Any) -> None:
        raise AssertionError(f"still running after {seconds} s")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
