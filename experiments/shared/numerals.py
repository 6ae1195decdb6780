"""Numbers in the names of runs, files, table rows and plotted lines."""

from __future__ import annotations

from collections.abc import Sequence


def shortest(value: float) -> str:
    """The shortest form that distinguishes a number from every other: ``0.1``, ``1``, ``1e+12``, ``0.10000001``."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def distinguishable(values: Sequence[float]) -> list[str]:
    """Labels of one axis: six digits each, or all digits where two would look the same."""
    short = [f"{value:g}" for value in values]
    return [text if short.count(text) == 1 else shortest(value) for text, value in zip(short, values, strict=True)]
