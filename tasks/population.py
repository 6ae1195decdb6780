"""The exact population of tasks with a known loss: a few points with the same gradient and Hessian.

Legend: T tasks, d = dim features.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from metamom.batch import TaskBatch, TaskSampler, block
from metamom.rng import DrawCoordinates
from metamom.tasks.checks import check_step
from metamom.tasks.linear import LinearRegression
from metamom.tasks.matrices import products, square_root
from metamom.tasks.quadratic import Quadratic

if TYPE_CHECKING:
    from typing_extensions import Self


class Population(TaskSampler):
    """The tasks of a family, each with its whole population as support set and as query set.

    A `LinearRegression` task with Gaussian features gets d points ``√d r_k``, with r_k the rows of ``Σ^½``, and labels
    ``φ^T θ``. Their mean of φφ^T is Σ, so the loss of any weights is that of the population, up to a constant from
    label noise. A task from a data set gets that data set, and a `Quadratic` task a single point without noise.

    Args:
        family: `LinearRegression` or `Quadratic`; the tasks at the same coordinates are the same.

    Returns (from `sample`):
        a `TaskBatch` with equal support and query sets.

    Raises:
        TypeError: for another family.

    Example:
        >>> tasks = LinearRegression(3, shots=5)
        >>> Population(tasks).sample(0, 4).support_x.shape
        torch.Size([4, 3, 3])

    Reference:
        docs/theory/maml.md, "Linear regression": a loss with ½ and its derivatives depend on Σ and θ alone.
    """

    def __init__(self, family: LinearRegression | Quadratic) -> None:
        if not isinstance(family, LinearRegression | Quadratic):
            raise TypeError(
                "the population is known only for LinearRegression and Quadratic tasks; got "
                f"{type(family).__name__}. For other tasks, use many points."
            )
        self.family = family

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        """Sample ``rank``'s block of the meta-batch for ``step``; see `TaskFamily.sample`."""
        mine = block(num_tasks, rank, world_size)
        places = DrawCoordinates(self.family.stream, check_step(step), np.arange(mine.start, mine.stop, dtype=np.int64))
        if isinstance(self.family, Quadratic):
            center, hessian = self.family.parameters(places)
            x = np.ones((len(center), 1, 1))
            y = np.concatenate([hessian, center[..., None], np.zeros_like(center)[..., None]], axis=2)[:, None]
        elif self.family.features is not None and self.family.labels is not None:
            x = self.family.of_tasks(self.family.features, places)
            y = self.family.of_tasks(self.family.labels, places)[..., None]
        else:
            theta, covariance = self.family.parameters(places)
            x = math.sqrt(self.family.dim) * square_root("covariance", covariance)
            y = products(x, theta)[..., None]
        support_x, support_y = (torch.from_numpy(np.ascontiguousarray(v)).to(self.family.dtype) for v in (x, y))
        return TaskBatch(support_x, support_y, support_x, support_y)

    def with_stream(self, stream: str) -> Self:
        """The populations of the tasks of another stream."""
        other = copy.copy(self)
        other.family = self.family.with_stream(stream)
        return other
