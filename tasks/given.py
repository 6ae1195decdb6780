"""Families with given parameters: one array for all tasks, or one for each of n tasks.

Legend: T tasks, n given tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from metamom.batch import TaskBatch, block
from metamom.rng import DrawCoordinates, Floats
from metamom.tasks.family import TaskFamily

Values = ArrayLike | Tensor
MOST_LISTED = 1000  # larger arrays are described by their digest


class GivenFamily(TaskFamily):
    """A family that may have given parameters for n tasks. Task t of a meta-batch is then given task t mod n.

    `FixedTasks(family, n)` contains the n given tasks in order.

    Args:
        given: arrays ``[1, ...]`` for all tasks or ``[n, ...]``, by name; ``None`` for parameters that are drawn.
        seed: 0 <= seed < 2^64.

    Attributes:
        given: n, or ``None`` if nothing is given for single tasks.

    Raises:
        ValueError: for arrays of different n; from `sample`, for a number of tasks that n doesn't divide.
    """

    def __init__(self, given: dict[str, Floats | None], *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        counts = {name: len(array) for name, array in given.items() if array is not None and len(array) > 1}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise ValueError(
                f"arguments given per task must all have the same number n of tasks; got {listed}. Give one for each "
                "task, or one for all."
            )
        self.given = next(iter(counts.values()), None)

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        """See `TaskFamily.sample`. A meta-batch has each of the n given tasks equally often."""
        block(num_tasks, rank, world_size)
        if self.given is not None and num_tasks % self.given:
            raise ValueError(
                f"a meta-batch must have each of the {self.given} given tasks equally often; got {num_tasks} tasks. "
                f"Use a multiple of {self.given}, or FixedTasks(..., n={self.given}), which chooses some at each "
                "step."
            )
        return super().sample(step, num_tasks, rank=rank, world_size=world_size)

    def of_tasks(self, array: Floats, tasks: DrawCoordinates) -> Floats:
        """Select each task's entry of an array ``[n, ...]`` or ``[1, ...]``: ``[T, ...]``."""
        picked: Floats = array[tasks.indices % len(array)]
        return picked


def given(name: str, values: Values | None, *shape: int) -> Floats | None:
    """Copy one array ``[*shape]`` for all tasks to ``[1, *shape]``, or one for each of n tasks to ``[n, *shape]``.

    Raises:
        TypeError: for anything but real numbers.
        ValueError: for another shape, no tasks, or a number that isn't finite.
    """
    if values is None:
        return None
    array = _numbers(name, values)
    one = array[None] if array.ndim == len(shape) else array
    if one.shape[1:] != shape or not len(one):
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"{name} must be [{wanted}], one for all tasks, or [n, {wanted}], one for each of n; "
            f"got {list(array.shape)}."
        )
    if not np.isfinite(one).all():
        raise ValueError(f"{name} must be finite; got {array[~np.isfinite(array)][0]}.")
    return one


def as_numpy(values: Values) -> Any:
    """Convert a tensor to a NumPy array. NumPy 2 warns if it has to convert a tensor itself."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _numbers(name: str, values: Values) -> Floats:
    try:
        array = np.asarray(as_numpy(values))
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} must be an array of numbers, all rows of one length ({error}).") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of real numbers; got {array.dtype} ({values!r:.100}).")
    return array.astype(np.float64)


def described(array: Floats | None) -> Any:
    """Describe an array by JSON values: its numbers, or its shape and digest if it is large."""
    if array is None or array.size <= MOST_LISTED:
        return None if array is None else array.tolist()
    return {"shape": list(array.shape), "sha256": hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()}


def described_range(bounds: Sequence[float] | None) -> list[float] | None:
    """A range as JSON values."""
    return None if bounds is None else list(bounds)
