"""Quadratic: its draws, and MAML on it, by the path that all models take, against closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_equal, assert_mean, gradients, point_learner, replicates, total_variance
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum
from metamom.rng import DrawCoordinates
from metamom.tasks import FixedTasks, PerWorker, Quadratic, quadratic_loss

DOUBLE = {"dtype": torch.float64}
A = torch.tensor([[1.0, 0.3], [0.3, -0.4]], dtype=torch.float64)  # not convex: nothing here needs it to be
C, W, ALPHA = (0.5, -1.0), (1.5, 1.0), 0.4
DELTA = torch.tensor(W, dtype=torch.float64) - torch.tensor(C, dtype=torch.float64)
M = torch.eye(2, dtype=torch.float64) - ALPHA * A


def one_task(gradient_noise: float = 0.0, hessian_noise: float = 0.0):
    noises = {"gradient_noise": gradient_noise, "hessian_noise": hessian_noise}
    return lambda shots, queries: Quadratic(2, shots, queries, hessian=A, center=C, **noises, **DOUBLE)


# ---- meta-gradients


@settings(deadline=None, max_examples=25)
@given(dim=st.integers(1, 5), steps=st.integers(0, 3), seed=st.integers(0, 1000))
def test_meta_gradients_and_losses_without_noise(dim, steps, seed):
    tasks = Quadratic(dim, 2, 3, spectrum=(0, 2), seed=seed, **DOUBLE)
    center, hessian = (torch.from_numpy(p) for p in tasks.parameters(DrawCoordinates("train", 0, np.arange(4))))
    w, steps = torch.linspace(-1, 1, dim, dtype=torch.float64), steps + 1
    learner = point_learner(w, 0.3, inner_steps=steps)
    m = torch.eye(dim) - 0.3 * hessian
    delta = torch.linalg.matrix_power(m, steps) @ (w - center)[..., None]  # u_J - c
    assert_equal(
        gradients(learner, tasks.sample(0, 4)), (torch.linalg.matrix_power(m, steps) @ hessian @ delta).squeeze(-1)
    )
    first_order = point_learner(w, 0.3, inner_steps=steps, estimator="first-order")
    assert_equal(gradients(first_order, tasks.sample(0, 4)), (hessian @ delta).squeeze(-1))
    assert_equal(learner.losses(tasks.sample(0, 4)).detach(), (delta.mT @ hessian @ delta / 2).flatten())


def test_gradient_noise_gives_no_bias_and_its_variance():
    """Variance: s²(α² tr(M²A²)/m + tr(M²)/m_out); the noise is Gaussian, so 200,000 draws know it to 0.4 %."""
    draws = gradients(point_learner(W, ALPHA), replicates(one_task(0.8), 3, 2, 200_000))
    assert_mean(draws, A @ M @ M @ DELTA)
    M2 = M @ M
    variance = 0.8**2 * (ALPHA**2 * torch.trace(M2 @ A @ A) / 3 + torch.trace(M2) / 2)
    assert total_variance(draws) == pytest.approx(float(variance), rel=0.01)


@pytest.mark.parametrize("gradient_noise", [0.0, 0.5])
def test_hessian_noise_gives_a_bias(gradient_noise):
    """(α²s²/m)(A + tr(A) I)δ, whatever the noise of gradients; measured to a small part of it."""
    draws = gradients(point_learner(W, ALPHA), replicates(one_task(gradient_noise, 0.7), 2, 5, 50_000))
    exact, bias = A @ M @ M @ DELTA, ALPHA**2 * 0.7**2 / 2 * (A + torch.trace(A) * torch.eye(2)) @ DELTA
    assert_mean(draws, exact + bias)
    assert ((draws.mean(0) - exact) / (draws.std(0) / 50_000**0.5)).abs().max() > 15


def test_first_order_has_its_own_mean_whatever_the_noise():
    learner = point_learner(W, ALPHA, estimator="first-order")
    assert_mean(gradients(learner, replicates(one_task(0.5, 0.7), 2, 3, 50_000)), A @ M @ DELTA)


def quartic(predictions: Tensor, targets: Tensor) -> Tensor:
    """``a w²/2 + c w⁴/4 + νw`` with c = ½."""
    return quadratic_loss(predictions, targets) + 0.5 / 4 * (predictions**4).mean()


def test_a_quartic_has_a_bias_without_coupling():
    """The meta-gradient is a cubic in the batch's mean slope, for which ±s/√m has the moments of N(0, s²/m)."""
    tasks = Quadratic(1, 5, 2, center=[0], gradient_noise=0.8, **DOUBLE)
    learner = point_learner([1.3], 0.2, quartic)
    assert_mean(gradients(learner, tasks.sample(0, 40_000)), [0.3230578722510554])
    two_points = Quadratic(1, 5, 2, center=[0], **DOUBLE).sample(0, 2)
    assert_equal(gradients(learner, two_points), [[0.32121200037905545]] * 2)  # of the population
    two_points.support_y[..., 2] = torch.tensor([0.8, -0.8], dtype=torch.float64)[:, None, None] / math.sqrt(5)
    assert_equal(gradients(learner, two_points).mean(0), [0.3230578722510554])


