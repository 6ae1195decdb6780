"""Heterogeneous workers: each has its own sampler.

Legend: n workers, L = lcm(n, world_size) pieces of a meta-batch, so that each piece belongs to one worker and one
process.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from metamom.batch import Sampler, TaskBatch, TaskSampler, block, check_sampler, described, drawn, of_stream
from metamom.common.trees import Tree, joined, shown
from metamom.tasks.fixed import FixedTasks

if TYPE_CHECKING:
    from typing_extensions import Self


class PerWorker(TaskSampler):
    """n workers with their own families: worker i's contiguous block of each meta-batch comes from ``samplers[i]``.

    Train with the same number of workers. Members draw tasks by index in the whole meta-batch, so members with the same
    family and seed return different tasks.

    Fixed tasks belong to their worker: each `FixedTasks` member returns only its own n tasks, num_tasks / (number of
    workers) at each step, and ids continue from member to member. An id identifies a task of the family, so
    ``PerWorker([FixedTasks(s, 2), FixedTasks(s, 2)])`` has the four tasks of ``FixedTasks(s, 4)``.

    Args:
        samplers: one for each worker, of tasks with equal shapes; `FixedTasks` for all or for none.

    Raises:
        ValueError: for no samplers; from `sample`, for tasks of different shapes, or a number of tasks that the
            number of workers doesn't divide.
        TypeError: for anything but samplers, a `PerWorker` in a `PerWorker`, or `FixedTasks` mixed with others.

    Example:
        >>> from metamom.tasks import Sinusoid
        >>> low, high = Sinusoid(amplitude=(0.1, 1)), Sinusoid(amplitude=(4, 5))
        >>> PerWorker([low, high]).sample(0, 8).query_y[:4].abs().max() <= 1
        tensor(True)
    """

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        if not isinstance(samplers, Iterable):
            raise TypeError(f"PerWorker needs a list of samplers, one for each worker; got {type(samplers).__name__}.")
        members = list(samplers)
        if not members:
            raise ValueError("PerWorker needs a sampler for each worker; got none.")
        for i, member in enumerate(members):
            if isinstance(member, PerWorker):
                raise TypeError(f"samplers[{i}] is itself a PerWorker: put all workers' samplers in one list.")
            check_sampler(member, f"PerWorker takes samplers; samplers[{i}]")
        fixed = [member for member in members if isinstance(member, FixedTasks)]
        if fixed and len(fixed) != len(members):
            raise TypeError(
                f"{len(fixed)} of the {len(members)} samplers are FixedTasks, and only their tasks have ids. Use "
                f"FixedTasks for all workers or for none."
            )
        firsts = itertools.accumulate((member.n for member in fixed), initial=0)
        self.samplers: list[Sampler] = (
            [member.numbered_from(first) for member, first in zip(fixed, firsts, strict=False)] if fixed else members
        )

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        """Sample ``rank``'s contiguous block of the meta-batch for ``step``; see `TaskFamily.sample`."""
        n = len(self.samplers)
        block(num_tasks, rank, world_size)
        block(num_tasks, 0, n)
        L = math.lcm(n, world_size)
        each = L // n  # pieces of one worker
        parts = []
        for piece in block(L, rank, world_size):
            member = self.samplers[piece // each]
            if isinstance(member, FixedTasks):
                parts.append(member.sample(step, num_tasks // n, rank=piece % each, world_size=each))
            else:
                part = drawn(member, step, num_tasks, piece, L)
                parts.append(part._replace(task_ids=None))  # ids of other samplers may clash between workers
        joined = [_joined(name, [part[i] for part in parts]) for i, name in enumerate(TaskBatch._fields)]
        return TaskBatch._make(joined)

    @property
    def workers(self) -> int:
        """n, the number of workers, each with its own family."""
        return len(self.samplers)

    def with_stream(self, stream: str) -> Self:
        """The same sampler, with every member that has streams switched to this one."""
        other = copy.copy(self)
        other.samplers = [of_stream(member, stream) for member in self.samplers]
        return other

    def describe(self) -> dict[str, Any]:
        """The arguments that recreate this sampler, as JSON values (members that aren't a `TaskSampler` by type)."""
        return {
            "family": "PerWorker",
            "samplers": [described(member) for member in self.samplers],
        }


def _joined(name: str, parts: Sequence[Tree]) -> Tree:
    """Concatenate the workers' tasks."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    kinds = {shown(part) for part in present}
    if len(present) != len(parts) or len(kinds) != 1:
        raise ValueError(
            f"all workers' tasks must have the same fields, shapes and types to make one batch; {name} differs: "
            f"{sorted(kinds)}. Give all samplers the same shots, queries and ways."
        )
    return joined(torch.cat, list(parts))
