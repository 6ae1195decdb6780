"""higher's and TorchOpt's tests of unrolled inner steps: their models and losses, against the real packages.

Sources: ``tests/test_patch.py`` of github.com/facebookresearch/higher (its models, its recurrent layers of 10 features,
20 units and 2 layers, the loss "sum of the outputs, squared", a MAML in small) and ``tests/test_meta_optim.py`` of
github.com/metaopt/torchopt (2, 3 and 5 inner steps, step sizes from 1e-4 to 1e-2, cross-entropy on one batch). They
look for gradients that exist and agree with a copy; here they agree with each other.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import regression_batch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch

higher = pytest.importorskip("higher")
torchopt = pytest.importorskip("torchopt")
LossFn = Callable[..., Tensor]


class Nested(nn.Module):
    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class SharedLayer(nn.Module):
    """Two modules around one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.e1 = Nested(nn.Linear(4, 2))
        self.e2 = Nested(self.e1.f)

    def forward(self, x: Tensor) -> Tensor:
        return self.e1(x) + self.e2(x)


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(4, 3)), nn.Parameter(torch.rand(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(10, 20, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


def simple() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 2))


def shared_in_a_row() -> nn.Module:
    layer = nn.Linear(4, 3)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(3, 4), nn.Sigmoid(), layer, nn.Tanh(), nn.Linear(3, 2))


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Sigmoid(), nn.BatchNorm1d(4), nn.Linear(4, 2)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "simple": simple,
    "shared layer": SharedLayer,
    "shared layer in a row": shared_in_a_row,
    "partly used": PartlyUsed,
    "batch norm": batch_norm,
    "RNN": lambda: Recurrent(nn.RNN),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
}


def squared_sum(output: Tensor) -> Tensor:
    return output.sum().square()


def loss_of(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor | None) -> Tensor:
    return loss_fn(model(x)) if y is None else loss_fn(model(x), y)


def of_higher(model: nn.Module, loss_fn: LossFn, batch: TaskBatch, steps: int, lr: float) -> dict[str, Tensor]:
    """The mean over the tasks of the meta-gradient by higher."""
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x, y, query_x, query_y in tasks_of(batch):
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (adapted, inner):
            for _ in range(steps):
                inner.step(loss_of(adapted, loss_fn, x, y))
            (loss_of(adapted, loss_fn, query_x, query_y) / batch.num_tasks).backward()
    return taken_from(model)


def of_torchopt(model: nn.Module, loss_fn: LossFn, batch: TaskBatch, steps: int, lr: float) -> dict[str, Tensor]:
    """The mean over the tasks of the meta-gradient by TorchOpt."""
    model.zero_grad()
    first = dict(model.named_parameters())
    inner = torchopt.MetaSGD(model, lr=lr)
    start = [torchopt.extract_state_dict(each, by="reference") for each in (model, inner)]
    for x, y, query_x, query_y in tasks_of(batch):
        for _ in range(steps):
            inner.step(loss_of(model, loss_fn, x, y))
        (loss_of(model, loss_fn, query_x, query_y) / batch.num_tasks).backward()
        for each, state in zip((model, inner), start, strict=True):
            torchopt.recover_state_dict(each, state)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in first.items()}


def tasks_of(batch: TaskBatch) -> list[tuple[Tensor, ...]]:
    return [tuple(None if t is None else t[i] for t in batch[:4]) for i in range(batch.num_tasks)]


def taken_from(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def ours(model: nn.Module, loss_fn: LossFn, batch: TaskBatch, steps: int, lr: float) -> dict[str, Tensor]:
    learner = MAML(model, loss_fn, inner_lr=lr, inner_steps=steps)
    return {name: g[0] for name, g in learner.meta_gradient(batch).grads.items()}


@pytest.mark.filterwarnings("ignore:.*cannot run on all tasks at once:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_maml_in_small(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    shape: tuple[int, ...] = (5, 10) if isinstance(model, Recurrent) else (4,)
    points = regression_batch(tasks=2, support=8, query=8, dim=shape)
    batch = points._replace(support_y=None, query_y=None)
    found = ours(model, squared_sum, batch, 3, 1e-3)
    wanted = of_higher(model, squared_sum, batch, 3, 1e-3)
    assert list(found) == list(wanted)
    assert any(g.any() for g in wanted.values())
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("steps", [2, 3, 5])
def test_all_three_agree(steps, lr):
    torch.manual_seed(0)
    model = simple().double()
    points = regression_batch(tasks=2, support=8, query=8, dim=4)
    labels = torch.arange(8).remainder(2).repeat(2, 1)
    batch = TaskBatch(points.support_x, labels, points.support_x, labels)  # TorchOpt's outer loss is of the same batch
    found = ours(model, F.cross_entropy, batch, steps, lr)
    for peer in (of_higher, of_torchopt):
        for key, grad in peer(model, F.cross_entropy, batch, steps, lr).items():
            torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-12)