# ---- two tasks with different A


def two_tasks(**options) -> Quadratic:
    return Quadratic(2, 2, 3, hessian=[torch.eye(2), torch.eye(2) / 4], center=[[1, 0], [0, 1]], **DOUBLE, **options)


FLOOR, FIRST_ORDER_FLOOR = (0.5663716814159292, 0.4336283185840708), (0.6956521739130435, 0.30434782608695654)


@pytest.mark.parametrize(("estimator", "fixed_point"), [("exact", FLOOR), ("first-order", FIRST_ORDER_FLOOR)])
def test_momentum_training_ends_at_the_fixed_point(estimator, fixed_point):
    learner = point_learner((0.0, 0.0), 0.5, estimator=estimator)
    optimizer = CompositeMomentum(learner.parameters(), lr=1.0, beta=0.5)
    tasks = FixedTasks(two_tasks(), 2)
    for step in range(100):
        optimizer.zero_grad()
        learner.backward(tasks.sample(step, 2), workers=2)
        optimizer.step()
    assert_equal(learner.model.weight.detach().flatten(), fixed_point)


def test_the_floor_of_the_first_order_method():
    gradient = gradients(point_learner(FIRST_ORDER_FLOOR, 0.5), two_tasks().sample(0, 2)).mean(0)
    assert_equal(gradient.square().sum(), 0.0016282195179584122)
    assert_equal(gradients(point_learner(FLOOR, 0.5), two_tasks().sample(0, 2)).mean(0), [0, 0])


def test_any_model_with_d_outputs_can_train_on_it():
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    grads, losses = MAML(model, quadratic_loss, inner_lr=0.1).meta_gradient(two_tasks().sample(0, 4), workers=2)
    assert grads["2.weight"].shape == (2, 2, 4)
    assert losses.isfinite().all()


# ---- draws


