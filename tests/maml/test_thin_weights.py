"""Meta-gradients with weights kept as thin factors: the same as a plain loop's, whatever else reads the weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from problems import assert_close, randomised
from slow_maml import slow_estimate, slow_meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F

import metamom
from metamom import MAML, TaskBatch
from metamom.maml.estimators import ESTIMATORS
from metamom.nets import linear
from metamom.nets.low_rank import LowRank

WIDTHS = (20, 24, 22)
CLASSES = 3


def batch(
    seed: int = 0, *, tasks: int = 4, support: int = 2, query: int = 3, tokens: tuple[int, ...] = ()
) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(tasks, n, *tokens, WIDTHS[0], generator=generator).double() for n in (support, query)]
    y = [torch.randint(0, CLASSES, (tasks, n), generator=generator) for n in (support, query)]
    return TaskBatch(x[0], y[0], x[1], y[1])


class Sequence(nn.Module):
    """Linear layers over the last of several axes, without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTHS[0], 40, bias=False)
        self.second = nn.Linear(40, 30)
        self.head = nn.Linear(30, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.transpose(-2, -3)))
        return self.head(torch.tanh(self.second(x)).mean(-3))


class Tied(nn.Module):
    """A weight used twice, once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTHS[0], WIDTHS[0])
        self.head = nn.Linear(WIDTHS[0], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x))
        return self.head(torch.tanh(x @ self.inner.weight) + self.inner(x))


class Regularised(nn.Module):
    """Reads its weights for more than the product."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTHS[0], 30)
        self.head = nn.Linear(30, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.inner.weight.norm() + self.inner.weight[0].sum() + self.inner.weight.view(-1)[3]
        return self.head(torch.tanh(self.inner(x) / scale))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTHS[0], 30)
        self.other = nn.Linear(WIDTHS[0], 30)
        self.head = nn.Linear(30, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)))


