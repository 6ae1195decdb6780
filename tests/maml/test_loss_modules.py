"""Losses with parameters of their own, and gradients that do not arrive."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import assert_close, regression_batch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, TaskBatch, evaluate
from metamom.tasks import Sinusoid


class Weighted(nn.Module):
    """A squared error whose weight and target shift are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_weight = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.shift = nn.Linear(1, 1).double()

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return self.log_weight.exp() * F.mse_loss(predictions, self.shift(targets))


class SharesTheModels(nn.Module):
    """A loss that decays the model's own weights, and has one of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.strength = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(predictions, targets) + self.strength * sum(p.square().sum() for p in self.model.parameters())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def loop(model, batch, inner_lr, loss, extra, steps=1, first_order=False):
    """Meta-gradients in the model's parameters and in ``extra``; the loss gets predictions, targets and weights."""
    weights, losses = dict(model.named_parameters()), []
    for t in range(batch.num_tasks):
        current = dict(weights)
        for _ in range(steps):
            out = torch.func.functional_call(model, current, (batch.support_x[t],))
            grads = torch.autograd.grad(
                loss(out, batch.support_y[t], current), list(current.values()), create_graph=not first_order
            )
            current = {name: w - inner_lr * g for (name, w), g in zip(current.items(), grads, strict=True)}
        out = torch.func.functional_call(model, current, (batch.query_x[t],))
        losses.append(loss(out, batch.query_y[t], current))
    leaves = [*weights.values(), *extra.values()]
    grads = torch.autograd.grad(torch.stack(losses).mean(), leaves)
    return dict(zip([*weights, *extra], grads, strict=True)), torch.stack(losses)


def weighted_loss(loss_fn):
    return (lambda out, y, weights: loss_fn(out, y)), {f"loss_fn.{n}": p for n, p in loss_fn.named_parameters()}


def sharing_loss(loss_fn):
    def loss(out: Tensor, y: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(out, y) + loss_fn.strength * sum(w.square().sum() for w in weights.values())

    return loss, {"loss_fn.strength": loss_fn.strength}


@pytest.mark.parametrize("options", [{}, {"inner_steps": 2}, {"estimator": "first-order"}], ids=str)
@pytest.mark.parametrize("shares", [False, True], ids=["its own", "the model's too"])
def test_gradients_of_a_loss_with_parameters(shares, options):
    model, batch = net(), regression_batch(tasks=3)
    loss_fn = SharesTheModels(model) if shares else Weighted()
    loss, extra = (sharing_loss if shares else weighted_loss)(loss_fn)
    learner = MAML(model, loss_fn, inner_lr=0.1, **options)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.05, beta=1.0)
    assert set(learner.meta_parameters()) == {*dict(model.named_parameters()), *extra}
    for _ in range(2):
        first_order = options.get("estimator") == "first-order"
        expected, losses = loop(model, batch, 0.1, loss, extra, options.get("inner_steps", 1), first_order)
        torch.testing.assert_close(learner.losses(batch), losses)
        optimizer.zero_grad()
        learner.backward(batch, workers=3)
        assert_close({name: p.grad for name, p in learner.meta_parameters().items()}, expected)
        optimizer.step()


def test_each_worker_has_its_own_gradient_of_the_loss():
    model, batch = net(), regression_batch(tasks=4)
    loss_fn = Weighted()
    loss, extra = weighted_loss(loss_fn)
    grads = MAML(model, loss_fn, inner_lr=0.1).meta_gradient(batch, workers=2).grads
    for worker, part in enumerate(batch.split(2)):
        expected, _ = loop(model, part, 0.1, loss, extra)
        assert_close({name: g[worker] for name, g in grads.items()}, expected)


def test_evaluation_judges_by_the_adapted_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    loss_fn = SharesTheModels(model)
    found = evaluate(MAML(model, loss_fn, inner_lr=0.1), Sinusoid(), tasks=2, steps=(1,))
    batch = Sinusoid().with_stream("test").sample(0, 2).to(dtype=torch.float64)
    loss, extra = sharing_loss(loss_fn)
    _, losses = loop(model, batch, 0.1, loss, extra)
    torch.testing.assert_close(found.values[0], losses.detach())


