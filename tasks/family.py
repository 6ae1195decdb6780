"""The base class of metamom's samplers: a task family with counter-based draws."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from metamom.batch import TaskBatch, TaskSampler, block
from metamom.rng import DrawCoordinates
from metamom.tasks.checks import check_seed, check_step, check_stream

if TYPE_CHECKING:
    from typing_extensions import Self


FORMS = ("dtype", "image_size", "channels", "normalize")  # of `describe`: what the same points are given as


class TaskFamily(TaskSampler):
    """A distribution of tasks. Subclasses define how to draw a task (`draw`); this class decides which (`sample`).

    Args:
        seed: 0 <= seed < 2^64. Families with different seeds are independent.

    Attributes:
        seed: as given.
        stream: the name of the stream of draws, ``"train"`` unless `with_stream` changed it.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = check_seed(seed)
        self.stream = "train"

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        """Sample ``rank``'s contiguous block of the meta-batch for ``step``.

        Args:
            step: >= 0; training uses 0, 1, 2, ...
            num_tasks: tasks of the whole meta-batch, over all processes.
            rank: 0 <= rank < world_size.
            world_size: number of processes; must divide ``num_tasks``.

        Returns:
            A `TaskBatch` of ``num_tasks / world_size`` tasks.

        Raises:
            ValueError: if ``world_size`` does not divide ``num_tasks``, or an argument is out of range.
        """
        step = check_step(step)
        mine = block(num_tasks, rank, world_size)
        places = DrawCoordinates(self.stream, step, np.arange(mine.start, mine.stop, dtype=np.int64))
        return self.draw(places, places)

    def with_stream(self, stream: str) -> Self:
        """The same family with another stream (``"validation"``, ``"test"``, ...): new, independent tasks."""
        other = copy.copy(self)
        other.stream = check_stream(stream)
        return other

    @abstractmethod
    def draw(self, tasks: DrawCoordinates, data: DrawCoordinates) -> TaskBatch:
        """Draw T tasks, identified by their coordinates in ``tasks``, with points drawn at those in ``data``.

        `sample` passes the same coordinates twice. A fixed set of tasks keeps the first and changes the second.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The arguments that recreate this family, as JSON values."""

    def task_identity(self) -> dict[str, Any]:
        """See `TaskSampler.task_identity`: the description, without the form that points are given in."""
        return {name: value for name, value in self.describe().items() if name not in FORMS}