class NoRows(nn.Module):
    """A layer that gets no points in one of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTHS[0], 30)
        self.head = nn.Linear(30, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x))) + self.inner(x[:0]).sum()


def mlp() -> nn.Module:
    a, b, c = WIDTHS
    return nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, CLASSES))


def weight_norm() -> nn.Module:
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        norm(nn.Linear(WIDTHS[0], 30)), nn.Tanh(), norm(nn.Linear(30, 24)), nn.Tanh(), nn.Linear(24, CLASSES)
    )


MODELS = {
    "MLP": mlp,
    "tied": Tied,
    "regularised": Regularised,
    "unused": Unused,
    "weight norm": weight_norm,
    "tokens": Sequence,
    "no rows": NoRows,
}


@pytest.fixture(autouse=True)
def thin(monkeypatch) -> Iterator[list[LowRank]]:
    """Matrices of any size are kept as factors; those that are multiplied by are noted."""
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "SMALLEST_OF_ALL", 0)
    found: list[LowRank] = []
    forward = linear._Product.forward

    def noting(x: Tensor, weight: Tensor, flipped: bool) -> Tensor:
        if isinstance(weight, LowRank) and weight.is_thin():
            found.append(weight)
        return forward(x, weight, flipped)

    monkeypatch.setattr(linear._Product, "forward", staticmethod(noting))
    return found


def model_and_batch(name: str) -> tuple[nn.Module, TaskBatch]:
    return randomised(MODELS[name]()), batch(tokens=(2,) if name == "tokens" else ())


def check_plain(grads: dict[str, Tensor]) -> None:
    assert {type(g) for g in grads.values()} == {Tensor}


@pytest.mark.parametrize("estimator", ["exact", "first-order"])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_meta_gradients(thin, name, steps, estimator):
    model, tasks = model_and_batch(name)
    learner = MAML(model, F.cross_entropy, inner_lr=0.05, inner_steps=steps, estimator=estimator)
    grads, losses = learner.meta_gradient(tasks, workers=2)
    check_plain(grads)
    assert bool(thin) == (name not in ("tied", "regularised"))  # others read the weights in other ways, too
    for i, part in enumerate(tasks.split(2)):
        expected, expected_losses = slow_meta_gradient(
            model, F.cross_entropy, part, steps=steps, inner_lr=0.05, first_order=estimator == "first-order"
        )
        assert_close({n: g[i] for n, g in grads.items()}, expected)
        torch.testing.assert_close(losses[2 * i : 2 * i + 2], expected_losses, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("chunk_size", [1, 2, None, "auto"])
def test_chunks_and_one_task(thin, tasks, chunk_size):
    model, tasks = randomised(mlp()), batch(tasks=tasks)
    learner = MAML(model, F.cross_entropy, inner_lr=0.05, inner_steps=2, chunk_size=chunk_size)
    grads, _ = learner.meta_gradient(tasks)
    expected, _ = slow_meta_gradient(model, F.cross_entropy, tasks, steps=2, inner_lr=0.05)
    assert thin
    assert_close({n: g[0] for n, g in grads.items()}, expected)
    total = learner.losses(tasks).mean()
    total.backward()
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected)
    check_plain({n: p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize("kind", ["scalar", "tensor", "entry"])
@pytest.mark.parametrize("estimator", ["exact", "first-order"])
def test_learned_step_sizes(thin, kind, estimator):
    model, tasks = randomised(mlp()), batch()
    learner = MAML(model, F.cross_entropy, inner_lr=0.05, inner_steps=2, learn_inner_lr=kind, estimator=estimator)
    grads, _ = learner.meta_gradient(tasks)
    expected, _ = slow_meta_gradient(
        model,
        F.cross_entropy,
        tasks,
        steps=2,
        learned=learner.step_sizes.learned(),
        first_order=estimator == "first-order",
    )
    check_plain(grads)
    assert thin or kind == "entry"
    assert_close({n: g[0] for n, g in grads.items()}, expected)


def test_step_sizes_of_each_parameter(thin):
    model, tasks = randomised(mlp()), batch()
    rates: dict[str, float | Tensor] = {name: 0.01 * i + 0.01 for i, name in enumerate(dict(model.named_parameters()))}
    rates["0.weight"] = torch.rand(WIDTHS[1], WIDTHS[0], generator=torch.Generator().manual_seed(1)).double()
    rates["2.weight"] = torch.tensor(0.03, dtype=torch.float64)
    grads, _ = MAML(model, F.cross_entropy, inner_lr=rates, inner_steps=2).meta_gradient(tasks)
    expected, _ = slow_meta_gradient(model, F.cross_entropy, tasks, steps=2, inner_lr=rates)
    assert thin
    assert_close({n: g[0] for n, g in grads.items()}, expected)


@pytest.mark.parametrize("adapted", [["0.weight", "0.bias"], ["2.weight", "4.bias"], ["4.weight"]])
def test_some_parameters_adapt(adapted):
    model, tasks = randomised(mlp()), batch()
    grads, _ = MAML(model, F.cross_entropy, inner_lr=0.05, inner_steps=3, adapt=adapted).meta_gradient(tasks)
    expected, _ = slow_meta_gradient(model, F.cross_entropy, tasks, steps=3, inner_lr=0.05, adapted=adapted)
    assert_close({n: g[0] for n, g in grads.items()}, expected)


@pytest.mark.parametrize("estimator", sorted(name for name, record in ESTIMATORS.items() if not record.proximal))
def test_every_estimator(thin, estimator):
    model, tasks = randomised(mlp()), batch(support=2)
    tasks = tasks._replace(task_ids=torch.arange(tasks.num_tasks))
    settings = {"inner_lr": 0.05, "inner_steps": 1, "estimator": estimator}
    found = []
    for smallest in (0, 10**9):
        linear.SMALLEST = smallest  # restored by the fixture
        learner = MAML(model, F.cross_entropy, **settings)
        found.append([learner.meta_gradient(tasks)[0] for _ in range(3)][-1])
        check_plain(found[-1])
    assert thin
    # differences of gradients amplify rounding
    tolerance = 1e-5 if ESTIMATORS[estimator].derivatives == "differences" else 1e-10
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=tolerance, atol=tolerance)
    if ESTIMATORS[estimator].averages is None and tolerance == 1e-10:
        expected, _ = slow_estimate(model, F.cross_entropy, tasks, estimator, inner_lr=0.05)
        assert_close({n: g[0] for n, g in found[0].items()}, expected)


class Penalty(nn.Module):
    """A loss that shares the model, and reads its adapted weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, predicted: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(predicted, y) + 0.1 * sum((p**2).sum() for p in self.model.parameters())