def test_a_compiled_learner_agrees(traced):
    model, batch = net(), regression_batch(tasks=3)
    loss_fn = SharesTheModels(model)
    loss, extra = sharing_loss(loss_fn)
    learner = MAML(model, loss_fn, inner_lr=0.1, compile=True)
    for _ in range(2):
        expected, _ = loop(model, batch, 0.1, loss, extra)
        assert_close({n: g.mean(0) for n, g in learner.meta_gradient(batch).grads.items()}, expected)
        with torch.no_grad():
            loss_fn.strength.add_(0.1)


def test_names_that_clash_are_refused():
    model = nn.ModuleDict({"loss_fn": nn.ParameterDict({"log_weight": nn.Parameter(torch.zeros(()))})})
    with pytest.raises(ValueError, match=r"'loss_fn\.log_weight': rename"):
        MAML(model, Weighted())


# ---- unused, and cut off


class Cut(Function):
    """Somebody's function without a derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient):
        return None


class Passing(nn.Module):
    """A model whose first layer passes through something."""

    def __init__(self, through, whole: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.through, self.whole = nn.Linear(2, 4), nn.Linear(4, 1), through, whole
        self.unused = nn.Linear(3, 3)
        self.like = nn.Parameter(torch.zeros(4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.through(self.first(x)) + torch.zeros_like(self.like)
        return self.through(self.last(hidden)) if self.whole else self.last(hidden)


def without_a_graph(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.clone()


WAYS = {"function": Cut.apply, "detach": Tensor.detach, "no_grad": without_a_graph}


CALLS = {
    "meta_gradient": lambda learner, batch: learner.meta_gradient(batch),
    "backward": lambda learner, batch: learner.backward(batch, workers=2),
    "losses": lambda learner, batch: learner.losses(batch),
    "adapt": lambda learner, batch: learner.adapt(batch.support_x, batch.support_y),
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("whole", [True, False], ids=["all of the model", "its first layer"])
@pytest.mark.parametrize("way", WAYS)
def test_a_cut_graph_is_an_error(way, whole, call, compile, traced):
    model, batch = Passing(WAYS[way], whole), regression_batch(tasks=2)
    learner = MAML(model, F.mse_loss, compile=compile)
    with pytest.raises(ValueError, match=r"first\.weight, first\.bias.*cuts the graph") as caught:
        CALLS[call](learner, batch)
    assert ("last.weight" in str(caught.value)) == whole
    assert "unused" not in str(caught.value)
    assert "like" not in str(caught.value)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("compile", [False, True])
def test_what_is_not_used_stays_and_is_no_error(compile, traced):
    model, batch = Passing(torch.tanh, False), regression_batch(tasks=2)
    learner = MAML(model, F.mse_loss, compile=compile)
    adapted = learner.adapt(batch.support_x, batch.support_y)
    for _ in range(2):
        learner.backward(batch)
    for name, p in model.named_parameters():
        used = not name.startswith(("unused", "like"))
        assert bool(p.grad.any()) == used
        assert bool((adapted[name] != p).any()) == used


def test_a_frozen_parameter_may_be_cut_off():
    model, batch = Passing(Tensor.detach, False), regression_batch(tasks=2)
    model.first.requires_grad_(False)
    learner = MAML(model, F.mse_loss, inner_lr=0.1)
    grads = learner.meta_gradient(batch).grads
    assert set(grads) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert grads["last.weight"].any()


def test_looking_for_cuts_draws_nothing():
    model = nn.Sequential(Passing(torch.tanh, False), nn.Dropout(0.5))
    batch = regression_batch(tasks=2)
    torch.manual_seed(1)
    first = MAML(model, F.mse_loss).losses(batch)
    learner = MAML(model, F.mse_loss)
    learner.adapt(batch.support_x, batch.support_y)
    torch.manual_seed(1)
    torch.testing.assert_close(learner.losses(batch), first)


# ---- weights read past the tasks' own


def test_a_loss_that_closes_over_the_model_is_an_error():
    model, batch = net(), regression_batch(tasks=2)

    def loss_fn(predictions: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(predictions, targets) + 0.1 * sum(p.square().sum() for p in model.parameters())

    with pytest.raises(ValueError, match=r"the original 0\.weight, 0\.bias, 2\.weight, 2\.bias, and not on"):
        MAML(model, loss_fn).backward(batch)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_keeps_parameters_in_a_list_is_an_error():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1).double()
            self.weights = [self.layer.weight]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + x @ self.weights[0].T

    with pytest.raises(ValueError, match=r"the original layer\.weight, and not on"):
        MAML(Listed(), F.mse_loss).backward(regression_batch(tasks=2))


def test_a_list_of_registered_modules_is_right():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)
            self.layers = [self.first, torch.tanh, self.last]
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model, batch = Listed(), regression_batch(tasks=2)
    expected, _ = loop(model, batch, 0.1, lambda out, y, weights: F.mse_loss(out, y), {})
    grads = MAML(model, F.mse_loss, inner_lr=0.1).meta_gradient(batch).grads
    assert_close({name: g.mean(0) for name, g in grads.items()}, expected)


# ---- functions that can be differentiated only once


class Once(Function):
    """tanh, whose gradient cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * (1 - ctx.saved_tensors[0].square())


