"""Checks of the arguments that all samplers share."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch

from metamom.common.checks import AT_ONCE

NUMBERS = (int, float, np.integer, np.floating)


def check_seed(seed: int) -> int:
    """Check a seed and return it.

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
    """Check a step number and return it.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is outside 0 <= step < 2^64.
    """
    try:
        step = operator.index(step)
    except TypeError as error:
        raise TypeError(f"step must be an integer >= 0; got {step!r}.") from error
    if not 0 <= step < 2**64:
        raise ValueError(f"step must be in 0 <= step < 2^64; got {step}.")
    return step


def check_count(name: str, value: int, most: int = AT_ONCE) -> int:
    """Check a count and return it: at least one, and no more than fit into memory.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is below 1 or above ``most``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer >= 1; got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be >= 1; got {value}.")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}; got {value}.")
    return int(value)


def check_range(name: str, bounds: Any) -> tuple[float, float]:
    """Check a finite range (low, high) and return it.

    Raises:
        TypeError: if it is not two numbers.
        ValueError: if it is not finite, or low > high.
    """
    try:
        low, high = bounds
    except (TypeError, ValueError):
        low = high = None
    if not (isinstance(low, NUMBERS) and isinstance(high, NUMBERS)):
        raise TypeError(f"{name} must be a range of two numbers (low, high); got {bounds!r}.")
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name} must be a finite range (low, high) with low <= high; got {(low, high)}.")
    return _plain(low), _plain(high)


def check_deviation(name: str, value: Any) -> float:
    """Check a standard deviation and return it.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is negative or not finite.
    """
    if not isinstance(value, NUMBERS):
        raise TypeError(f"{name} is a standard deviation, a number >= 0; got {value!r}.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is a standard deviation, >= 0 and finite; got {value}.")
    return _plain(value)


def check_dtype(dtype: Any) -> torch.dtype:
    """Check a floating-point dtype and return it.

    Raises:
        TypeError: for anything else; points rounded to whole numbers would be different tasks.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type such as torch.float32; got {dtype!r}.")
    return dtype


def check_stream(stream: str) -> str:
    """Check the name of a stream and return it.

    Raises:
        TypeError: if it is not a string.
    """
    if not isinstance(stream, str):
        raise TypeError(f'a stream has a name, such as "train" or "test"; got {stream!r}.')
    return stream


def _plain(number: Any) -> float:
    """Convert to Python's float, which JSON can hold."""
    plain: float = number.item() if isinstance(number, np.generic) else number
    return plain
