"""Checks of arguments that several modules share."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real

import numpy as np

MOST = 2**31 - 1  # limit for sequential things: iterations, epochs
AT_ONCE = 10_000_000  # limit for things in memory at the same time: tasks, points
POINTS = 100_000  # limit for points of a task in a command; a library call may have AT_ONCE
INNER_STEPS = 100_000
RUNS = 10_000  # limit for runs of a comparison


def check_whole(name: str, value: object, least: float, most: float = math.inf) -> int:
    """Check for a whole number (Python's or NumPy's) and return it.

    Args:
        name: of the argument, for the error.
        value: the number.
        least: the smallest allowed value.
        most: the largest allowed value.

    Raises:
        TypeError: for any other type, including a bool or a string of digits.
        ValueError: for a number below ``least`` or above ``most``.
    """
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name} must be a whole number; got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be >= {least}; got {value}.")
    if int(value) > most:
        raise ValueError(f"{name} must be at most {most:,}; got {value}.")
    return int(value)


def check_ways(ways: object) -> int:
    """Check the number of classes of a task and return it. With one class, the loss is 0 and nothing is learned.

    Raises:
        TypeError: if it is not a whole number.
        ValueError: if it is below 2 or above `AT_ONCE`.
    """
    ways = check_whole("ways", ways, -math.inf, AT_ONCE)
    if ways < 2:
        raise ValueError(f"ways must be >= 2, since one class leaves nothing to distinguish; got {ways}.")
    return ways


def check_number(name: str, value: object) -> None:
    """Check for a real number (Python's or NumPy's).

    Raises:
        TypeError: for any other type, including a bool or a string of digits.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r}.")


def is_word(value: object, words: Collection[str]) -> bool:
    """Whether a value is one of some words. Safe for arrays (compared entry by entry) and lists (not hashable)."""
    return isinstance(value, str) and value in words


def check_word(name: str, value: object, words: Collection[str]) -> None:
    """Check for one of some words.

    Raises:
        ValueError: for anything else, listing the words.
    """
    if not is_word(value, words):
        raise ValueError(f"{name} must be one of {', '.join(words)}; got {value!r}.")


def check_flag(name: str, value: bool) -> bool:
    """Check for a bool and return it.

    Raises:
        TypeError: if it is neither ``True`` nor ``False``, since most other values, even "no", are truthy.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {value!r}.")
    return bool(value)
