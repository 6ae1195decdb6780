"""Options of MAML++ that change over a run: step sizes by inner step, losses after each step, a first-order start."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from problems import conv4, image_batch, relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, TaskBatch
from metamom.maml.annealing import step_weights
from metamom.tasks import Sinusoid

STEPS, ANNEAL, FIRST = 3, 4, 2
TASKS = Sinusoid(shots=5, queries=4)
Params = dict[str, Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def sample(step: int, tasks: int = 4) -> TaskBatch:
    return TASKS.sample(step, tasks).to("cpu", torch.float64)


def plain_gradients(
    model: nn.Module, batch: TaskBatch, weights: list[float], alphas: dict[str, Tensor], first_order: bool = False
) -> tuple[list[Tensor], list[Tensor], float]:
    """By a loop over tasks: gradients of the model and the step sizes, and the mean loss after the last step."""
    names = [name for name, _ in model.named_parameters()]
    start = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    alphas = {name: alpha.detach().clone().requires_grad_() for name, alpha in alphas.items()}
    total, last = torch.zeros((), dtype=torch.float64), 0.0
    for x, y, query_x, query_y in zip(*batch[:4], strict=True):
        current: Params = dict(start)
        for j, weight in enumerate(weights):
            loss = F.mse_loss(functional_call(model, current, (x,)), y)
            grads = torch.autograd.grad(loss, list(current.values()), create_graph=not first_order)
            current = {n: current[n] - alphas[n][j] * g for n, g in zip(names, grads, strict=True)}
            query = F.mse_loss(functional_call(model, current, (query_x,)), query_y)
            total = total + weight * query / batch.num_tasks
        last += query.item() / batch.num_tasks
    found = torch.autograd.grad(total, [*start.values(), *alphas.values()])
    return list(found[: len(names)]), list(found[len(names) :]), last


def number(value: float) -> dict[str, Tensor]:
    return {name: torch.full((STEPS,), value, dtype=torch.float64) for name, _ in network().named_parameters()}


def test_weights_of_the_losses():
    assert step_weights(0, ANNEAL, 3) == pytest.approx([1 / 3] * 3)
    assert step_weights(1, ANNEAL, 3) == pytest.approx([0.25, 0.25, 0.5])
    assert step_weights(ANNEAL, ANNEAL, 3) == step_weights(10 * ANNEAL, ANNEAL, 3) == [0, 0, 1]
    assert step_weights(0, ANNEAL, 1) == [1]


@pytest.mark.parametrize("options", [{}, {"vectorize": "loop"}, {"chunk_size": 1}, {"compile": True}])
def test_every_iteration_is_that_of_a_loop_over_tasks(options, traced):
    """Both annealed: first-order for two iterations, the weights over four; and then as without either."""
    learner = MAML(
        network(), F.mse_loss, inner_lr=0.05, inner_steps=STEPS, multi_step=ANNEAL, first_order_until=FIRST, **options
    )
    optimizer = CompositeMomentum(learner.parameters(), lr=0.05)
    for k in range(ANNEAL + 2):
        model, batch = copy.deepcopy(learner.model), sample(k)
        expected, _, last = plain_gradients(model, batch, step_weights(k, ANNEAL, STEPS), number(0.05), k < FIRST)
        optimizer.zero_grad()
        loss = learner.backward(batch, workers=2).loss
        assert loss.item() == pytest.approx(last, rel=1e-10)
        for p, grad in zip(learner.model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-10)
        optimizer.step()
    # first-order and weighted, exact and weighted, and exact alone
    assert len(traced) == (3 if "compile" in options else 0)


@pytest.mark.parametrize("options", [{}, {"vectorize": "loop"}, {"chunk_size": 3}, {"compile": True}])
def test_step_sizes_by_tensor_and_step(options, traced):
    """Value and derivative, for two steps of the outer optimizer."""
    learner = MAML(
        network(), F.mse_loss, inner_lr=0.05, inner_steps=STEPS, learn_inner_lr="tensor-step", multi_step=2, **options
    )
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.01)
    for k in range(3):
        sizes = {name: value.detach().clone() for name, value in learner.inner_lr.items()}
        assert all(value.shape == (STEPS,) for value in sizes.values())
        expected, of_sizes, _ = plain_gradients(learner.model, sample(k), step_weights(k, 2, STEPS), sizes)
        optimizer.zero_grad()
        learner.backward(sample(k))
        for p, grad in zip(learner.model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-10)
        for name, grad in zip(sizes, of_sizes, strict=True):
            torch.testing.assert_close(learner.inner_lr[name].grad, grad, rtol=1e-10, atol=1e-10)
        optimizer.step()
    assert not torch.equal(learner.inner_lr["0.weight"], sizes["0.weight"])


def test_step_sizes_of_layers_in_conv4():
    """With each step's sizes all alike, they are one number's; their gradients sum to its gradient."""
    batch = image_batch(tasks=3)
    by_step, scalar = (
        MAML(conv4(), F.cross_entropy, inner_lr=0.1, inner_steps=2, learn_inner_lr=kind)
        for kind in ("tensor-step", "scalar")
    )
    found, expected = (each.meta_gradient(batch).grads for each in (by_step, scalar))
    weights = {name for name in expected if name != "inner_lr"}
    assert relative_error({n: found[n] for n in weights}, {n: expected[n] for n in weights}) < 1e-10
    total = sum(grad.sum() for name, grad in found.items() if name.startswith("inner_lr."))
    torch.testing.assert_close(total, expected["inner_lr"].sum())


def test_further_steps_use_the_size_of_the_last():
    learner = MAML(network(), F.mse_loss, inner_lr=0.05, inner_steps=2, learn_inner_lr="tensor-step")
    learner.inner_lr = {name: torch.tensor([0.05, 0.01]) for name in learner.adapted}
    batch = sample(0)
    *_, third = learner.trajectory(batch.support_x, batch.support_y, steps=3)
    alone = MAML(network(), F.mse_loss, inner_lr=0.01)
    *_, second = learner.trajectory(batch.support_x, batch.support_y, steps=2)
    for t in range(4):
        alone.model.load_state_dict({name: w[t] for name, w in second.items()})
        one = alone.adapt(batch.support_x[t : t + 1], batch.support_y[t : t + 1])
        for name, w in one.items():
            torch.testing.assert_close(w[0], third[name][t])


def test_losses_and_meta_gradients_do_not_count():
    learner = MAML(network(), F.mse_loss, inner_steps=STEPS, multi_step=ANNEAL)
    once = learner.meta_gradient(sample(0)).grads
    learner.losses(sample(1))
    again = learner.meta_gradient(sample(0)).grads
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert learner.state_dict()["annealing.iteration"] == 0
    learner.training_loss(sample(0)).backward()
    assert learner.state_dict()["annealing.iteration"] == 1


def test_the_derivative_of_losses_is_the_weighted_one():
    learner = MAML(network(), F.mse_loss, inner_lr=0.05, inner_steps=STEPS, multi_step=ANNEAL)
    found = learner.losses(sample(0))
    plain = MAML(network(), F.mse_loss, inner_lr=0.05, inner_steps=STEPS).losses(sample(0))
    torch.testing.assert_close(found, plain)
    grads = torch.autograd.grad(found.mean(), list(learner.model.parameters()))
    for grad, expected in zip(grads, learner.meta_gradient(sample(0)).grads.values(), strict=True):
        torch.testing.assert_close(grad, expected[0])


def test_the_count_is_saved_copied_and_loaded():
    options: dict[str, Any] = {"inner_steps": STEPS, "multi_step": ANNEAL, "first_order_until": FIRST}
    learner = MAML(network(), F.mse_loss, **options)
    for k in range(3):
        learner.backward(sample(k))
    loaded = MAML(network(), F.mse_loss, **options)
    loaded.load_state_dict(learner.state_dict())
    for other in (loaded, copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        found, expected = (each.meta_gradient(sample(9)).grads for each in (other, learner))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert learner.describe()["multi_step"] == ANNEAL
    assert "annealing.iteration" not in MAML(network(), F.mse_loss).state_dict()


def test_other_numbers_of_inner_steps():
    learner = MAML(network(), F.mse_loss, inner_lr=0.05, inner_steps=2, multi_step=ANNEAL)
    learner.inner_steps = STEPS
    expected, _, _ = plain_gradients(network(), sample(0), step_weights(0, ANNEAL, STEPS), number(0.05))
    for grad, wanted in zip(learner.meta_gradient(sample(0)).grads.values(), expected, strict=True):
        torch.testing.assert_close(grad[0], wanted)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"multi_step": -1}, ValueError, "multi_step must be >= 0"),
        ({"first_order_until": 0.5}, TypeError, "first_order_until must be a whole number"),
        ({"multi_step": 5, "estimator": "moml"}, ValueError, "leave out multi_step=5"),
        ({"multi_step": 5, "estimator": "implicit"}, ValueError, "adapts by solving a problem"),
        ({"first_order_until": 5, "estimator": "hessian-free"}, ValueError, "is for estimator 'exact'"),
        ({"learn_inner_lr": "step"}, ValueError, "learn_inner_lr must be"),
        ({"learn_inner_lr": "tensor-step", "inner_lr": torch.ones(3)}, ValueError, "for each of the 1 inner steps"),
    ],
)
def test_what_is_refused(options, error, said):
    with pytest.raises(error, match=said):
        MAML(nn.Linear(3, 1), F.mse_loss, **options)


def test_options_of_the_constructor_cannot_be_set_later():
    learner = MAML(nn.Linear(1, 1), F.mse_loss, multi_step=3)
    with pytest.raises(AttributeError, match="multi_step is fixed when a learner is made"):
        learner.multi_step = 5


def test_estimators_that_they_do_not_go_with_are_refused_later_too():
    learner = MAML(network(), F.mse_loss, multi_step=3, first_order_until=2)
    with pytest.raises(ValueError, match="leave out multi_step=3"):
        learner.estimator = "implicit"
    learner = MAML(network(), F.mse_loss, first_order_until=2)
    for estimator in ("perturbed", "hessian-free"):
        with pytest.raises(ValueError, match="first_order_until=2 is for estimator 'exact'"):
            learner.estimator = estimator
    learner.estimator = "first-order"
    learner.estimator = "exact"
