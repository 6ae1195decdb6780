"""Models with normalisation, and MAML as a loop over tasks in which the normalisation is written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from problems import WAYS, labelled_batch, noise, randomised
from slow_maml import LossFn, Params, adapt_task, weights_of
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import TaskBatch
from metamom.common.choices import NORMS, Norm
from metamom.nets.layers import BatchNormReLU
from metamom.nets.models import Conv4
from metamom.nets.resnet import ResNet12

TASKS, INNER_LR = 4, 0.1


class Twin(nn.Module):
    """A normalisation written out: ``(x - mean) / sqrt(variance + eps)`` by the statistics that ``norm`` names."""

    def __init__(self, like: Any, norm: Norm, record: dict[str, Any]) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = like.weight, like.bias, like.eps
        self.relu = isinstance(like, BatchNormReLU)
        self.running = (like.running_mean, like.running_var) if norm == "frozen" else None
        self.norm, self.record = norm, record

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.relu else x.movedim(1, -1)
        rows = x.reshape(-1, x.shape[-1])
        mean = rows.sum(0) / len(rows)
        variance = ((rows - mean) ** 2).sum(0) / len(rows)
        if self.running is not None:
            mean, variance = self.running
        if self.norm == "support" and self.record["phase"] == "support":
            self.record[self] = mean, variance
        if self.norm == "support" and self.record["phase"] == "queries":
            mean, variance = self.record[self]
        out = (x - mean) / (variance + self.eps) ** 0.5 * self.weight + self.bias
        return out.relu() if self.relu else out.movedim(-1, 1)


class Loop:
    """MAML as a loop over tasks around a copy of ``model`` with its normalisations written out."""

    def __init__(self, model: nn.Module, norm: Norm, loss_fn: LossFn = F.cross_entropy) -> None:
        self.record: dict[str, Any] = {"phase": None}
        self.norm, self.loss_fn = norm, loss_fn
        self.model = copy.deepcopy(model)
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, (nn.modules.batchnorm._BatchNorm, BatchNormReLU)):
                    setattr(parent, name, Twin(child, norm, self.record))

    def adapt(self, weights: Params, x: Tensor, y: Tensor, steps: int, moving: list[str]) -> Params:
        self.record["phase"] = None
        return adapt_task(
            self.model, self.loss_fn, weights, x, y, steps=steps, inner_lr=lambda name: INNER_LR, adapted=moving
        )

    def predict(self, weights: Params, x: Tensor, support_x: Tensor) -> Tensor:
        if self.norm == "support":
            self.record["phase"] = "support"
            torch.func.functional_call(self.model, weights, (support_x,))
            self.record["phase"] = "queries"
        return torch.func.functional_call(self.model, weights, (x,))

    def meta_gradient(
        self, model: nn.Module, batch: TaskBatch, steps: int = 1, adapted: list[str] | None = None
    ) -> tuple[Params, Tensor]:
        weights = weights_of(model)
        moving, losses = adapted or list(weights), []
        for x, y, query_x, query_y in zip(*batch[:4], strict=True):
            own = self.adapt(weights, x, y, steps, moving)
            losses.append(self.loss_fn(self.predict(own, query_x, x), query_y))
        grads = torch.autograd.grad(torch.stack(losses).mean(), list(weights.values()), materialize_grads=True)
        return dict(zip(weights, grads, strict=True)), torch.stack(losses).detach()


class LoopOfFunctional(Loop):
    def __init__(self, model: nn.Module, norm: Norm) -> None:
        super().__init__(model, norm)
        self.model = nn.Sequential()
        self.model.body, self.model.norm, self.model.head = (
            copy.deepcopy(model.body),
            Twin(copy.deepcopy(model.norm), norm, self.record),
            copy.deepcopy(model.head),
        )
        written = self.model
        self.model.forward = lambda x: written.head(torch.tanh(written.norm(written.body(x))))


def loop(name: str, model: nn.Module, norm: Norm) -> Loop:
    return (LoopOfFunctional if name == "functional" else Loop)(model, norm)


def with_statistics(model: nn.Module) -> nn.Module:
    """Running statistics as after training on other data."""
    for i, (name, buffer) in enumerate(model.named_buffers()):
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * noise(*buffer.shape, seed=i))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + noise(*buffer.shape, seed=i) ** 2)
        else:
            buffer.fill_(100 + i)
    return model


class Functional(nn.Module):
    """Calls the function itself, with the statistics of a module that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        norm, x = self.norm, self.body(x)
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training)
        return self.head(torch.tanh(x))


MAKE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, WAYS)), (4,)),
    "2d": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2),
            nn.BatchNorm2d(3, momentum=None), nn.LeakyReLU(), nn.Flatten(), nn.Linear(12, WAYS),
        ),
        (1, 8, 8),
    ),
    "3d": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Tanh(), nn.Flatten(), nn.Linear(16, WAYS)
        ),
        (1, 3, 3, 3),
    ),
    "functional": (Functional, (4,)),
    "Conv4": (lambda: Conv4(WAYS, hidden=4), (1, 28, 28)),
    "Conv4 with max-pooling": (
        lambda: Conv4(WAYS, hidden=4, image_size=16, pooling="max", running_statistics=True), (1, 16, 16)
    ),
    "ResNet12": (lambda: ResNet12(WAYS, 1, (2, 3, 4, 5), running_statistics=True), (1, 16, 16)),
}  # fmt: skip


SCALES = {"Conv4 with max-pooling": 0.5, "ResNet12": 0.3}  # of weights, so that "frozen" activations stay small
CASES = [(name, norm) for name in MAKE for norm in NORMS if (name, norm) != ("Conv4", "frozen")]


def case(name: str, queries: int = 2) -> tuple[nn.Module, TaskBatch]:
    make, shape = MAKE[name]
    model = with_statistics(randomised(make()))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(SCALES.get(name, 1.0))
    return model, labelled_batch(*shape, queries=WAYS * queries)
