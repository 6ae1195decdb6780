"""Checks of the arguments that all samplers share."""

from __future__ import annotations

import operator

import numpy as np


def check_seed(seed: int) -> int:
    """The seed itself.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is outside 0 <= seed < 2^64.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an integer; got {seed!r}.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0 <= seed < 2^64; got {seed}.")
    return int(seed)


def check_step(step: int) -> int:
    """The step itself.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is outside 0 <= step < 2^64.
    """
    step = operator.index(step)
    if not 0 <= step < 2**64:
        raise ValueError(f"step must be in 0 <= step < 2^64; got {step}.")
    return step


def check_count(name: str, value: int) -> int:
    """A number of things, at least one.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer >= 1; got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be >= 1; got {value}.")
    return int(value)
