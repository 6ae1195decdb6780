"""The coordinates of an operator's gradients (worker, step, parameter tensor), which seed random operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.bias.checks import all_finite

Sizes = Sequence[int]


class NonFiniteError(ValueError):
    """A worker's gradient has an infinite or NaN entry, or an operator's output does."""


class Coordinates(NamedTuple):
    """The coordinates of rows of gradients, from which random operators draw.

    Attributes:
        step: number of the call, from 0.
        workers: the worker of each row.
        tensor: number of the parameter tensor in a layer-wise operator, else 0.
        operator: number of the operator in a composition, else 0, so that two of the same kind draw independently.
        generators: for each ``generator=`` a copy to draw from; a transition sets this.
    """

    step: int
    workers: Sequence[int]
    tensor: int = 0
    operator: int = 0
    generators: Mapping[torch.Generator, torch.Generator] = MappingProxyType({})


def numbers(workers: Sequence[int] | None, rows: int) -> Sequence[int]:
    """The rows' workers, 0, 1, ... by default.

    Raises:
        ValueError: unless there is one number >= 0 for each row, all distinct.
    """
    if workers is None:
        return range(rows)
    if len(workers) != rows or len(set(workers)) != rows or min(workers, default=0) < 0:
        raise ValueError(f"workers are {rows} numbers >= 0 that differ, one for each gradient; got {list(workers)}.")
    return workers


def check_gradient(gradient: Tensor) -> None:
    """Refuse a gradient that no operator supports."""
    if not gradient.is_floating_point():
        raise TypeError(f"a bias operator acts on floating-point gradients; got {gradient.dtype}.")
    if gradient.dim() == 0 or gradient.shape[-1] == 0:
        raise ValueError(f"a bias operator acts on gradients [..., d] with d >= 1; got shape {tuple(gradient.shape)}.")
    if not all_finite(gradient):
        bad = ~gradient.isfinite()
        first = int(bad.reshape(-1, gradient.shape[-1]).any(-1).nonzero()[0])
        raise NonFiniteError(
            f"{int(bad.sum())} entries of the gradients are infinite or NaN, the first in row {first} (rows are "
            "workers): a smaller step size, or the loss, must keep them finite; no operator can."
        )


def place_of(rows: Tensor, step: int, workers: Sequence[int] | None) -> Coordinates:
    """The coordinates of gradients ``[n, d]``, for a transition.

    Raises:
        TypeError: as `check_gradient`.
        ValueError: as `check_gradient` and `numbers`.
    """
    check_gradient(rows)
    return Coordinates(step, numbers(workers, len(rows)))
