"""The median and the quartiles of timings."""

from __future__ import annotations

from typing import Any

import numpy as np


def spread(values: Any) -> dict[str, float]:
    """The median and the quartiles, as JSON values."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low_quartile": float(low), "high_quartile": float(high)}


def shown(spread: dict[str, float]) -> str:
    """``median (low quartile to high quartile)``."""
    median, low, high = (short(spread[key]) for key in ("median", "low_quartile", "high_quartile"))
    return f"{median} ({low} to {high})"


def short(value: float) -> str:
    """Three digits, or all digits before the decimal point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"
