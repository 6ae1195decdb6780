"""A batch of tasks and what every task sampler offers.

Legend: T tasks, S support points a task, Q query points a task, n workers.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class TaskBatch(NamedTuple):
    """T tasks, each with a support set to adapt on and a query set to be judged on.

    Classification sets are ordered shot by shot: labels 0..N-1, then 0..N-1 again, so that any half or part of a
    set is balanced.

    Attributes:
        support_x: inputs to adapt on, ``[T, S, ...]``.
        support_y: their targets, ``[T, S, ...]`` (class indices ``[T, S]``, or values ``[T, S, 1]``).
        query_x: inputs to be judged on, ``[T, Q, ...]``.
        query_y: their targets, ``[T, Q, ...]``.
        task_ids: ``[T]`` int64, which of a fixed set of tasks each one is; ``None`` for tasks drawn afresh.
            It stays outside ``torch.func.vmap``.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    task_ids: Tensor | None = None

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks."""
        return self.support_x.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TaskBatch:
        """Move the tensors to ``device``; floating-point ones also to ``dtype`` (class indices keep theirs)."""

        def move(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

        return TaskBatch(*(move(field) for field in self))  # type: ignore[arg-type]

    def part(self, start: int, stop: int) -> TaskBatch:
        """The tasks ``start <= t < stop``, as views."""
        return TaskBatch(*(None if field is None else field[start:stop] for field in self))  # type: ignore[arg-type]

    def split(self, n: int) -> tuple[TaskBatch, ...]:
        """Deal the tasks to n workers: worker i gets the i-th contiguous block of T/n tasks.

        Raises:
            ValueError: if n does not divide T.
        """
        return tuple(self.part(b.start, b.stop) for b in (block(self.num_tasks, i, n) for i in range(n)))


def block(num_tasks: int, rank: int, world_size: int) -> range:
    """The task indices that ``rank`` of ``world_size`` gets: its contiguous block of a meta-batch.

    The one rule by which tasks are dealt, to workers and to processes alike.

    Raises:
        ValueError: if ``num_tasks`` is not a positive multiple of ``world_size``, or ``rank`` is out of range.
    """
    if num_tasks < 1 or world_size < 1 or num_tasks % world_size:
        raise ValueError(
            f"tasks are dealt in equal blocks: wanted a number of tasks that {world_size} divides, got {num_tasks}. "
            f"Use a meta-batch of {max(1, -(-num_tasks // max(1, world_size))) * max(1, world_size)} tasks "
            f"or a number of workers (or processes) that divides {num_tasks}."
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1} (world_size={world_size}); got {rank}.")
    size = num_tasks // world_size
    return range(rank * size, (rank + 1) * size)


@runtime_checkable
class Sampler(Protocol):
    """Anything that gives tasks by step number.

    What comes out depends only on the sampler's own arguments, ``step`` and the global index of a task within the
    meta-batch: never on what was asked before, nor on how many processes ask.
    """

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        """``rank``'s block of the meta-batch of ``num_tasks`` tasks that belongs to ``step``."""
        ...
