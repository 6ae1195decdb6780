"""Sinusoid regression, the family of MAML's first experiments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.rng import DrawCoordinates, Floats, Purpose, normals, uniforms
from metamom.tasks.checks import check_count, check_deviation, check_dtype, check_range
from metamom.tasks.family import TaskFamily


class Sinusoid(TaskFamily):
    """Tasks ``y = A sin(x + p) + noise``, with A, p uniform over tasks and x uniform over points.

    The points of a task are drawn independently; values are computed in float64 and then rounded to ``dtype``.

    Args:
        shots: support points a task, >= 1.
        queries: query points a task, >= 1.
        amplitude: range of A (low <= high).
        phase: range of p, in radians.
        x_range: range of x.
        noise: standard deviation of Gaussian noise on y, >= 0.
        seed: 0 <= seed < 2^64.
        dtype: of all four tensors.

    Returns (from `sample`):
        ``x, y: [T, shots or queries, 1]``.

    Raises:
        ValueError: for an empty range, a count below 1 or a negative noise.

    Example:
        >>> Sinusoid(shots=5).sample(0, 4).support_x.shape
        torch.Size([4, 5, 1])

    Reference:
        Finn, Abbeel, Levine, "Model-agnostic meta-learning" (2017), section 5.1.
    """

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        *,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x_range: tuple[float, float] = (-5.0, 5.0),
        noise: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(seed=seed)
        self.shots, self.queries = check_count("shots", shots), check_count("queries", queries)
        self.amplitude, self.phase = check_range("amplitude", amplitude), check_range("phase", phase)
        self.x_range = check_range("x_range", x_range)
        self.noise, self.dtype = check_deviation("noise", noise), check_dtype(dtype)

    def parameters(self, tasks: DrawCoordinates) -> tuple[Floats, Floats]:
        """Amplitude and phase of the tasks at these coordinates, ``[T]`` each."""
        u = uniforms(self.seed, tasks, Purpose.TASK, 2)
        return _within(self.amplitude, u[:, 0]), _within(self.phase, u[:, 1])

    def draw(self, tasks: DrawCoordinates, data: DrawCoordinates) -> TaskBatch:
        """See `TaskFamily.draw`."""
        amplitude, phase = (p[:, None] for p in self.parameters(tasks))
        points = self.shots + self.queries
        # Draw noise after the points, so that adding noise does not change any point.
        u = uniforms(self.seed, data, Purpose.DATA, points + (2 * points if self.noise else 0))
        x = _within(self.x_range, u[:, :points])
        y = amplitude * np.sin(x + phase)
        if self.noise:
            y = y + self.noise * normals(u[:, points:])[:, :points]
        x_all, y_all = self._tensor(x), self._tensor(y)
        s = self.shots
        return TaskBatch(x_all[:, :s], y_all[:, :s], x_all[:, s:], y_all[:, s:])

    def describe(self) -> dict[str, Any]:
        """See `TaskFamily.describe`."""
        return {
            "family": "Sinusoid",
            "shots": self.shots,
            "queries": self.queries,
            "amplitude": list(self.amplitude),
            "phase": list(self.phase),
            "x_range": list(self.x_range),
            "noise": self.noise,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _tensor(self, values: Floats) -> Tensor:
        return torch.from_numpy(values).to(self.dtype).unsqueeze(-1)


def _within(bounds: tuple[float, float], u: Floats) -> Floats:
    low, high = bounds
    return low + (high - low) * u
