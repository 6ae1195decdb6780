"""learn2learn's training loop, as in its published examples: the baseline that metamom is measured against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from metamom.batch import TaskBatch
from metamom.maml.learner import LossFn


class Task(NamedTuple):
    """A task as the loop uses it: ``[S, ...]`` to adapt on and ``[Q, ...]`` for the query loss."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


def split_task(data: Tensor, labels: Tensor, shots: int, ways: int) -> Task:
    """Split a learn2learn task ``(data, labels)`` as its ``fast_adapt`` does: every second sample is support."""
    support = np.zeros(len(data), dtype=bool)
    support[np.arange(shots * ways) * 2] = True
    mask = torch.from_numpy(support)
    return Task(data[mask], labels[mask], data[~mask], labels[~mask])


def tasks_of(batch: TaskBatch) -> list[Task]:
    """The tasks of a batch, one by one."""
    return [Task(*fields) for fields in zip(*batch[:4], strict=True)]


def adapted_loss(learner: Any, task: Task, loss_fn: LossFn, inner_steps: int) -> Tensor:
    """Adapt a clone of the learner to a task, and return its query loss, with the graph through the adaptation."""
    clone = learner.clone()
    for _ in range(inner_steps):
        clone.adapt(loss_fn(clone(task.support_x), task.support_y))
    return loss_fn(clone(task.query_x), task.query_y)


def meta_iteration(
    learner: Any, optimizer: Optimizer, tasks: Iterable[Task], loss_fn: LossFn, inner_steps: int = 1
) -> float:
    """One iteration: a backward pass for each task, the mean of their gradients, one step.

    Returns:
        The mean query loss.
    """
    optimizer.zero_grad()
    losses = []
    for task in tasks:
        loss = adapted_loss(learner, task, loss_fn, inner_steps)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
    for parameter in learner.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1.0 / len(losses))
    optimizer.step()
    return float(np.mean(losses))
