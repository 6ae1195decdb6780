"""Checks that operators share: finite entries, seeds, and valid arguments for constants."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metamom.common.checks import check_number


def all_finite(entries: Tensor) -> bool:
    """Whether no entry is infinite or NaN."""
    # the sum is cheap and almost always finite; if it is not, finite entries may still have overflowed it
    total = entries.sum(dtype=torch.promote_types(entries.dtype, torch.float32))
    return bool(total.isfinite()) or bool(entries.isfinite().all())


def check_seed(seed: int) -> None:
    """Check a seed.

    Raises:
        ValueError: unless it is a whole number, 0 <= seed < 2^64.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"a seed is a whole number, 0 <= seed < 2^64; got {seed!r}.")


def check_weight(kind: str, name: str, weight: float, what: str = "a weight") -> float:
    """Check a weight in an average.

    Args:
        kind: the operator's name, for the error.
        name: the argument's.
        weight: what it was given.
        what: says what it weighs, for the error.

    Raises:
        TypeError: for anything but a number.
        ValueError: unless 0 < weight <= 1.
    """
    check_number(f"{kind}'s {name}", weight)
    if not 0 < weight <= 1:
        raise ValueError(f"{kind} needs {what} 0 < {name} <= 1; got {weight}.")
    return float(weight)


def check_setting(d: int, workers: int, zeta2: float, bound: float | None) -> None:
    """Check the arguments of `BiasOperator.constants`.

    Raises:
        ValueError: for an argument out of range.
    """
    for name, count in (("d", d), ("workers", workers)):
        if not (count >= 1 and count % 1 == 0):
            raise ValueError(f"{name} must be a whole number >= 1; got {count!r}.")
    for name, number in (("zeta2", zeta2), ("bound", 0.0 if bound is None else bound)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite; got {number!r}.")
