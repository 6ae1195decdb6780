"""What the tests against closed forms share: learners of a known point, their meta-gradients task by task, and z-tests.

Every meta-gradient comes from `MAML.meta_gradient`, each task being a worker of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from metamom import MAML, TaskBatch
from metamom.tasks import half_squared_error, quadratic_loss

AT_ONCE = 50_000  # tasks


def linear_learner(w: Iterable[float], inner_lr: float, **options: Any) -> MAML:
    """A linear model with the weights w, and the loss with ½."""
    row = torch.tensor([list(w)], dtype=torch.float64)
    return MAML(_at(nn.Linear(row.shape[1], 1, bias=False), row), half_squared_error, inner_lr=inner_lr, **options)


def point_learner(w: Iterable[float], inner_lr: float, loss_fn: Any = quadratic_loss, **options: Any) -> MAML:
    """The point w, for random quadratics."""
    column = torch.tensor(list(w), dtype=torch.float64)[:, None]
    return MAML(_at(nn.Linear(1, len(column), bias=False), column), loss_fn, inner_lr=inner_lr, **options)


def gradients(learner: MAML, batch: TaskBatch) -> Tensor:
    """Every task's meta-gradient, ``[T, d]``."""
    spans = range(0, batch.num_tasks, AT_ONCE)
    parts = [batch.part(start, min(start + AT_ONCE, batch.num_tasks)) for start in spans]
    grads = [learner.meta_gradient(part, workers=part.num_tasks).grads["weight"].flatten(1) for part in parts]
    return torch.cat(grads)


def cut(batch: TaskBatch, shots: int, queries: int) -> TaskBatch:
    """Tasks with many points as more tasks with few: the points of a task are independent."""

    def pieces(x: Tensor, points: int) -> Tensor:
        return x.reshape(-1, points, *x.shape[2:])

    x, y, query_x, query_y = batch[:4]
    return TaskBatch(pieces(x, shots), pieces(y, shots), pieces(query_x, queries), pieces(query_y, queries))


def replicates(family: Callable[[int, int], Any], shots: int, queries: int, count: int) -> TaskBatch:
    """``count`` independent draws of the one task of a family that is made by ``family(shots, queries)``."""
    many = 100
    return cut(family(shots * many, queries * many).sample(0, count // many), shots, queries)


def subsets(x: Tensor, y: Tensor, size: int, *, replacement: bool) -> tuple[Tensor, Tensor]:
    """All ordered batches with replacement, or all sets without: ``[B, size, d]`` and ``[B, size, 1]``."""
    points = range(len(x))
    batches = itertools.product(points, repeat=size) if replacement else itertools.combinations(points, size)
    rows = torch.tensor(list(batches))
    return x[rows], y[rows]


def pairs(support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor]) -> TaskBatch:
    """A task for each support set with each query set: all of B₁ · B₂."""
    first, second = len(support[0]), len(query[0])
    return TaskBatch(
        *(s.repeat_interleave(second, 0) for s in support), *(q.repeat(first, *[1] * (q.dim() - 1)) for q in query)
    )


def assert_mean(draws: Tensor, wanted: Iterable[float]) -> None:
    """The mean of independent draws ``[N, d]`` is within 5 of its standard errors of what was predicted."""
    wanted = torch.as_tensor(wanted, dtype=draws.dtype)
    z = (draws.mean(0) - wanted) / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().max() <= 5, f"mean {draws.mean(0).tolist()}, predicted {wanted.tolist()}, z = {z.tolist()}"


def assert_equal(value: Tensor, wanted: Iterable[float] | Tensor) -> None:
    """To 1e-12, in float64."""
    torch.testing.assert_close(value, torch.as_tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)


def total_variance(draws: Tensor) -> float:
    """The trace of the covariance of independent draws ``[N, d]``."""
    return float(draws.var(0).sum())


def _at(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    layer.weight = nn.Parameter(weight)
    return layer
