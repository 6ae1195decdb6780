"""Where a learner departs from MAML: how a task starts, what it trains on, and what is passed on as its meta-gradient.

`metamom.maml.boil`, `metamom.maml.reptile` and `metamom.maml.protomaml` are learners with rules of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.common.trees import Tree, count, device_of, joined, points
from metamom.maml.estimators import InnerBatch
from metamom.maml.task_weights import Params, Start

if TYPE_CHECKING:
    from metamom.maml.problem import Problem


class Rule(NamedTuple):
    """Where a learner departs from MAML; by default nowhere.

    Attributes:
        replaced: names of the parameters that ``start`` computes for each task. They get no meta-gradient.
        start: adds those, given the problem, the tasks' start ``[T, *shape]``, and an inner batch.
        check: refuses a batch that ``start`` cannot take, before anything is computed.
        outer: given the weights before and after adaptation, ``[T, *shape]``, and the query losses ``[T]``: losses
            with the same values and other derivatives. The adaptation then keeps no graph.
        joins: whether meta-gradients adapt on support and query set together.
    """

    replaced: tuple[str, ...] = ()
    start: Callable[[Problem, Start, InnerBatch], Start] | None = None
    check: Callable[[TaskBatch], None] | None = None
    outer: Callable[[Params, Params, Tensor], Tensor] | None = None
    joins: bool = False

    def adapted_on(self, batch: TaskBatch) -> TaskBatch:
        """The batch with the support sets that meta-gradients adapt on."""
        return together(batch) if self.joins else batch


PLAIN = Rule()


def together(batch: TaskBatch) -> TaskBatch:
    """The batch with support sets that hold the query points too, after their own.

    Example:
        >>> batch = TaskBatch(*(torch.zeros(8, n, d) for n, d in ((6, 2), (6, 1), (4, 2), (4, 1))))
        >>> together(batch).support_x.shape
        torch.Size([8, 10, 2])
    """
    of_points = partial(torch.cat, dim=1)
    y = None if batch.support_y is None else joined(of_points, [batch.support_y, batch.query_y])
    mask = None
    if batch.support_mask is not None or batch.query_mask is not None:
        sets = (batch.support_x, batch.support_mask), (batch.query_x, batch.query_mask)
        mask = torch.cat([_whole(x) if each is None else each for x, each in sets], 1)
    return batch._replace(support_x=joined(of_points, [batch.support_x, batch.query_x]), support_y=y, support_mask=mask)


def _whole(x: Tree) -> Tensor:
    """A mask ``[T, N]`` of all points."""
    return torch.ones(count(x), points(x), dtype=torch.bool, device=device_of(x))
