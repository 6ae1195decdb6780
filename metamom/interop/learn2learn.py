"""Use learn2learn's models and task sets in metamom, and metamom's tasks in learn2learn's loops.

learn2learn is imported on first use. If it is not installed, the error shows the command that installs it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metamom.batch import Sampler, TaskBatch, TaskSampler, block, check_sampler
from metamom.common.kinds import named_type
from metamom.interop.imports import import_learn2learn
from metamom.maml.estimators import Estimator
from metamom.maml.learner import MAML, LossFn

__all__ = ["AsTaskset", "FromTaskset", "from_maml", "import_learn2learn", "seeded"]


def from_maml(l2l_maml: Any, loss_fn: LossFn, inner_steps: int = 1) -> MAML:
    """Create a `MAML` that shares its parameters with a `learn2learn.algorithms.MAML`: training one trains the other.

    Its current ``lr`` and ``first_order`` are used.

    Args:
        l2l_maml: the learn2learn learner.
        loss_fn: ``(predictions, targets) -> loss``; learn2learn's learner does not have one.
        inner_steps: J >= 1, the number of ``adapt`` calls in learn2learn's loops.

    Returns:
        The metamom learner, around ``l2l_maml.module``.

    Raises:
        ImportError: if learn2learn is not installed.
        TypeError: for anything but a `learn2learn.algorithms.MAML`.
        ValueError: for a model that `metamom.MAML` refuses.
    """
    kind = import_learn2learn().algorithms.MAML
    if not isinstance(l2l_maml, kind):
        raise TypeError(f"from_maml takes a learn2learn.algorithms.MAML; got {type(l2l_maml).__name__}.")
    estimator: Estimator = "first-order" if l2l_maml.first_order else "exact"
    return MAML(l2l_maml.module, loss_fn, inner_lr=l2l_maml.lr, inner_steps=inner_steps, estimator=estimator)


class FromTaskset(TaskSampler):
    """A learn2learn ``Taskset`` (``TaskDataset``) as a metamom sampler.

    learn2learn's transforms draw from Python's, NumPy's and torch's global generators. For each task these are seeded
    from this sampler's seed and the task's coordinates, and restored afterwards. So tasks depend only on seed, step and
    index, like metamom's own. A taskset with finitely many tasks is sampled with replacement, and keeps tasks that it
    has already returned elsewhere.

    Args:
        taskset: its tasks must have ``shots + queries`` samples of every class (``NWays``, ``KShots``, ``LoadData``,
            ``RemapLabels``), in any order.
        shots: support samples a class.
        queries: query samples a class. If shots and queries are equal, every second sample of a class is support, as in
            learn2learn's ``fast_adapt`` for a task ordered by ``ConsecutiveLabels``. Otherwise the first ones are.
        seed: seed of the draws.

    Raises:
        ImportError: if learn2learn is not installed.
        TypeError: for anything but a taskset.
        ValueError: from `sample`, for a task with too few samples.
    """

    def __init__(self, taskset: Any, *, shots: int, queries: int, seed: int = 0) -> None:
        kind = import_learn2learn().data.Taskset
        if not isinstance(taskset, kind):
            raise TypeError(f"FromTaskset takes a learn2learn Taskset or TaskDataset; got {type(taskset).__name__}.")
        if shots < 1 or queries < 1:
            raise ValueError(f"FromTaskset needs at least one shot and one query; got {shots} and {queries}.")
        self.taskset, self.shots, self.queries, self.seed = taskset, shots, queries, seed
        self.stream = "train"

    def with_stream(self, stream: str) -> FromTaskset:
        """The same taskset, sampled in another order."""
        other = FromTaskset(self.taskset, shots=self.shots, queries=self.queries, seed=self.seed)
        other.stream = stream
        return other

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        """See `metamom.batch.Sampler`; ``x: [T, ways * shots or queries, ...]``, labels ``0..ways-1`` shot by shot."""
        tasks = [self._task(step, index) for index in block(num_tasks, rank, world_size)]
        return TaskBatch(*(torch.stack(field) for field in zip(*tasks, strict=True)))

    def _task(self, step: int, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with seeded(f"{self.seed} {self.stream} {step} {index}"):
            which = random.randrange(len(self.taskset)) if self.taskset.num_tasks != -1 else None
            task = self.taskset.sample() if which is None else None
        if which is not None:
            with seeded(f"{self.seed} {which}"):  # its first use fixes a task: make it the same for all
                task = self.taskset[which]
        if not isinstance(task, (tuple, list)) or len(task) != 2:
            raise ValueError(f"a task must be (data, labels); got {named_type(task)}. Add LoadData to the transforms.")
        return self._split(task[0], torch.as_tensor(task[1]))

    def describe(self) -> dict[str, Any]:
        """Identify this sampler by JSON values. They do not cover the taskset's data."""
        return {
            "family": "FromTaskset",
            "shots": self.shots,
            "queries": self.queries,
            "num_tasks": self.taskset.num_tasks,
            "seed": self.seed,
        }

    def _split(self, data: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        classes, per_class = torch.unique(labels), self.shots + self.queries
        places = [(labels == c).nonzero().squeeze(1) for c in classes]
        if any(len(place) != per_class for place in places):
            raise ValueError(
                f"a task must hold shots + queries = {self.shots} + {self.queries} samples of each class; got "
                f"{[len(place) for place in places]}. Use KShots(k={per_class}) in the taskset."
            )
        order = torch.stack(places, dim=1)  # [per_class, ways]
        if self.shots == self.queries:
            order = torch.cat([order[0::2], order[1::2]])
        y = torch.arange(len(classes)).expand(per_class, -1).flatten()
        x, cut = data[order.flatten()], self.shots * len(classes)
        return x[:cut], y[:cut], x[cut:], y[cut:]


class AsTaskset:
    """A metamom sampler as learn2learn-style tasks ``(data, labels)``, one at a time.

    Samples are in the order that learn2learn's ``fast_adapt`` splits: samples 0, 2, 4, ... are the support set, the
    others the query set. ``AsTaskset(sampler)[i]`` is always the same task i. Iterating returns tasks 0, 1, 2, ..., and
    `sample` returns the next one.

    Args:
        sampler: any metamom sampler with as many query as support points (one fewer is fine, more are allowed).
        num_tasks: the number of tasks to iterate over; ``-1`` for no end.

    Attributes:
        next_task: number of the task that `sample` returns next.
    """

    def __init__(self, sampler: Sampler, num_tasks: int = -1) -> None:
        if num_tasks < 1 and num_tasks != -1:
            raise ValueError(f"num_tasks must be >= 1, or -1 for no limit; got {num_tasks}.")
        check_sampler(sampler, "AsTaskset takes a sampler, which")
        self.sampler = sampler
        self.num_tasks = num_tasks
        self.next_task = 0

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Task i: ``data [S + Q, ...]``, ``labels [S + Q, ...]``."""
        if i < 0 or (self.num_tasks != -1 and i >= self.num_tasks):
            raise IndexError(f"there are tasks 0..{self.num_tasks - 1 if self.num_tasks != -1 else '∞'}; got {i}.")
        batch = self.sampler.sample(i, 1)
        return _alternate(batch.support_x[0], batch.query_x[0]), _alternate(batch.support_y[0], batch.query_y[0])

    def __len__(self) -> int:
        """Number of tasks.

        Raises:
            TypeError: if it is infinite.
        """
        if self.num_tasks == -1:
            raise TypeError("the number of tasks is unlimited: pass num_tasks= for a length.")
        return self.num_tasks

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tasks 0, 1, 2, ..."""
        i = 0
        while self.num_tasks == -1 or i < self.num_tasks:
            yield self[i]
            i += 1

    def sample(self) -> tuple[Tensor, Tensor]:
        """Return the next task. After the last task it starts again with the first."""
        i = self.next_task if self.num_tasks == -1 else self.next_task % self.num_tasks
        self.next_task += 1
        return self[i]


def _alternate(support: Tensor, query: Tensor) -> Tensor:
    shots, queries = len(support), len(query)
    if queries < shots - 1:
        raise ValueError(
            "every second sample is a support point, which needs as many query points as support points; got "
            f"{shots} and {queries}. Use more queries."
        )
    is_support = torch.zeros(shots + queries, dtype=torch.bool)
    is_support[torch.arange(shots) * 2] = True
    out = support.new_empty(shots + queries, *support.shape[1:])
    out[is_support], out[~is_support] = support, query
    return out


@contextmanager
def seeded(place: str) -> Iterator[None]:
    """Seed the global generators that learn2learn draws from (Python's, NumPy's, torch's) by name; restore them after.

    Its task transforms draw from the first, and its networks' initial weights from the other two.
    """
    number = int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "little")
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (it is what they draw from)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.default_generator.manual_seed(number)  # torch.manual_seed would also seed GPUs, which are not restored
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
