"""Estimators that adapt by a proximal problem: against closed forms, dense Hessians, and their error bounds."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from problems import assert_close, generator, randomised, regression_batch
from slow_proximal import slow_implicit
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.maml import Proximal
from metamom.maml.implicit.conjugate_gradients import conjugate_gradients
from metamom.maml.implicit.lbfgs import Objective, minimise
from metamom.maml.implicit.proximal import as_proximal
from metamom.maml.implicit.solves import settings_fixed

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
        ("implicit", LAMBDA, 1e-6),
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
    wanted = ((batch.query_x @ u.unsqueeze(-1) - batch.query_y) ** 2).mean((1, 2))
    torch.testing.assert_close(losses, wanted, rtol=tolerance, atol=0)
    adapted = learner.adapt(batch.support_x, batch.support_y)["weight"]
    torch.testing.assert_close(adapted.squeeze(1).detach(), u, rtol=0, atol=tolerance)


@pytest.mark.parametrize("differences", ["symmetric", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inexact_differences_of_an_ill_conditioned_loss_come_with_a_warning(dtype, differences):
    proximal = Proximal(1e-4, differences=differences)
    tasks = regression_batch(tasks=3, dim=4)
    scales = torch.logspace(0, -3, 4, dtype=torch.float64)
    scales[0] = 100.0
    hard = tasks._replace(support_x=tasks.support_x * scales).to(dtype=dtype)
    easy = tasks._replace(support_x=tasks.support_x * 0.02, query_x=tasks.query_x * 0.02).to(dtype=dtype)
    model = linear().to(dtype)
    for batch, is_hard in ((hard, True), (easy, False)):
        learner = MAML(model, F.mse_loss, estimator="perturbed", proximal=proximal)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = learner.meta_gradient(batch, workers=3).grads["weight"].squeeze(1).double()
        wanted, _ = regression_in_closed_form(model.weight.detach()[0].double(), batch.to(dtype=torch.float64), 1e-4)
        errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
        texts = [text for each in said if "enough for differences" in (text := str(each.message)) or "grew" in text]
        assert bool(texts) == (is_hard and dtype is torch.float32)
        assert texts or float(errors.max()) < 0.2


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e9])
def test_an_ill_conditioned_problem_comes_with_a_warning_wherever_the_adapted_weights_are_wrong(condition):
    tasks = regression_batch(tasks=3, dim=4)
    scales = torch.logspace(0, -math.log10(condition) / 2, 4, dtype=torch.float64)
    batch = tasks._replace(support_x=tasks.support_x * scales).to(dtype=torch.float32)
    model, strength = linear().float(), 1 / condition
    learner = MAML(model, F.mse_loss, estimator="implicit", proximal=strength)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        grads = learner.meta_gradient(batch, workers=3).grads["weight"].squeeze(1).double()
    wanted, _ = regression_in_closed_form(model.weight.detach()[0].double(), batch.to(dtype=torch.float64), strength)
    wrong = float(((grads - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) > 0.5
    assert any("was not solved" in str(each.message) for each in said) or not wrong
    assert wrong == (condition > 1e4)


def test_a_perturbation_that_leaves_no_minimum_comes_with_a_warning_that_says_so():
    batch = regression_batch(tasks=2, dim=4)
    learner = MAML(linear(), F.mse_loss, estimator="perturbed", proximal=Proximal(0.1, nu=50.0))
    with pytest.warns(UserWarning, match="was not solved in 2 of 2 tasks: its gradient grew .* a smaller nu"):
        learner.meta_gradient(batch)


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
    slopes = [math.log10(a / b) for a, b in itertools.pairwise(errors)]
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


# ---- the solver


class Live:
    """Bytes of the tensors that graphs keep at a time, and the most of them."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Kept:
        return Kept(tensor, self)


