"""`MAML.backward(momentum=...)`: gradients for momenta that follow the weights, against plain loops and autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from problems import CLASSIFICATION, WAYS, mlp, randomised, regression_batch
from slow_maml import adapt_task, weights_of
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, TaskBatch
from metamom.bias import EF21, EF21SGDM, RandK, TopK, parse
from metamom.bias.coordinates import Coordinates
from metamom.common.choices import FOLLOWING
from metamom.maml.steps.hessian import hessian_products
from metamom.server.aggregate import Aggregation

BETA, LR, STEPS = 0.3, 0.05, 4
Flat = Callable[[Tensor], Tensor]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11 * float(theirs.abs().max()))


def learner_of(**options) -> MAML:
    return MAML(randomised(mlp(), seed=3), F.mse_loss, inner_lr=0.05, inner_steps=2, **options)


def slow_hessian(model: nn.Module, batch: TaskBatch, along: dict[str, Tensor], steps: int) -> Tensor:
    """One task at a time, and autograd three times: the flat product ``[d]`` of the mean over the tasks."""
    weights, total = weights_of(model), torch.zeros((), dtype=torch.float64)
    for i in range(batch.num_tasks):
        x, y, query_x, query_y = (each[i] for each in batch[:4])
        adapted = adapt_task(
            model, F.mse_loss, weights, x, y, steps=steps, inner_lr=lambda _: 0.05, adapted=list(weights)
        )
        total = total + F.mse_loss(torch.func.functional_call(model, adapted, (query_x,)), query_y) / batch.num_tasks
    grads = torch.autograd.grad(total, list(weights.values()), create_graph=True)
    slope = sum((g * along[name]).sum() for name, g in zip(weights, grads, strict=True))
    return torch.cat([h.flatten() for h in torch.autograd.grad(slope, list(weights.values()))])


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"chunk_size": 3}, {"vectorize": "loop"}], ids=str)
def test_hessian_products_of_each_worker(options):
    learner, batch = learner_of(**options), regression_batch(0, tasks=4)
    generator = torch.Generator().manual_seed(7)
    weights = learner.meta_parameters()
    along = {name: torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in weights.items()}
    found = hessian_products(learner._gradients, weights, along, batch, 2)
    assert not found.requires_grad
    for row, part in zip(found, batch.split(2), strict=True):
        assert_close(row, slow_hessian(learner.model, part, along, 2))


def test_hessian_products_of_a_convolutional_network():
    """Our layers and kernels, against differences of exact meta-gradients: 1e-5 of step, so 1e-6 or better."""
    make, size = CLASSIFICATION["Conv4"]
    learner = MAML(randomised(make()), F.cross_entropy, inner_lr=0.05)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 2, WAYS, 1, size, size, generator=generator, dtype=torch.float64)
    y = torch.arange(WAYS).expand(2, WAYS)
    batch, weights = TaskBatch(x[0], y, x[1], y), learner.meta_parameters()
    along = {name: torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in weights.items()}
    (found,) = hessian_products(learner._gradients, weights, along, batch, 1)

    def shifted(by: float) -> Tensor:
        with torch.no_grad():
            for name, w in weights.items():
                w.add_(along[name], alpha=by)
        return flat_gradient(learner, batch, 1)[0]

    step = 1e-5
    ahead, behind = shifted(step), shifted(-2 * step)
    difference = (ahead - behind) / (2 * step)
    shifted(step)
    assert float((found - difference).norm() / difference.norm()) < 1e-6


class BatchStatistics(nn.Module):
    """`torch.nn.BatchNorm1d` of elementary functions."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.axes = of.weight, of.bias, [0]

    def forward(self, x: Tensor) -> Tensor:
        away = x - x.mean(self.axes, keepdim=True)
        scaled: Tensor = away / torch.sqrt((away**2).mean(self.axes, keepdim=True) + 1e-5) * self.weight + self.bias
        return scaled


class LayerStatistics(BatchStatistics):
    """`torch.nn.LayerNorm` of elementary functions."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__(of)
        self.axes = [1]


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize(("norm", "by_hand"), [(nn.BatchNorm1d, BatchStatistics), (nn.LayerNorm, LayerStatistics)])
def test_hessian_products_of_normalisations(norm, by_hand, vectorize):
    """The third derivatives of PyTorch's own are wrong in torch 2.13, by tens of percents here."""
    model = randomised(nn.Sequential(nn.Linear(2, 5), norm(5), nn.Tanh(), nn.Linear(5, 1)))
    learner = MAML(model, F.mse_loss, inner_lr=0.05, inner_steps=2, vectorize=vectorize)
    batch, weights = regression_batch(0, tasks=2), learner.meta_parameters()
    draws = torch.Generator().manual_seed(7)
    along = {name: torch.randn(w.shape, generator=draws, dtype=w.dtype) for name, w in weights.items()}
    (found,) = hessian_products(learner._gradients, weights, along, batch, 1)
    other = nn.Sequential(*(by_hand(layer) if isinstance(layer, norm) else layer for layer in model))
    assert_close(found, slow_hessian(other, batch, along, 2))


