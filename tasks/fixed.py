"""Turn a task family into a fixed, finite set of tasks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metamom.batch import TaskBatch, TaskSampler, block
from metamom.common.checks import check_flag, check_word
from metamom.common.choices import ORDERS as ORDERS
from metamom.common.choices import Order as Order
from metamom.rng import DrawCoordinates, Floats, Ints, Purpose, choose, uniforms
from metamom.tasks.checks import check_count, check_step, check_stream
from metamom.tasks.family import TaskFamily

if TYPE_CHECKING:
    from typing_extensions import Self

MOST_TASKS = 2**62


class FixedTasks(TaskSampler):
    """n tasks of a family that stay the same in every step: the finite sum f = 1/n Σ f_i of the analysis.

    The tasks are the n tasks of the family's step 0. Their points are redrawn at each step; a task's points depend only
    on its id and the step. A task's id is its number 0..n-1.

    Args:
        sampler: the family, a `TaskFamily` such as `Sinusoid`, `Episodes` or `Omniglot`.
        n: number of tasks, >= 1.
        fresh_data: draw new points at each step; ``False`` keeps the points of step 0.
        order: how to choose a meta-batch of fewer than n tasks: ``"replacement"`` samples each step independently;
            ``"reshuffle"`` goes through a shuffle of all n tasks and reshuffles every epoch.

    Attributes:
        n: as given.
        first: id of the first task (`PerWorker` gives its members consecutive ids). The ids are first..first+n-1,
            and different ids are different tasks of the family.

    Returns (from `sample`):
        a `TaskBatch` with ``task_ids: [T]`` int64. A meta-batch of n tasks contains all of them in order. A smaller one
        contains distinct tasks, chosen at random, the same for every process.

    Raises:
        TypeError: if ``sampler`` is not a `TaskFamily`.
        ValueError: if n < 1, or for an unknown order; from `sample`, for more than n tasks, or, with ``"reshuffle"``, a
            number that does not divide n.

    Example:
        >>> from metamom.tasks import Sinusoid
        >>> FixedTasks(Sinusoid(), 3).sample(7, 3).task_ids
        tensor([0, 1, 2])
    """

    def __init__(self, sampler: TaskFamily, n: int, *, fresh_data: bool = True, order: Order = "replacement") -> None:
        check_word("order", order, ORDERS)
        if not isinstance(sampler, TaskFamily):
            raise TypeError(
                f"FixedTasks fixes tasks of a family (Sinusoid, Episodes, Omniglot, ...); got "
                f"{type(sampler).__name__}. To fix each worker's tasks, wrap the inner samplers: "
                f"PerWorker([FixedTasks(s, m), ...])."
            )
        self.family = sampler
        self.n = check_count("n", n, MOST_TASKS)
        self.fresh_data = check_flag("fresh_data", fresh_data)
        self.order = order
        self.first = 0
        self.stream = sampler.stream

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        """Sample ``rank``'s contiguous block of the meta-batch for ``step``; see `TaskFamily.sample`."""
        step, mine = check_step(step), block(num_tasks, rank, world_size)
        if num_tasks > self.n:
            raise ValueError(
                f"there are n={self.n} fixed tasks; got a meta-batch of {num_tasks}. Use a meta-batch of at most "
                f"{self.n} tasks, or FixedTasks(..., n={num_tasks})."
            )
        ids = self.first + self._chosen(step, num_tasks)[mine.start : mine.stop]
        batch = self.family.draw(
            DrawCoordinates(self.family.stream, 0, ids),
            DrawCoordinates(self.stream, step if self.fresh_data else 0, ids),
        )
        return batch._replace(task_ids=torch.from_numpy(ids))

    def with_stream(self, stream: str) -> Self:
        """The same tasks, with points (and choices of tasks) from another stream."""
        other = copy.copy(self)
        other.stream = check_stream(stream)
        return other

    def numbered_from(self, first: int) -> Self:
        """The n tasks of the family with ids ``first..first+n-1``. Different ids are different tasks."""
        other = copy.copy(self)
        other.first = first
        return other

    def describe(self) -> dict[str, Any]:
        """The arguments that recreate this sampler, as JSON values."""
        return {
            "family": "FixedTasks",
            "sampler": self.family.describe(),
            "n": self.n,
            "fresh_data": self.fresh_data,
            "order": self.order,
        }

    def task_identity(self) -> dict[str, Any]:
        """See `TaskSampler.task_identity`."""
        ours = {"fixed_tasks": self.n, "fresh_data": self.fresh_data, "order": self.order}
        return self.family.task_identity() | ours

    def location(self) -> dict[str, Any]:
        """Where the family's data is."""
        return self.family.location()

    def _chosen(self, step: int, num_tasks: int) -> Ints:
        if num_tasks == self.n:
            return np.arange(self.n, dtype=np.int64)
        if self.order == "reshuffle":
            if self.n % num_tasks:
                raise ValueError(
                    f"a meta-batch must divide the n={self.n} fixed tasks, so that a shuffle has each of them once; "
                    f'got {num_tasks}. Use another number, or order="replacement".'
                )
            shuffle, turn = divmod(step, self.n // num_tasks)
            # sorting avoids a loop over all n tasks at every step
            turns = self._drawn(shuffle, self.n)[0].argsort(kind="stable")
            mine: Ints = turns[turn * num_tasks : (turn + 1) * num_tasks]
            return mine
        return choose(self._drawn(step, num_tasks), self.n).reshape(-1)

    def _drawn(self, step: int, count: int) -> Floats:
        # use the first task's index, so that members of a PerWorker choose independently
        here = DrawCoordinates(self.stream, step, np.array([self.first], dtype=np.int64))
        return uniforms(self.family.seed, here, Purpose.CHOICE, count)