class Kept:
    def __init__(self, tensor: Tensor, live: Live) -> None:
        self.tensor, self.live = tensor, live
        live.now += tensor.nbytes
        live.most = max(live.most, live.now)

    def __del__(self) -> None:
        self.live.now -= self.tensor.nbytes


@pytest.mark.parametrize("estimator", ["implicit", "perturbed"])
def test_memory_does_not_grow_with_the_evaluations(estimator):
    """The most that graphs keep during a meta-gradient, whether the solve stops early or goes on; not so of steps."""
    model, batch = randomised(smooth()), regression_batch(tasks=2)

    def most(**options: Any) -> tuple[int, int]:
        learner, live = MAML(model, F.mse_loss, chunk_size=2, **options), Live()
        with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda kept: kept.tensor):
            learner.meta_gradient(batch)
        solved = learner.solves.inner
        return live.most, 0 if solved is None else int(solved.evaluations.max())

    (short, few), (long, many) = (
        most(estimator=estimator, proximal=Proximal(9.0, tolerance=tolerance)) for tolerance in (0.5, 1e-9)
    )
    assert many > 3 * few
    assert long == short
    assert most(inner_steps=many)[0] > 5 * most(inner_steps=1)[0]


def test_tasks_stop_one_by_one():
    """An easy task stops first, and is what it is without the others."""
    model, batch = linear(), regression_batch(tasks=4, dim=4)
    scale = torch.tensor([1e-3, 0.3, 1.0, 2.0], dtype=torch.float64).view(4, 1, 1)
    batch = batch._replace(support_x=batch.support_x * scale)
    learner = MAML(model, F.mse_loss, estimator="implicit", proximal=TIGHT)
    together = learner.meta_gradient(batch, 4).grads["weight"]
    counts = learner.solves.inner.evaluations.tolist()
    assert counts[0] < counts[1] < counts[3]
    for t in range(4):
        torch.testing.assert_close(learner.meta_gradient(batch.part(t, t + 1)).grads["weight"][0], together[t])
        assert abs(int(learner.solves.inner.evaluations) - counts[t]) <= 1
        assert learner.solves.inner.solved.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_minimise_quadratics_to_rounding(dtype, condition):
    scales = torch.logspace(0, math.log10(condition), 6).to(dtype).expand(3, 6)
    centre = torch.randn(3, 6, generator=generator(0)).to(dtype)

    def objective_of(some: Tensor | None) -> Objective:
        to, by = (centre, scales) if some is None else (centre[some], scales[some])
        return lambda points: ((by * (points - to) ** 2).sum(1) / 2, by * (points - to))

    eps = torch.finfo(dtype).eps
    found = minimise(objective_of, torch.zeros_like(centre), tolerance=1e-30, iterations=500, eps=eps)
    assert found.solved().all()
    assert float((found.point - centre).abs().max()) < 100 * eps


def test_conjugate_gradients_task_by_task():
    B = torch.randn(5, 7, 7, generator=generator(0), dtype=torch.float64)
    A = B @ B.mT + torch.eye(7, dtype=torch.float64)
    b = torch.randn(5, 7, generator=generator(1), dtype=torch.float64)
    b[2] = 0
    A[4] = -A[4]
    solved = conjugate_gradients(lambda v: (A @ v.unsqueeze(-1)).squeeze(-1), b, tolerance=1e-13, iterations=30)
    torch.testing.assert_close(solved.x[:4], torch.linalg.solve(A, b)[:4], rtol=1e-10, atol=1e-12)
    assert solved.products[2] == 0
    assert solved.negative.tolist() == [False] * 4 + [True]
    assert torch.equal(solved.x[4], b[4])  # at once, so the first-order gradient
    b[1, 0] = math.nan
    assert conjugate_gradients(lambda v: v, b, tolerance=1e-9, iterations=3).x[1].isnan().any()


# ---- options and errors