class Detaching(Once):
    @staticmethod
    def backward(ctx, gradient):
        return (gradient * (1 - ctx.saved_tensors[0].square())).detach()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("function", [Once, Detaching])
def test_a_second_derivative_that_is_cut_off_is_an_error(function, compile, traced):
    model, batch = Passing(function.apply, False), regression_batch(tasks=2)
    with pytest.raises(ValueError, match=r"gradient of first\.weight, first\.bias depends on the weights"):
        MAML(model, F.mse_loss, inner_lr=0.1, compile=compile).backward(batch)
    first_order = MAML(model, F.mse_loss, inner_lr=0.1, estimator="first-order", compile=compile)
    smooth = Passing(torch.tanh, False)
    expected = MAML(smooth, F.mse_loss, inner_lr=0.1, estimator="first-order").meta_gradient(batch).grads
    assert_close(first_order.meta_gradient(batch).grads, expected)


@pytest.mark.parametrize("compile", [False, True])
def test_a_loss_that_is_linear_in_the_weights_has_no_second_derivative(compile, traced):
    torch.manual_seed(0)
    model, batch = nn.Linear(2, 1).double(), regression_batch(tasks=2)

    def loss_fn(predictions: Tensor, targets: Tensor) -> Tensor:
        return (predictions * targets).mean()

    expected, _ = loop(model, batch, 0.1, lambda out, y, weights: loss_fn(out, y), {})
    grads = MAML(model, loss_fn, inner_lr=0.1, compile=compile).meta_gradient(batch).grads
    assert_close({name: g.mean(0) for name, g in grads.items()}, expected)


PIECEWISE = {
    "quantiles": lambda p, y: torch.maximum(0.1 * (y - p), 0.9 * (p - y)).mean(),
    "a hinge": lambda p, y: (1 - p * y.sign()).clamp(min=0).mean(),
    "where": lambda p, y: torch.where(p > y, p - y, 2 * (y - p)).mean(),
}


@pytest.mark.parametrize("points", [4, 4000])
@pytest.mark.parametrize("loss_fn", PIECEWISE.values(), ids=PIECEWISE)
def test_a_piecewise_linear_loss_is_not_cut_off(loss_fn, points):
    """Its gradient jumps where a point changes sides: other weights change it, and still it has no derivative."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()
    x, y = (torch.randn(2, points, size, generator=generator, dtype=torch.float64) for size in (2, 1))
    batch = TaskBatch(x, y, x.flip(1), y.flip(1))
    expected, _ = loop(model, batch, 0.1, lambda out, y, weights: loss_fn(out, y), {})
    grads = MAML(model, loss_fn, inner_lr=0.1).meta_gradient(batch).grads
    assert_close({name: g.mean(0) for name, g in grads.items()}, expected)


# ---- modules with parameters behind a function


@pytest.mark.parametrize("make", [functools.partial, lambda loss: loss.forward], ids=["partial", "method"])
def test_a_loss_that_hides_parameters_is_an_error(make):
    with pytest.raises(ValueError, match="Weighted with parameters, which would get no gradients"):
        MAML(net(), make(Weighted()))
    MAML(net(), make(nn.MSELoss()))
