"""Batches, learners and models with which the tests of mistakes are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metamom import MAML, TaskBatch

T, S, Q = 4, 6, 3


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def values(features: int = 1, *, tasks: int = T, support: int = S, query: int = Q) -> TaskBatch:
    sizes = [(support, features), (support, 1), (query, features), (query, 1)]
    return TaskBatch(*(normal(tasks, *size) for size in sizes))


def classes(ways: int = 3) -> TaskBatch:
    labels = torch.arange(S).remainder(ways).expand(T, S).clone()
    return TaskBatch(normal(T, S, 2), labels, normal(T, S, 2), labels)


def regressor(loss_fn: Callable[..., Any] = F.mse_loss, **options: Any) -> MAML:
    return MAML(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), loss_fn, **options)


def classifier(ways: int = 3, loss_fn: Callable[..., Any] = F.cross_entropy, **options: Any) -> MAML:
    return MAML(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, ways)), loss_fn, **options)


def embedder(**options: Any) -> MAML:
    return MAML(nn.Sequential(nn.Embedding(10, 3), nn.Flatten(), nn.Linear(3, 1)), F.mse_loss, **options)


def flat(batch: TaskBatch) -> TaskBatch:
    """Targets without their last axis."""
    return batch._replace(support_y=batch.support_y[..., 0], query_y=batch.query_y[..., 0])


class Returns(nn.Module):
    """A model that returns something of its predictions."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.made = nn.Linear(1, 1), made

    def forward(self, x: Tensor) -> Any:
        return self.made(self.layer(x))


class Batches:
    """A sampler that gives what it was made with."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> Any:
        return self.batch


def labels(change: Callable[[Tensor], Tensor], **options: Any) -> Callable[[], object]:
    """A classifier of 3 ways that gets changed labels in its query sets."""
    batch = classes()
    return lambda: classifier(**options).backward(batch._replace(query_y=change(batch.query_y)))


V = values()


class Table(nn.Module):
    """A model that looks up its inputs."""

    def __init__(self, look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.look_up = nn.Parameter(normal(10, 1)), look_up

    def forward(self, x: Tensor) -> Tensor:
        return self.look_up(self.table, x)


class Bags(nn.Module):
    """An embedding of sets."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(10, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x)


class Checkpointed(nn.Module):
    """Computes its hidden layer again in the backward pass."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.hidden, self.head, self.use_reentrant = nn.Linear(1, 8), nn.Linear(8, 1), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda x: self.hidden(x).tanh(), x, use_reentrant=self.use_reentrant))