@settings(deadline=None, max_examples=40)
@given(data=st.data(), dim=st.integers(1, 5), shots=st.integers(1, 4), queries=st.integers(1, 4))
def test_what_a_target_holds(data, dim, shots, queries):
    noises = {"gradient_noise": data.draw(st.sampled_from([0.0, 0.5]))}
    noises["hessian_noise"] = data.draw(st.sampled_from([0.0, 0.5]))
    spectrum = data.draw(st.sampled_from([None, (0.1, 3.0)]))
    seed = data.draw(st.integers(0, 2**64 - 1))
    tasks = Quadratic(dim, shots, queries, spectrum=spectrum, **noises, seed=seed, **DOUBLE)
    step = data.draw(st.integers(0, 2**40))
    batch = tasks.sample(step, 6)
    center, hessian = (torch.from_numpy(p) for p in tasks.parameters(DrawCoordinates("train", step, np.arange(6))))
    assert batch.query_y.shape == (6, queries, dim, dim + 2)
    assert torch.equal(batch.support_x, torch.ones(6, shots, 1, dtype=torch.float64))
    H, c, slope = batch.support_y[..., :dim], batch.support_y[..., dim], batch.support_y[..., dim + 1]
    torch.testing.assert_close(H, H.mT, rtol=0, atol=1e-14)  # A itself is symmetric to rounding
    assert torch.equal(c, center[:, None].expand_as(c))
    assert torch.equal(H, hessian[:, None].expand_as(H)) is not bool(noises["hessian_noise"])
    assert (slope == 0).all() == (not noises["gradient_noise"])
    for world_size in (2, 3, 6):
        blocks = [tasks.sample(step, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
        for name in ("support_x", "support_y", "query_x", "query_y"):
            assert torch.equal(torch.cat([getattr(part, name) for part in blocks]), getattr(batch, name)), name


def test_noises_have_their_sizes():
    """Of N draws the mean square has the relative standard error √(2/N)."""
    y = Quadratic(3, 40_000, 1, hessian=np.zeros((3, 3)), gradient_noise=0.5, hessian_noise=0.7, **DOUBLE)
    targets = y.sample(0, 1).support_y[0]
    squares = targets[..., :3].square().mean(0) / 0.49
    assert (squares / (1 + torch.eye(3)) - 1).abs().max() < 5 * math.sqrt(2 / 40_000)
    assert (targets[..., 4].square().mean(0) / 0.25 - 1).abs().max() < 5 * math.sqrt(2 / 40_000)
    columns = torch.cat([targets[..., :3].flatten(1)[:, [0, 1, 2, 4, 5, 8]], targets[..., 4]], 1)
    off = torch.corrcoef(columns.T) - torch.eye(9)
    assert off.abs().max() < 5 / math.sqrt(40_000)  # independent entries, and slopes of them


def test_neither_noise_moves_the_other():
    both, gradients_only, hessians_only = (
        Quadratic(2, 3, gradient_noise=g, hessian_noise=h).sample(0, 4).support_y for g, h in ((1, 1), (1, 0), (0, 1))
    )
    assert torch.equal(both[..., 3], gradients_only[..., 3])
    assert torch.equal(both[..., :2], hessians_only[..., :2])


def test_centers_have_their_size():
    center, _ = Quadratic(4, center_std=3).parameters(DrawCoordinates("train", 0, np.arange(2000)))
    assert abs(center.std() - 3) < 5 * 3 / math.sqrt(2 * center.size)


def test_fixed_tasks_and_workers():
    tasks = FixedTasks(Quadratic(2, spectrum=(0, 1), gradient_noise=0.1), 5)
    first, later = (tasks.sample(step, 5).support_y for step in (0, 9))
    assert torch.equal(first[..., :3], later[..., :3])
    assert not torch.isin(first[..., 3], later[..., 3]).any()
    mild, steep = Quadratic(2, spectrum=(0, 1)), Quadratic(2, spectrum=(5, 6))
    traces = PerWorker([mild, steep]).sample(0, 6).query_y[:, 0, [0, 1], [0, 1]].sum(-1)
    assert (traces[:3] <= 2).all()
    assert (traces[3:] >= 10).all()


def test_description_is_json():
    description = two_tasks(gradient_noise=0.1).describe()
    assert json.loads(json.dumps(description)) == description
    assert description["center"] == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be >= 1"),
        ({"shots": 0}, "shots must be >= 1"),
        ({"gradient_noise": -1}, "gradient_noise is a standard deviation"),
        ({"hessian_noise": math.nan}, "hessian_noise is a standard deviation"),
        ({"center_std": -1}, "center_std is a standard deviation"),
        ({"hessian": np.eye(3)}, r"hessian must be \[2, 2\].*got \[3, 3\]"),
        ({"hessian": [[1, 2], [0, 1]]}, "hessian must be symmetric"),
        ({"hessian": np.eye(2), "spectrum": (0, 1)}, "Leave one out"),
        ({"spectrum": (-1, 1)}, "spectrum must be a finite range"),
        ({"center": [1.0]}, r"center must be \[2\].*got \[1\]"),
        ({"hessian": np.stack([np.eye(2)] * 2), "center": np.zeros((3, 2))}, "2 of hessian, 3 of center"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Quadratic(**{"dim": 2, **arguments})


def test_a_model_of_another_size():
    learner = MAML(nn.Linear(1, 3), quadratic_loss)
    with pytest.raises(ValueError, match=r"predictions \[N, d\] and targets \[N, d, d \+ 2\]; got \[10, 3\]"):
        learner.meta_gradient(Quadratic(2).sample(0, 2))


def test_the_loss_of_a_plain_distance():
    p, c = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 3)
    target = torch.cat([torch.eye(3).expand(4, 3, 3), c[..., None], torch.zeros(4, 3, 1)], -1)
    torch.testing.assert_close(quadratic_loss(p, target), 1.5 * F.mse_loss(p, c))
