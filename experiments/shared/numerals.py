"""Numbers in names: of runs, files, rows and lines of a figure."""

from __future__ import annotations

from collections.abc import Sequence


def shortest(value: float) -> str:
    """A number as short as it can be told from every other: ``0.1``, ``1``, ``1e+12``, ``0.10000001``."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def told_apart(values: Sequence[float]) -> list[str]:
    """Labels of one axis: six digits each, but all of those where two would look alike."""
    short = [f"{value:g}" for value in values]
    return [text if short.count(text) == 1 else shortest(value) for text, value in zip(short, values, strict=True)]
