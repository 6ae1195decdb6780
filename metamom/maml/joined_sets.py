"""Batches of tasks that adapt on their support and query sets together."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.common.trees import Tree, count, device_of, joined, points


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
