"""Tables with rows of a largest norm (``max_norm``), which PyTorch shortens in place: as in a plain loop on copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from as_in_a_loop import Given
from problems import assert_close, generator
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch, evaluate
from metamom.maml.task_weights import Params

WAYS, TASKS, INNER_LR = 3, 3, 0.3


class Lookup(nn.Module):
    """A function in place of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.zeros(7, 4)), nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.embedding(x, self.table, max_norm=1.0).sum(1)))


def looked_up(x: Tensor, table: Tensor, **options: float) -> Tensor:
    return F.embedding(x, table, **options)


class InHelper(Lookup):
    """The function is called by another one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(looked_up(x, self.table, max_norm=1.0).sum(1)))


def shorter(x: Tensor, table: Tensor) -> Tensor:
    return looked_up(x, table, max_norm=1.0)


class InHelpers(Lookup):
    """The option is given by a helper too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(shorter(x, self.table).sum(1)))


class Tied(nn.Module):
    """Its table is used again, after rows of it were shortened."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(self.body(self.table(x).sum(1))) @ self.table.weight.T)[:, :WAYS]


class Bag(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, **options), nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(x)))


def words(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4, **options), nn.Tanh(), nn.Flatten(), nn.Linear(20, WAYS))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: words(max_norm=1.0),
    "of another norm": lambda: words(max_norm=1.0, norm_type=1.0),
    "with padding": lambda: words(max_norm=1.0, padding_idx=2),
    "function": Lookup,
    "function in a helper": InHelper,
    "helper with the option": InHelpers,
    "tied": Tied,
}
BAGS: dict[str, Callable[[], nn.Module]] = {  # PyTorch has no second derivative of these
    "mean": lambda: Bag(max_norm=1.0, mode="mean"),
    "sum": lambda: Bag(max_norm=1.0, mode="sum", padding_idx=1),
}


def case(make: Callable[[], nn.Module]) -> tuple[nn.Module, TaskBatch]:
    model, draw = make().double(), generator(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64))
    x = torch.randint(0, 7, (TASKS, 12, 5), generator=draw)
    y = torch.arange(WAYS).repeat(TASKS, 4)
    return model, TaskBatch(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])


def plain(model: nn.Module, batch: TaskBatch, steps: int, *, first_order: bool) -> tuple[Params, Tensor]:
    """MAML as a loop over tasks, each on copies of the weights that PyTorch may write to."""
    model = copy.deepcopy(model)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    losses = []
    for x, y, query_x, query_y in zip(*batch[:4], strict=True):
        own = {name: w.clone() for name, w in weights.items()}
        for _ in range(steps):
            loss = F.cross_entropy(torch.func.functional_call(model, own, (x,)), y)
            grads = torch.autograd.grad(loss, list(own.values()), create_graph=not first_order)
            own = {name: w - INNER_LR * g for (name, w), g in zip(own.items(), grads, strict=True)}
        losses.append(F.cross_entropy(torch.func.functional_call(model, own, (query_x,)), query_y))
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(weights.values()))
    return dict(zip(weights, grads, strict=True)), torch.stack(losses).detach()


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", [*MODELS, *BAGS])
def test_meta_gradients_are_those_of_a_plain_loop_on_copies(name, first_order, vectorize):
    if name in BAGS and not first_order:
        pytest.skip("PyTorch has no second derivative of bags")
    model, batch = case({**MODELS, **BAGS}[name])
    before = {key: w.clone() for key, w in model.named_parameters()}
    assert any((w.norm(dim=1) > 1).any() for key, w in before.items() if len(w) == 7)
    estimator = "first-order" if first_order else "exact"
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, inner_steps=2, estimator=estimator, vectorize=vectorize)
    expected, losses = plain(model, batch, 2, first_order=first_order)
    for _ in range(3):
        found = learner.meta_gradient(batch)
        torch.testing.assert_close(found.losses, losses, rtol=1e-9, atol=1e-9)
        assert_close({key: grad[0] for key, grad in found.grads.items()}, expected, 1e-9)
    assert all(torch.equal(w, before[key]) for key, w in model.named_parameters())


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_evaluations_and_a_table_that_is_not_adapted(workers):
    model, batch = case(MODELS["embedding"])
    before = {key: w.clone() for key, w in model.named_parameters()}
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, inner_steps=2)
    grads, losses = plain(model, batch, 2, first_order=False)
    found = learner.meta_gradient(batch, workers=workers)
    assert_close({key: grad.mean(0) for key, grad in found.grads.items()}, grads, 1e-9)
    result = evaluate(learner, Given(batch), tasks=TASKS, steps=(2,), metric="loss")
    torch.testing.assert_close(result.values[0].double(), losses, rtol=1e-6, atol=1e-6)
    head = MAML(model, F.cross_entropy, inner_lr=INNER_LR, adapt=["3.weight", "3.bias"])
    adapted = head.adapt(batch.support_x, batch.support_y)
    short = copy.deepcopy(model)
    short[0].max_norm = None
    with torch.no_grad():
        short[0].weight.div_((short[0].weight.norm(dim=1, keepdim=True) + 1e-7).clamp(min=1.0))
    expected = MAML(short, F.cross_entropy, inner_lr=INNER_LR, adapt=["3.weight", "3.bias"])
    torch.testing.assert_close(
        adapted["3.weight"], expected.adapt(batch.support_x, batch.support_y)["3.weight"], rtol=1e-6, atol=1e-6
    )
    assert all(torch.equal(w, before[key]) for key, w in model.named_parameters())


def test_compiled(traced):
    model, batch = case(MODELS["tied"])
    expected, _ = plain(model, batch, 1, first_order=False)
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, compile=True)
    before = {key: w.clone() for key, w in model.named_parameters()}
    for _ in range(2):
        found = learner.meta_gradient(batch)
        assert_close({key: grad[0] for key, grad in found.grads.items()}, expected, 1e-9)
    assert all(torch.equal(w, before[key]) for key, w in model.named_parameters())
