"""Ranges that several theorems share, and the words for what is out of them."""

from __future__ import annotations

from math import inf


def positive(**numbers: float) -> None:
    """Refuse numbers that are not > 0 and finite."""
    for name, value in numbers.items():
        if not 0 < value < inf:
            raise ValueError(f"{name} must be > 0 and finite; got {value!r}.")


def not_negative(**numbers: float) -> None:
    """Refuse numbers that are not >= 0 and finite."""
    for name, value in numbers.items():
        if not 0 <= value < inf:
            raise ValueError(f"{name} must be >= 0 and finite; got {value!r}.")


def weight(**numbers: float) -> None:
    """Refuse numbers outside (0, 1]: weights of what is new, and contractions."""
    for name, value in numbers.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1]; got {value!r}. 1 forgets the past, or compresses nothing.")


def share(**numbers: float) -> None:
    """Refuse numbers outside (0, 1)."""
    for name, value in numbers.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must be in (0, 1), ends excluded; got {value!r}.")


def counts(**numbers: int) -> None:
    """Refuse what is no whole number >= 1."""
    for name, value in numbers.items():
        if value != int(value) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1; got {value!r}.")


def horizon(K: float) -> None:
    """Refuse what is no number of steps; infinity is one."""
    if not K >= 1:
        raise ValueError(f"K must be >= 1 steps, or math.inf for what is left in the end; got {K!r}.")


def step(gamma: float, limit: float, why: str) -> None:
    """Refuse a step size outside (0, limit]. The limit itself passes, however it was rounded."""
    if not 0 < gamma <= limit * (1 + 1e-12):
        raise ValueError(f"{why} needs 0 < gamma <= {limit:.6g}; got gamma={gamma!r}. Take a step in that range.")


def room(left: float, used: str, cure: str) -> float:
    """What a denominator leaves for the gradient, ``1 - used``; refuse none at all."""
    if not left > 0:
        raise ValueError(f"the bound needs {used} < 1; got {1 - left:.6g}, so nothing is guaranteed. {cure}")
    return left
