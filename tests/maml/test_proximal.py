"""Estimators that adapt by a proximal problem: against closed forms, dense Hessians, and their error bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import assert_close, generator, image_batch, mlp, problem, randomised, regression_batch
from slow_proximal import slow_implicit
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.maml import Proximal

LAMBDA = 0.7
TIGHT = Proximal(LAMBDA, tolerance=1e-13, cg_tolerance=1e-13)


def linear(dim: int = 4) -> nn.Module:
    return randomised(nn.Linear(dim, 1, bias=False))


def regression_in_closed_form(w: Tensor, batch: TaskBatch, strength: float) -> tuple[Tensor, Tensor]:
    """The meta-gradients ``[T, d]`` and the solutions ``[T, d]``, for mean squared errors of a linear model ``[d]``."""
    X, y, A, c = batch[:4]
    H = 2 * X.mT @ X / X.shape[1]
    M = H + strength * torch.eye(X.shape[2], dtype=X.dtype)
    u = torch.linalg.solve(M, 2 * X.mT @ y / X.shape[1] + strength * w.unsqueeze(1))
    g = 2 * A.mT @ (A @ u - c) / A.shape[1]
    return strength * torch.linalg.solve(M, g).squeeze(-1), u.squeeze(-1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ---- linear regression


@pytest.mark.parametrize(
    ("estimator", "proximal", "tolerance"),
    [
        ("implicit", LAMBDA, 1e-8),
        ("implicit", TIGHT, 1e-12),
        ("perturbed", Proximal(LAMBDA, tolerance=1e-14, nu=1e-5), 1e-8),
    ],
)
def test_linear_regression_in_closed_form(estimator, proximal, tolerance):
    model, batch = linear(), regression_batch(tasks=6, dim=4)
    wanted, u = regression_in_closed_form(model.weight.detach()[0], batch, LAMBDA)
    learner = MAML(model, F.mse_loss, estimator=estimator, proximal=proximal)
    grads, losses = learner.meta_gradient(batch, workers=3)
    assert relative_error(grads["weight"].squeeze(1), wanted.view(3, 2, 4).mean(1)) < tolerance
    torch.testing.assert_close(losses, ((batch.query_x @ u.unsqueeze(-1) - batch.query_y) ** 2).mean((1, 2)))
    adapted = learner.adapt(batch.support_x, batch.support_y)["weight"]
    torch.testing.assert_close(adapted.squeeze(1).detach(), u, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("differences", "order"), [("symmetric", 2), ("forward", 1)])
def test_the_bias_in_nu(differences, order):
    """On quadratics the error is a power series in nu; ten times smaller, it falls by 10^order."""
    model, batch = linear(), regression_batch(dim=4)
    wanted = regression_in_closed_form(model.weight.detach()[0], batch, LAMBDA)[0].mean(0)
    errors = []
    for nu in (1e-1, 1e-2, 1e-3):
        settings = Proximal(LAMBDA, tolerance=1e-15, nu=nu, differences=differences)
        learner = MAML(model, F.mse_loss, estimator="perturbed", proximal=settings)
        errors.append(relative_error(learner.meta_gradient(batch).grads["weight"][0, 0], wanted))
    slopes = [math.log10(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert slopes == pytest.approx([order, order], abs=0.25)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_the_residual_of_conjugate_gradients_bounds_the_error(iterations):
    """``|z - z*| <= |r|``, since no eigenvalue of ``I + H/lambda`` is below 1 for a convex loss."""
    model, batch = linear(6), regression_batch(dim=6, tasks=1, support=9)
    settings = Proximal(LAMBDA, tolerance=1e-14, cg_tolerance=1e-14, cg_iterations=iterations)
    learner = MAML(model, F.mse_loss, estimator="implicit", proximal=settings)
    with pytest.warns(UserWarning, match="conjugate gradients did not reach their tolerance, 1e-14, in 1 of 1 task"):
        found = learner.meta_gradient(batch).grads["weight"][0, 0]
    wanted, u = regression_in_closed_form(model.weight.detach()[0], batch, LAMBDA)
    g = 2 * batch.query_x[0].T @ (batch.query_x[0] @ u[0] - batch.query_y[0, :, 0]) / 3
    H = 2 * batch.support_x[0].T @ batch.support_x[0] / 9
    residual = g - found - H @ found / LAMBDA
    solved = learner.solves.implicit
    assert solved.products.tolist() == [iterations]
    assert float(solved.residual) == pytest.approx(float(residual.norm() / g.norm()), rel=1e-8)
    assert 0 < float((found - wanted[0]).norm()) <= float(residual.norm())


# ---- dense Hessians


class Scaled(nn.Module):
    """A loss with parameters of its own, which no adaptation moves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))

    def forward(self, predicted: Tensor, y: Tensor) -> Tensor:
        return (self.scale**2 * (predicted - y) ** 2).mean()


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))


CASES: list[tuple[Any, dict[str, Any]]] = [
    (F.mse_loss, {}),
    (F.mse_loss, {"vectorize": "loop"}),
    (F.mse_loss, {"adapt": ["3"], "chunk_size": 3}),
    (Scaled(), {"adapt": ["0", "3.bias"]}),
    (Scaled(), {"chunk_size": 1}),
]


@pytest.mark.parametrize(("loss_fn", "options"), CASES)
def test_agrees_with_dense_hessians(loss_fn, options):
    model, batch = randomised(smooth()), regression_batch(tasks=2)
    settings = Proximal(8.0, tolerance=1e-14, cg_tolerance=1e-14, nu=1e-4)
    learner = MAML(model, loss_fn, estimator="implicit", proximal=settings, **options)
    slow = [slow_implicit(model, loss_fn, part, 8.0, learner.adapted) for part in batch.split(2)]
    for estimator, tolerance in (("implicit", 1e-10), ("perturbed", 1e-7)):
        learner.estimator = estimator
        found, losses = learner.meta_gradient(batch, 2)
        for i, (wanted, loss) in enumerate(slow):
            assert_close({n: g[i] for n, g in found.items()}, wanted, tolerance)
            torch.testing.assert_close(losses[i : i + 1], loss, rtol=1e-10, atol=1e-12)
        mean = {n: g.mean(0) for n, g in found.items()}
        assert_close({n: g[0] for n, g in learner.meta_gradient(batch).grads.items()}, mean, tolerance)
        total = learner.losses(batch).mean()
        grads = torch.autograd.grad(total, [*learner.meta_parameters().values()])
        assert_close(dict(zip(mean, grads, strict=True)), mean, tolerance)
        with torch.no_grad():
            torch.testing.assert_close(learner.losses(batch), losses)


def test_adapted_weights_are_differentiable_in_both():
    """`adapt` has the derivatives of the solution, also where the meta-gradient is made of differences."""
    model, batch = linear(), regression_batch(dim=4)
    wanted = regression_in_closed_form(model.weight.detach()[0], batch, LAMBDA)[0].mean(0)
    for estimator in ("implicit", "perturbed"):
        learner = MAML(model, F.mse_loss, estimator=estimator, proximal=TIGHT)
        adapted = learner.adapt(batch.support_x, batch.support_y)
        loss = F.mse_loss(learner.predict(adapted, batch.query_x), batch.query_y)
        (grad,) = torch.autograd.grad(loss, [model.weight])
        assert relative_error(grad[0], wanted) < 1e-10