def test_a_loss_that_reads_the_weights(thin):
    model, tasks = randomised(mlp()), batch()
    grads, _ = MAML(model, Penalty(model), inner_lr=0.05, inner_steps=2).meta_gradient(tasks)
    assert not thin  # the gradients are sums with plain tensors

    def slow(weights: dict[str, Tensor], t: int) -> Tensor:
        def loss(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            fit = F.cross_entropy(torch.func.functional_call(model, own, (x,)), y)
            return fit + 0.1 * sum((p**2).sum() for p in own.values())

        own = weights
        for _ in range(2):
            found = torch.autograd.grad(
                loss(own, tasks.support_x[t], tasks.support_y[t]), own.values(), create_graph=True
            )
            own = {n: w - 0.05 * g for (n, w), g in zip(own.items(), found, strict=True)}
        return loss(own, tasks.query_x[t], tasks.query_y[t])

    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    total = sum(slow(weights, t) for t in range(tasks.num_tasks)) / tasks.num_tasks
    expected = dict(zip(weights, torch.autograd.grad(total, weights.values()), strict=True))
    assert_close({n: g[0] for n, g in grads.items()}, expected)


def test_padded_tasks():
    model = randomised(mlp())
    each = [batch(1, tasks=1, support=2, query=4), batch(2, tasks=1, support=1, query=2)]
    grads, _ = MAML(model, F.cross_entropy, inner_lr=0.05, inner_steps=2).meta_gradient(metamom.pad(each))
    parts = [slow_meta_gradient(model, F.cross_entropy, one, steps=2, inner_lr=0.05)[0] for one in each]
    assert_close({n: g[0] for n, g in grads.items()}, {n: (parts[0][n] + parts[1][n]) / 2 for n in parts[0]})


def test_adapted_weights_are_plain_tensors():
    model, tasks = randomised(mlp()), batch()
    learner = MAML(model, F.cross_entropy, inner_lr=0.05, inner_steps=2)
    found = learner.adapt(tasks.support_x, tasks.support_y)
    check_plain(found)
    linear.SMALLEST = 10**9
    assert_close(found, learner.adapt(tasks.support_x, tasks.support_y))


def test_a_dispatch_mode_sees_plain_operations(thin):
    from torch.utils.flop_counter import FlopCounterMode

    model, tasks = randomised(mlp()), batch()
    with FlopCounterMode(display=False) as counter:
        MAML(model, F.cross_entropy, chunk_size=None).meta_gradient(tasks)
    assert counter.get_total_flops() > 0
    assert not thin


def test_few_tasks_use_plain_matrices_and_many_do_not(thin, monkeypatch):
    """Whatever was computed before: tasks measured for ``chunk_size="auto"``, or another number of tasks."""
    monkeypatch.setattr(linear, "SMALLEST_OF_ALL", 4 * WIDTHS[0] * WIDTHS[1])
    model = randomised(mlp())
    learner = MAML(model, F.cross_entropy, inner_lr=0.05)
    for number in (3, 4, 3, 4):
        learner.meta_gradient(batch(tasks=number))  # may measure
        thin.clear()
        tasks = batch(tasks=number)
        grads, _ = learner.meta_gradient(tasks)
        assert bool(thin) == (number == 4)
        expected, _ = slow_meta_gradient(model, F.cross_entropy, tasks, inner_lr=0.05)
        assert_close({n: g[0] for n, g in grads.items()}, expected)


def test_thin_weights_do_not_count_as_matrices_in_chunk_sizes(thin):
    """One task at a time if its matrices counted, and all of them otherwise."""
    model = nn.Sequential(nn.Linear(2000, 3000), nn.Tanh(), nn.Linear(3000, CLASSES))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 2, 2000, generator=generator), torch.randint(0, CLASSES, (4, 2), generator=generator)
    learner = MAML(model, F.cross_entropy)
    learner.meta_gradient(TaskBatch(x, y, x, y))
    assert list(learner._gradients._budgets.values()) == [4]
    assert thin


def test_losses_may_be_differentiated_after_the_weights_change():
    """Of first order, as with PyTorch's own operations: the adapted weights are tensors of their own."""
    tasks, found = batch(), []
    for change in (False, True):
        model = randomised(mlp())
        total = MAML(model, F.cross_entropy, estimator="first-order").losses(tasks).sum()
        if change:
            with torch.no_grad():
                model[2].weight.mul_(3)
        total.backward()
        found.append(model[0].weight.grad)
    assert torch.equal(*found)