def flat_gradient(learner: MAML, batch: TaskBatch, workers: int) -> Tensor:
    """``[n, d]``."""
    return torch.cat([g.flatten(1) for g in learner.meta_gradient(batch, workers).grads.values()], 1)


def flat(learner: MAML) -> Tensor:
    return torch.cat([w.detach().flatten() for w in learner.meta_parameters().values()])


def set_weights(learner: MAML, w: Tensor) -> None:
    with torch.no_grad():
        for p, part in zip(
            learner.meta_parameters().values(),
            w.split([p.numel() for p in learner.meta_parameters().values()]),
            strict=True,
        ):
            p.copy_(part.view_as(p))


def gradient_at(learner: MAML, w: Tensor, batch: TaskBatch, workers: int) -> Tensor:
    twin = copy.deepcopy(learner)
    set_weights(twin, w)
    return flat_gradient(twin, batch, workers)


def hessian_at(learner: MAML, w: Tensor, batch: TaskBatch, workers: int, d: Tensor) -> Tensor:
    twin = copy.deepcopy(learner)
    set_weights(twin, w)
    sizes = dict(twin.meta_parameters())
    parts = d.split([p.numel() for p in sizes.values()])
    along = {name: part.view_as(p) for (name, p), part in zip(sizes.items(), parts, strict=True)}
    return torch.stack([slow_hessian(twin.model, part, along, 2) for part in batch.split(workers)])


def updated(variant: str, learner: MAML, w: Tensor, before: Tensor, v: Tensor, eta: float, k: int, C: Flat) -> Tensor:
    """The workers' momenta after one step by the paper's formulas, with every gradient passed through C."""
    batch = regression_batch(k, tasks=4)
    if variant == "igt":
        return (1 - eta) * v + eta * C(gradient_at(learner, w + (1 - eta) / eta * (w - before), batch, 2))
    g = C(gradient_at(learner, w, batch, 2))
    if variant == "storm":
        old = g if k == 0 else C(gradient_at(learner, before, batch, 2))
        return g + (1 - eta) * (v - old)
    return (1 - eta) * (v + hessian_at(learner, w, batch, 2, w - before)) + eta * g


def steps_of(learner: MAML, optimizer: CompositeMomentum, bias) -> list[Tensor]:
    found = []
    for k in range(STEPS):
        optimizer.zero_grad()
        learner.backward(regression_batch(k, tasks=4), workers=2, bias=bias, momentum=optimizer)
        optimizer.step()
        found.append(flat(learner))
    return found


def of_rows(operator) -> Flat:
    return lambda rows: rows if operator is None else operator(rows)


@pytest.mark.parametrize(
    ("variant", "bias"),
    [
        ("igt", None),
        ("storm", None),
        ("hessian", None),
        ("igt", "topk:20%"),
        ("storm", "topk:20%"),
        ("igt", "ef21:sign"),
    ],
)
def test_momentum_on_the_server(variant, bias):
    learner, operator = learner_of(), None if bias is None else parse(bias)
    w = before = flat(learner)
    v = torch.zeros(2, len(w), dtype=torch.float64)  # of which the server averages
    expected = []
    twin = copy.deepcopy(learner)
    for k in range(STEPS):
        v = updated(variant, twin, w, before, v, BETA, k, of_rows(operator))
        before, w = w, w - LR * v.mean(0)
        expected.append(w)
    optimizer = CompositeMomentum(learner.parameters(), lr=LR, beta=BETA, variant=variant)
    for ours, theirs in zip(steps_of(learner, optimizer, bias), expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("variant", FOLLOWING)
def test_momentum_on_the_workers(variant):
    """EF21 of the workers' momenta: ``h_i <- h_i + C(v_i - h_i)``, and a step along their mean."""
    learner, C = learner_of(), TopK(ratio=0.2)
    w = before = flat(learner)
    v = h = torch.zeros(2, len(w), dtype=torch.float64)
    expected, twin = [], copy.deepcopy(learner)
    for k in range(STEPS):
        v = updated(variant, twin, w, before, v, BETA, k, of_rows(None))
        h = h + C(v - h)
        before, w = w, w - LR * h.mean(0)
        expected.append(w)
    optimizer = CompositeMomentum(learner.parameters(), lr=LR, beta=1.0, variant=variant)
    for ours, theirs in zip(steps_of(learner, optimizer, EF21SGDM(C, eta=BETA)), expected, strict=True):
        assert_close(ours, theirs)


def test_random_operators_draw_the_same_at_both_points():
    """So with the same weights twice, STORM's change is zero; and each step counts once."""
    learner, operator = learner_of(), RandK(ratio=0.3, seed=1)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.0, beta=BETA, variant="storm")
    for k in range(3):
        assert operator.draw_step == k
        optimizer.zero_grad()
        learner.backward(regression_batch(k), workers=2, bias=operator, momentum=optimizer)
        assert not any(change.any() for change in optimizer._changes.values())
        optimizer.step()


