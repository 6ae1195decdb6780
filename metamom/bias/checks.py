"""What operators refuse, each check without an operator: entries that are not finite, and what has no constants."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(entries: Tensor) -> bool:
    """Whether no entry is infinite or NaN."""
    # the sum is cheap and finite almost always; where it is not, a large sum of finite entries may be why
    total = entries.sum(dtype=torch.promote_types(entries.dtype, torch.float32))
    return bool(total.isfinite()) or bool(entries.isfinite().all())


def check_setting(d: int, workers: int, zeta2: float, bound: float | None) -> None:
    """Refuse what no constants are for; the arguments are those of `BiasOperator.constants`.

    Raises:
        ValueError: for what is out of range.
    """
    for name, count in (("d", d), ("workers", workers)):
        if not (count >= 1 and count % 1 == 0):
            raise ValueError(f"{name} must be a whole number >= 1; got {count!r}.")
    for name, number in (("zeta2", zeta2), ("bound", 0.0 if bound is None else bound)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite; got {number!r}.")
