"""learn2learn's models and task sets in metamom, and metamom's tasks in learn2learn's loops.

Nothing here imports learn2learn until it is used; without it, that first use names the command that installs it.
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
from metamom.interop.imports import import_learn2learn
from metamom.maml.estimators import Estimator
from metamom.maml.learner import MAML, LossFn

__all__ = ["AsTaskset", "FromTaskset", "from_maml", "import_learn2learn", "seeded"]


def from_maml(l2l_maml: Any, loss_fn: LossFn, inner_steps: int = 1) -> MAML:
    """A `MAML` on the very same parameters as a `learn2learn.algorithms.MAML`: training one moves the other.

    Its ``lr`` and ``first_order`` are taken over as they are now.

    Args:
        l2l_maml: the learn2learn learner.
        loss_fn: ``(predictions, targets) -> loss``; learn2learn's learner does not know it.
        inner_steps: J >= 1; learn2learn's loops call ``adapt`` so many times.

    Returns:
        The metamom learner, around ``l2l_maml.module``.

    Raises:
        ImportError: if learn2learn is not installed.
        TypeError: for anything but a `learn2learn.algorithms.MAML`.
        ValueError: for a model with running statistics; see `metamom.nets.use_batch_statistics`.
    """
    kind = import_learn2learn().algorithms.MAML
    if not isinstance(l2l_maml, kind):
        raise TypeError(f"from_maml takes a learn2learn.algorithms.MAML; got {type(l2l_maml).__name__}.")
    estimator: Estimator = "first-order" if l2l_maml.first_order else "exact"
    return MAML(l2l_maml.module, loss_fn, inner_lr=l2l_maml.lr, inner_steps=inner_steps, estimator=estimator)


class FromTaskset(TaskSampler):
    """A learn2learn ``Taskset`` (``TaskDataset``) as a metamom sampler.

    Each task is drawn with Python's, NumPy's and torch's generators seeded from this sampler's seed and the task's
    place, and put back afterwards, since learn2learn's transforms draw from them; so tasks depend on seed, step and
    index alone, as metamom's own do. A taskset
    of finitely many tasks is drawn from with replacement, and keeps what it already gave elsewhere.

    Args:
        taskset: its tasks must hold ``shots + queries`` samples of every class (``NWays``, ``KShots``, ``LoadData``,
            ``RemapLabels``), in any order.
        shots: support samples a class.
        queries: query samples a class. Equal numbers are split as learn2learn's ``fast_adapt`` splits a task ordered
            by ``ConsecutiveLabels``: every second sample of a class is support; else the first ones are.
        seed: of the draws.

    Raises:
        ImportError: if learn2learn is not installed.
        TypeError: for anything but a taskset.
        ValueError: from `sample`, for a task without the samples asked for.
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
        """The same taskset, drawn from in another order."""
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
            with seeded(f"{self.seed} {which}"):  # a task's first use fixes what it holds: the same whoever asks
                task = self.taskset[which]
        if not isinstance(task, (tuple, list)) or len(task) != 2:
            raise ValueError(
                f"a task must be (data, labels); got a {type(task).__name__}. Put LoadData among the transforms."
            )
        return self._split(task[0], torch.as_tensor(task[1]))

    def describe(self) -> dict[str, Any]:
        """What tells this sampler from others, as JSON values; of the taskset's data it knows nothing."""
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

    The samples stand in the order that learn2learn's ``fast_adapt`` splits: numbers 0, 2, 4, ... are the support set,
    the others the query set. ``AsTaskset(sampler)[i]`` is task i, whatever was asked before; iterating gives tasks
    0, 1, 2, ...; `sample` gives the next.

    Args:
        sampler: any metamom sampler of as many query as support points (one fewer will do, more may).
        num_tasks: where iterating ends; ``-1`` never does.

    Attributes:
        next_task: number of the task that `sample` gives next.
    """

    def __init__(self, sampler: Sampler, num_tasks: int = -1) -> None:
        if num_tasks < 1 and num_tasks != -1:
            raise ValueError(f"num_tasks must be >= 1, or -1 for no end; got {num_tasks}.")
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
            TypeError: if there is no end to them.
        """
        if self.num_tasks == -1:
            raise TypeError("these tasks have no end: pass num_tasks= for a length.")
        return self.num_tasks

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tasks 0, 1, 2, ..."""
        i = 0
        while self.num_tasks == -1 or i < self.num_tasks:
            yield self[i]
            i += 1

    def sample(self) -> tuple[Tensor, Tensor]:
        """The next task; after the last comes the first."""
        i = self.next_task if self.num_tasks == -1 else self.next_task % self.num_tasks
        self.next_task += 1
        return self[i]


def _alternate(support: Tensor, query: Tensor) -> Tensor:
    shots, queries = len(support), len(query)
    if queries < shots - 1:
        raise ValueError(
            f"every second sample is support, so there must be as many query as support points; "
            f"got {shots} and {queries}. Use more queries."
        )
    is_support = torch.zeros(shots + queries, dtype=torch.bool)
    is_support[torch.arange(shots) * 2] = True
    out = support.new_empty(shots + queries, *support.shape[1:])
    out[is_support], out[~is_support] = support, query
    return out


@contextmanager
def seeded(place: str) -> Iterator[None]:
    """Seed the global generators that learn2learn draws from (Python's, NumPy's, torch's) by name; put them back after.

    Its task transforms draw from the first, its networks' initial weights from the other two.
    """
    number = int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "little")
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (it is what they draw from)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.default_generator.manual_seed(number)  # torch.manual_seed would move GPUs' generators too, which stay
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