def test_bytes_of_both_gradients():
    learner = learner_of()
    optimizer = CompositeMomentum(learner.parameters(), lr=LR, variant="storm")
    sizes = []
    for k in range(3):
        optimizer.zero_grad()
        found = learner.backward(regression_batch(k), workers=2, bias="topk:10%", momentum=optimizer)
        sizes.append(found.metrics["wire_bytes"])
        optimizer.step()
    assert sizes == [sizes[0], 2 * sizes[0], 2 * sizes[0]]


def test_it_adds_to_the_gradient_and_counts_one_iteration():
    learner = learner_of(multi_step=10)
    optimizer = CompositeMomentum(learner.parameters(), lr=LR, variant="storm")
    learner.backward(regression_batch(0), momentum=optimizer)
    optimizer.step()
    optimizer.zero_grad()
    twin = copy.deepcopy(learner)
    for one in (learner, twin):
        one.backward(regression_batch(1))
    found = learner.backward(regression_batch(2), momentum=optimizer)
    other = twin.backward(regression_batch(2))
    assert torch.equal(found.loss, other.loss)
    for p, q in zip(learner.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=1e-14)
    assert learner.annealing.state_dict() == twin.annealing.state_dict()


@pytest.mark.parametrize(
    ("variant", "options", "bias", "message"),
    [
        ("storm", {}, EF21(TopK(k=3)), r"the state of ef21:topk:3 is of one: put the momentum on the workers"),
        ("hessian", {}, "topk:3", r"no second gradient that topk:3 could act on"),
        ("hessian", {"estimator": "first-order"}, None, r"the gradient of a function, .* got estimator='first-order'"),
        ("storm", {}, "ef21-sgd2m(0.3):topk:3", r"follows the weights in ef21-sgdm\(ETA\):A only; got ef21-sgd2m"),
    ],
)
def test_what_does_not_go_together(variant, options, bias, message):
    learner = learner_of(**options)
    optimizer = CompositeMomentum(learner.parameters(), lr=LR, beta=1.0, variant=variant)
    with pytest.raises(ValueError, match=message):
        learner.backward(regression_batch(), bias=bias, momentum=optimizer)


def test_tracked_averages_move_once_a_step():
    learner = MAML(randomised(mlp()), F.mse_loss, estimator="moml")
    optimizer = CompositeMomentum(learner.parameters(), lr=LR, variant="storm")
    batch = regression_batch()._replace(task_ids=torch.arange(4))
    with pytest.raises(ValueError, match="a tracked estimator's averages move with each"):
        learner.backward(batch, momentum=optimizer)


def test_other_optimizers():
    learner = learner_of()
    with pytest.raises(TypeError, match="momentum= takes the CompositeMomentum that steps next; got"):
        learner.backward(regression_batch(), momentum=torch.optim.SGD(learner.parameters(), lr=0.1))


def test_without_a_variant_nothing_changes():
    learner, twin = learner_of(), learner_of()
    learner.backward(regression_batch(), momentum=CompositeMomentum(learner.parameters(), lr=LR))
    twin.backward(regression_batch())
    for p, q in zip(learner.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_failed_step_leaves_the_operator_and_the_gradients():
    learner, operator = learner_of(), RandK(ratio=0.3, seed=1)
    optimizer = CompositeMomentum(learner.parameters(), lr=LR, variant="storm")
    learner.backward(regression_batch(0), workers=2, bias=operator, momentum=optimizer)
    optimizer.step()
    grads = [p.grad.clone() for p in learner.parameters()]
    w, calls, exact = flat(learner), [], learner._at_one_point

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the second gradient")
        return exact(*args, **kwargs)

    learner._at_one_point = failing
    with pytest.raises(RuntimeError, match="the second gradient"):
        learner.backward(regression_batch(1), workers=2, bias=operator, momentum=optimizer)
    assert operator.draw_step == 1
    assert torch.equal(flat(learner), w)
    assert all(torch.equal(p.grad, g) for p, g in zip(learner.parameters(), grads, strict=True))


@pytest.mark.parametrize(
    ("operator", "message"),
    [(None, "no worker carries a momentum"), (TopK(k=1), "topk:1 carries no momentum that could change")],
)
def test_a_server_without_momenta_of_workers(operator, message):
    with pytest.raises(ValueError, match=message):
        Aggregation(2, operator).transport(torch.zeros(2, 3), [0, 1])


def test_only_momenta_that_exist_change():
    """A worker without one starts at zero, as without a variant; and the state before is left as it is."""
    operator = EF21SGDM(TopK(k=2), eta=0.5)
    operator(torch.ones(1, 2), workers=[0])
    before = operator.current_state()
    after = operator.transport(torch.full((2, 2), 3.0), before, Coordinates(1, [0, 1]))
    assert torch.equal(after.workers[0]["momentum"], torch.full((2,), 3.5))
    assert torch.equal(before.workers[0]["momentum"], torch.full((2,), 0.5))
    assert set(after.workers) == {0}
