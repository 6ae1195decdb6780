"""The results of chunks of tasks, and how they are joined.

Legend: T tasks, Q query points, n workers, d entries of all meta-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.server.aggregate import flatten


class OfTasks(NamedTuple):
    """The results of a chunk of tasks.

    Attributes:
        losses: query losses ``[T]``.
        predictions: on the query sets, ``[T, Q, ...]``; ``[T, 0]`` if the model returns several tensors.
        averages: for tracked estimators, one ``[T, *shape]`` for each adapted parameter.
    """

    losses: Tensor
    predictions: Tensor
    averages: tuple[Tensor, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[OfTasks]) -> OfTasks:
        """Concatenate the results of several chunks."""
        if len(parts) == 1:
            return parts[0]
        averages = zip(*(part.averages for part in parts), strict=True)
        return cls(
            torch.cat([part.losses for part in parts]),
            torch.cat([part.predictions for part in parts]),
            tuple(torch.cat(each) for each in averages),
        )


class OfWorkers(NamedTuple):
    """Meta-gradients ``[k, d]`` of k workers, and the results of their tasks."""

    gradients: Tensor
    tasks: OfTasks


def with_chunk(rows: Tensor | None, grads: Sequence[Tensor]) -> Tensor:
    """The sum of a chunk's gradients and ``rows`` ``[n, d]``, in the memory of the latter if there are any."""
    if rows is None:
        return _flat(grads)
    if len(grads) == 1:
        return rows.add_(_flat(grads))
    size = [g[0].numel() for g in grads]
    for row, g in zip(rows.split_with_sizes(size, 1), grads, strict=True):
        row.add_(g.reshape(row.shape))
    return rows


def _flat(grads: Sequence[Tensor]) -> Tensor:
    """Flatten to ``[n, d]``. A single gradient with two axes is flat already; with more, it is one weight's."""
    return grads[0] if len(grads) == 1 and grads[0].dim() == 2 else flatten(grads)