def test_failures_warn_once():
    model, batch = randomised(smooth()), regression_batch(tasks=3)
    learner = MAML(model, F.mse_loss, estimator="implicit", proximal="8,iterations=3,tolerance=1e-9")
    with pytest.warns(UserWarning, match="not solved to its tolerance in 3 of 3 tasks within 3 evaluations"):
        learner.meta_gradient(batch)
    learner.meta_gradient(batch)  # warnings are errors
    assert not learner.solves.inner.solved.any()


class Saddle(nn.Module):
    """A loss with negative curvature everywhere: ``-u^2``."""

    def forward(self, predicted: Tensor, y: Tensor) -> Tensor:
        return -(predicted**2).mean()


def test_negative_curvature_warns():
    model, batch = linear(1), regression_batch(tasks=1, dim=1)
    learner = MAML(model, Saddle(), estimator="implicit", proximal=Proximal(1e-3, iterations=2))
    with (
        pytest.warns(UserWarning, match="not solved to its tolerance in 1 of 1 task"),
        pytest.warns(UserWarning, match="met negative curvature in 1 of 1 task: .* Use a larger proximal"),
    ):
        learner.meta_gradient(batch)


def test_warnings_name_another_cure_where_the_settings_are_fixed():
    learner = MAML(linear(1), Saddle(), estimator="implicit", proximal=Proximal(1e-3, iterations=2))
    with (
        settings_fixed("Ask the paper."),
        pytest.warns(UserWarning, match=r"keep a gradient from vanishing\. Ask the paper\. \(Further"),
        pytest.warns(UserWarning, match=r"the meta-gradient is approximate\. Ask the paper\. \(Further"),
    ):
        learner.meta_gradient(regression_batch(tasks=1, dim=1))


def test_dropout_is_refused():
    model, batch = nn.Sequential(nn.Linear(2, 1), nn.Dropout()).double(), regression_batch()
    for vectorize in ("vmap", "loop"):
        learner = MAML(model, F.mse_loss, estimator="implicit", vectorize=vectorize)
        with pytest.raises(ValueError, match=r"^estimator 'implicit' compares many calls of the model"):
            learner.meta_gradient(batch)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"estimator": "implicit", "proximal": 0}, "proximal must be > 0 and finite; got 0"),
        ({"estimator": "implicit", "proximal": "2,nu"}, "proximal is a strength and options, .* got 'nu'"),
        ({"estimator": "implicit", "proximal": "2,iteration=3"}, "did you mean iterations"),
        ({"estimator": "implicit", "proximal": "2,iterations=a"}, "'a' in '2,iterations=a' is not a whole number"),
        ({"estimator": "perturbed", "proximal": "2,differences=both"}, "differences of proximal must be one of symm"),
        ({"estimator": "implicit", "inner_steps": 5}, "one proximal problem to a tolerance; got inner_steps=5"),
        ({"estimator": "implicit", "learn_inner_lr": True}, "does not take steps of inner_lr"),
        ({"estimator": "perturbed", "inner_lr": torch.tensor(0.1, requires_grad=True)}, "does not take steps of inner"),
        ({"estimator": "implicit", "compile": True}, "cannot be compiled"),
        ({"proximal": 2.0}, "proximal is the strength .* got proximal=2.0 with estimator 'exact'"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        MAML(nn.Linear(1, 1), F.mse_loss, **options)


def test_options_that_change():
    learner = MAML(linear(), F.mse_loss, inner_steps=3)
    with pytest.raises(ValueError, match="got inner_steps=3"):
        learner.estimator = "implicit"
    learner.inner_steps = 1
    learner.estimator, learner.proximal = "implicit", 3
    assert learner.proximal == Proximal(3.0)
    assert learner.describe()["proximal"] == "3"
    assert learner.like().proximal == learner.proximal
    assert "proximal" not in learner.like(estimator="exact").describe()
    for settings in (Proximal(0.1, nu=1 / 3), TIGHT, Proximal(2.0, differences="forward", cg_iterations=5)):
        assert as_proximal(settings.spec) == settings
