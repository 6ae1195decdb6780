"""Checks of arguments that several modules share."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real

import numpy as np

MOST = 2**31 - 1  # of what is done one after the other: iterations, epochs
AT_ONCE = 10_000_000  # of what is in memory at a time: tasks, points
POINTS = 100_000  # of a task, in a command; a library call may have a population of AT_ONCE
INNER_STEPS = 100_000
RUNS = 10_000  # of a comparison


def check_whole(name: str, value: object, least: float, most: float = math.inf) -> int:
    """A whole number, Python's or NumPy's.

    Args:
        name: of the argument, for the error.
        value: the number.
        least: the smallest that there may be.
        most: the largest that there may be.

    Raises:
        TypeError: for another kind of thing, a bool or a string of digits among them.
        ValueError: for a number below ``least`` or above ``most``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number; got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be >= {least}; got {value}.")
    if int(value) > most:
        raise ValueError(f"{name} must be at most {most:,}; got {value}.")
    return int(value)


def check_number(name: str, value: object) -> None:
    """A real number, Python's or NumPy's.

    Raises:
        TypeError: for another kind of thing, a bool or a string of digits among them.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r}.")


def is_word(value: object, words: Collection[str]) -> bool:
    """Whether a value is one of some words; an array would be compared entry by entry, and a list not at all."""
    return isinstance(value, str) and value in words


def check_word(name: str, value: object, words: Collection[str]) -> None:
    """One of some words.

    Raises:
        ValueError: for anything else, listing them.
    """
    if not is_word(value, words):
        raise ValueError(f"{name} must be one of {', '.join(words)}; got {value!r}.")


def check_flag(name: str, value: bool) -> bool:
    """Yes or no.

    Raises:
        TypeError: if it is neither ``True`` nor ``False``: most other values, also "no", would count as yes.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {value!r}.")
    return bool(value)
