"""LinearRegression: its draws, and MAML on it, by the path that all models take, against closed forms."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    assert_equal,
    assert_mean,
    gradients,
    linear_learner,
    pairs,
    replicates,
    subsets,
    total_variance,
)
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, TaskBatch
from metamom.rng import DrawCoordinates
from metamom.tasks import FixedTasks, LinearRegression, PerWorker, Sinusoid, half_squared_error
from metamom.tasks.population import Population

DELTA = (1.0, -2.0, 0.5)
DOUBLE = {"dtype": torch.float64}

# a finite data set: least squares solution (0, 5/6), mean of φφ^T diag(.75, 1.5)
X = torch.tensor([[1, 0], [1, 1], [0, 2], [-1, 1]], dtype=torch.float64)
Y = torch.tensor([1, 0, 2, 1], dtype=torch.float64)[:, None]
W, ALPHA = (0.5, -0.5), 0.1
POPULATION = {1: (0.320859375, -1.445), 2: (0.274535302734375, -1.0440125)}  # by inner steps


def all_points(batches: int = 1) -> tuple[Tensor, Tensor]:
    return X.expand(batches, 4, 2), Y.expand(batches, 4, 1)


# ---- the finite data set, by enumeration


@pytest.mark.parametrize(
    ("m", "replacement", "options", "wanted"),
    [
        (1, True, {}, (0.3290625, -1.50125)),
        (2, True, {}, (0.3249609375, -1.473125)),
        (3, True, {}, (0.32359375, -1.46375)),
        (1, False, {}, (0.3290625, -1.50125)),
        (2, False, {}, (0.32359375, -1.46375)),
        (3, False, {}, (0.32177083333333333, -1.45125)),
        (4, False, {}, POPULATION[1]),
        (4, False, {"inner_steps": 2}, POPULATION[2]),
        (1, True, {"inner_steps": 2}, (0.306815625, -1.27185)),
        (2, True, {"inner_steps": 2}, (0.29076181640625, -1.163201171875)),
        (1, True, {"estimator": "first-order"}, (0.346875, -1.7)),  # Σ(I - αΣ)δ for every m
        (2, True, {"estimator": "first-order"}, (0.346875, -1.7)),
        (3, False, {"estimator": "first-order"}, (0.346875, -1.7)),
    ],
)
def test_the_mean_over_all_batches(m, replacement, options, wanted):
    batch = pairs(subsets(X, Y, m, replacement=replacement), all_points())
    assert_equal(gradients(linear_learner(W, ALPHA, **options), batch).mean(0), wanted)


@pytest.mark.parametrize(("m", "wanted"), [(1, (0.21875, -0.86)), (2, (0.269453125, -1.1415625))])
def test_the_mean_with_every_batch_used_in_full_again(m, wanted):
    x, y = subsets(X, Y, m, replacement=True)
    batch = pairs((x, y), all_points())._replace(query_x=x, query_y=y)
    assert_equal(gradients(linear_learner(W, ALPHA), batch).mean(0), wanted)


@pytest.mark.parametrize(("m", "wanted"), [(1, 4.855089849853515), (2, 2.305785711669921)])
def test_the_mean_square_error_over_all_pairs_of_batches(m, wanted):
    """Query batches of m as well."""
    sets = subsets(X, Y, m, replacement=True)
    draws = gradients(linear_learner(W, ALPHA), pairs(sets, sets))
    assert_equal(draws.mean(0), {1: (0.3290625, -1.50125), 2: (0.3249609375, -1.473125)}[m])
    error = (draws - torch.tensor(POPULATION[1], dtype=torch.float64)).square().sum(1).mean()
    assert_equal(error, wanted)


def batches(*sizes: int) -> TaskBatch:
    """A task for each combination of inner batches of these sizes, drawn with replacement, one after the other."""
    places = list(itertools.product(range(4), repeat=sum(sizes)))
    return pairs((X[torch.tensor(places)], Y[torch.tensor(places)]), all_points())


@pytest.mark.parametrize("estimator", ["independent", "cross-fit", "richardson", "hessian-free"])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_cures_have_no_bias_for_any_batch_size(m, estimator):
    """Differences are exact on quadratics but for rounding, of 1e-16 over r = 6e-6."""
    mean = gradients(linear_learner(W, ALPHA, estimator=estimator), batches(m, m)).mean(0)
    error = mean - torch.tensor(POPULATION[1], dtype=torch.float64)
    assert error.abs().max() <= (1e-9 if estimator == "hessian-free" else 1e-12)


@pytest.mark.parametrize("estimator", ["independent", "cross-fit"])
def test_two_steps_on_fresh_batches_have_no_bias_either(estimator):
    learner = linear_learner(W, ALPHA, estimator=estimator, inner_steps=2, inner_batches="fresh")
    assert_equal(gradients(learner, batches(1, 1, 1, 1)).mean(0), POPULATION[2])


@pytest.mark.parametrize("m", [1, 2])
def test_the_exact_estimator_on_fresh_batches_has_its_own_mean(m):
    """T(T(Σ))δ and residuals' share, by enumeration of each batch's matrices."""
    learner = linear_learner(W, ALPHA, inner_steps=2, inner_batches="fresh")
    x, y = subsets(X, Y, m, replacement=True)
    second, cross = x.mT @ x / m, (x.mT @ y / m).squeeze(-1)  # of each batch
    adapt, sigma = torch.eye(2) - ALPHA * second, X.T @ X / 4
    w, theta = torch.tensor(W, dtype=torch.float64), torch.linalg.lstsq(X, Y).solution[:, 0]
    u = adapt @ w + ALPHA * cross
    wanted = torch.zeros(2, dtype=torch.float64)
    for i, j in itertools.product(range(len(x)), repeat=2):
        wanted += adapt[i] @ adapt[j] @ sigma @ (adapt[j] @ u[i] + ALPHA * cross[j] - theta) / len(x) ** 2
    assert_equal(gradients(learner, batches(m, m)).mean(0), wanted)
    assert (wanted - torch.tensor(POPULATION[2], dtype=torch.float64)).abs().max() > 1e-3


@settings(deadline=None, max_examples=20)
@given(dim=st.integers(1, 4), half=st.integers(1, 4), seed=st.integers(0, 1000))
def test_richardson_is_cross_fit_sample_by_sample(dim, half, seed):
    batch = LinearRegression(dim, 2 * half, 3, noise=0.5, seed=seed, **DOUBLE).sample(0, 5)
    w = torch.linspace(-1, 1, dim).tolist()
    ours, theirs = (gradients(linear_learner(w, 0.1, estimator=e), batch) for e in ("richardson", "cross-fit"))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_whole_data_set_at_once_is_the_population(steps):
    tasks = LinearRegression(2, 4, 4, data=(X, Y[:, 0]), replacement=False, **DOUBLE)
    draws = gradients(linear_learner(W, ALPHA, inner_steps=steps), tasks.sample(3, 5))
    assert_equal(draws, torch.tensor([POPULATION[steps]] * 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("replacement", "wanted"), [(True, (0.3249609375, -1.473125)), (False, (0.32359375, -1.46375))]
)
def test_batches_drawn_from_the_data_have_that_mean(replacement, wanted):
    tasks = LinearRegression(2, 2, 3, data=(X, Y[:, 0]), replacement=replacement, **DOUBLE)
    assert_mean(gradients(linear_learner(W, ALPHA), tasks.sample(0, 40_000)), wanted)


# ---- Gaussian features


def isotropic(noise: float = 0.0, dim: int = 3):
    return lambda shots, queries: LinearRegression(dim, shots, queries, theta=[0.0] * dim, noise=noise, **DOUBLE)


@pytest.mark.parametrize(
    ("options", "at_a_tenth", "at_a_half"),
    [
        ({}, 0.818, 0.45),
        ({"estimator": "first-order"}, 0.9, 0.5),
        ({"inner_steps": 2}, 0.6920952, 0.3195),
        ({"inner_steps": 3}, 0.6004016976, 0.283325),
        ({"estimator": "independent"}, 0.81, 0.25),
        ({"estimator": "hessian-free"}, 0.81, 0.25),
        ({"estimator": "cross-fit"}, 0.81, 0.25),
        ({"estimator": "richardson"}, 0.81, 0.25),
        ({"inner_steps": 2, "inner_batches": "fresh"}, 0.669124, 0.2025),
        ({"inner_steps": 2, "inner_batches": "fresh", "estimator": "independent"}, 0.6561, 0.0625),
    ],
)
def test_means_of_gaussian_designs(options, at_a_tenth, at_a_half):
    parts = linear_learner(DELTA, 0.1, **options).support_parts
    batch = replicates(isotropic(), 5 * parts, 7, 100_000)
    for alpha, coefficient in ((0.1, at_a_tenth), (0.5, at_a_half)):
        assert_mean(gradients(linear_learner(DELTA, alpha, **options), batch), coefficient * np.array(DELTA))


def test_means_with_the_support_set_used_in_full_again():
    batch = replicates(isotropic(), 5, 1, 100_000)
    batch = batch._replace(query_x=batch.support_x, query_y=batch.support_y)
    for alpha, coefficient in ((0.1, 0.6828), (0.5, 0.27)):
        assert_mean(gradients(linear_learner(DELTA, alpha), batch), coefficient * np.array(DELTA))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (0.63168, -0.8936, -0.076)),
        ({"estimator": "first-order"}, (0.48, -0.812, -0.088)),
        ({"estimator": "independent"}, (0.28944, -0.6352, -0.00896)),
        ({"inner_steps": 2, "inner_batches": "fresh"}, (0.44441856, -0.729749248, 0.017522176)),
    ],
)
def test_means_of_correlated_features(options, wanted):
    sigma = [[1.5, 0.3, 0], [0.3, 0.7, 0.2], [0, 0.2, 0.4]]

    def family(shots: int, queries: int) -> LinearRegression:
        return LinearRegression(3, shots, queries, covariance=sigma, theta=[1, 1, 1], **DOUBLE)

    learner = linear_learner(1 + np.array(DELTA), 0.4, **options)
    assert_mean(gradients(learner, replicates(family, 2 * learner.support_parts, 5, 200_000)), wanted)


def test_exact_variances():
    """Of so many draws the standard errors, over seeds, are 0.4 % and 0.8 %."""
    draws = gradients(linear_learner(DELTA, 0.1), replicates(isotropic(0.5), 5, 7, 100_000))
    assert total_variance(draws) == pytest.approx(2.2426655571, rel=0.02)
    draws = gradients(linear_learner(DELTA, 0.1, estimator="independent"), replicates(isotropic(0.5), 10, 7, 100_000))
    assert total_variance(draws) == pytest.approx(2.16531900, rel=0.02)
    draws = gradients(linear_learner([1.5], 0.3), replicates(isotropic(0.5, dim=1), 4, 3, 150_000))
    assert total_variance(draws) == pytest.approx(0.7043583333, rel=0.02)
    assert_mean(draws, [0.8025])


def test_a_misspecified_label_moves_the_mean():
    """y = ½(φ³ - 3φ) is uncorrelated with φ, but not with what couples the two uses of a batch."""
    batch = replicates(isotropic(dim=1), 4, 3, 400_000)
    batch = batch._replace(
        support_y=0.5 * (batch.support_x**3 - 3 * batch.support_x), query_y=0.5 * (batch.query_x**3 - 3 * batch.query_x)
    )
    assert_mean(gradients(linear_learner([0.8], 0.3), batch), [0.3605])


class SineAndCosine(nn.Module):
    """``w^T (sin x, cos x)``, which sinusoids are linear in."""

    def __init__(self, w: tuple[float, float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.cat([x.sin(), x.cos()], -1), self.weight)


def test_sinusoids_are_linear():
    def family(shots: int, queries: int) -> Sinusoid:
        return Sinusoid(shots, queries, amplitude=(2, 2), phase=(0.7, 0.7), **DOUBLE)

    learner = MAML(SineAndCosine((0.3, -0.2)), half_squared_error, inner_lr=0.4)
    draws = gradients(learner, replicates(family, 10, 10, 200_000))
    assert_mean(draws, (-0.40615483864253504, -0.4656831077085598))


def test_the_loss_without_a_half_is_the_one_with_it_at_half_the_step_and_twice_the_gradient():
    batch = LinearRegression(3, 5, 7, noise=0.1, **DOUBLE).sample(0, 6)
    half = gradients(linear_learner(DELTA, 0.2), batch)
    whole = linear_learner(DELTA, 0.1)
    whole.loss_fn = F.mse_loss
    assert_equal(gradients(whole, batch), 2 * half)


# ---- two tasks with different Σ: a floor


def two_tasks(shots: int, queries: int = 10, **options) -> LinearRegression:
    sigmas = [torch.eye(2), torch.eye(2) / 4]
    return LinearRegression(2, shots, queries, covariance=sigmas, theta=[[1, 0], [0, 1]], **DOUBLE, **options)


@pytest.mark.parametrize(
    ("m", "options", "fixed_point"),
    [
        (2, {}, (0.7600950118764845, 0.23990498812351543)),
        (5, {}, (0.6736842105263158, 0.3263157894736842)),
        (10, {}, (0.6279245283018868, 0.37207547169811317)),
        (2, {"estimator": "first-order"}, (0.6956521739130435, 0.30434782608695654)),
        (5, {"estimator": "first-order"}, (0.6956521739130435, 0.30434782608695654)),
    ],
)
def test_the_mean_meta_gradient_vanishes_at_the_biased_fixed_point(m, options, fixed_point):
    draws = gradients(linear_learner(fixed_point, 0.5, **options), two_tasks(m).sample(0, 40_000))
    assert_mean(draws.view(-1, 2, 2).mean(1), (0, 0))


def test_momentum_training_ends_at_the_biased_fixed_point():
    """Not at w* = (0.566, 0.434). Over seeds, the mean of the iterates has a standard deviation of 0.003."""
    learner = linear_learner((0.0, 0.0), 0.5)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.5, beta=0.2)
    tasks, total = two_tasks(2), torch.zeros(1, 2, dtype=torch.float64)
    for step in range(300):
        optimizer.zero_grad()
        learner.backward(tasks.sample(step, 60), workers=2)
        optimizer.step()
        total += learner.model.weight.detach() if step >= 60 else 0
    torch.testing.assert_close((total / 240)[0], torch.tensor([0.7601, 0.2399]).double(), rtol=0, atol=0.015)


def test_each_worker_can_have_a_given_task():
    members = [FixedTasks(two_tasks(3, 4), 1), FixedTasks(two_tasks(3, 4), 1)]
    ours, whole = PerWorker(members).sample(5, 2), FixedTasks(two_tasks(3, 4), 2).sample(5, 2)
    assert ours.task_ids.tolist() == [0, 1]
    for a, b in zip(ours[:5], whole[:5], strict=True):
        assert torch.equal(a, b)


# ---- draws


@pytest.mark.parametrize("dim", [3, 9, 17])
@pytest.mark.parametrize("arguments", [{}, {"spectrum": (0.1, 3.0)}, {"covariance": True}])
@pytest.mark.parametrize("population", [False, True])
def test_a_task_is_the_same_to_the_last_bit_whichever_are_drawn_with_it(dim, arguments, population):
    """Where its numbers lie in memory, which other tasks decide, must not decide the order of its sums."""
    if "covariance" in arguments:
        arguments = {"covariance": np.diag(np.arange(1.0, dim + 1)) + 0.1}
    for seed in range(3):
        tasks = LinearRegression(dim, 3, 4, seed=seed, **arguments, **DOUBLE)
        sampler = Population(tasks) if population else tasks
        together = sampler.sample(0, 6)
        for rank in range(6):
            alone = sampler.sample(0, 6, rank=rank, world_size=6)
            for ours, others in zip(alone[:4], together[:4], strict=True):
                assert torch.equal(ours[0], others[rank])


@settings(deadline=None, max_examples=40)
@given(data=st.data(), dim=st.integers(1, 6), shots=st.integers(1, 5), queries=st.integers(1, 5))
def test_points_lie_on_the_task_s_plane(data, dim, shots, queries):
    spectrum = data.draw(st.sampled_from([None, (0.1, 3.0), (0.0, 0.0)]))
    tasks = LinearRegression(
        dim, shots, queries, spectrum=spectrum, seed=data.draw(st.integers(0, 2**64 - 1)), **DOUBLE
    )
    step = data.draw(st.integers(0, 2**40))
    batch = tasks.sample(step, 6)
    theta, _ = tasks.parameters(DrawCoordinates("train", step, np.arange(6)))
    assert batch.support_x.shape == (6, shots, dim)
    assert batch.query_y.shape == (6, queries, 1)
    for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
        torch.testing.assert_close(y, x @ torch.from_numpy(theta)[..., None], rtol=0, atol=1e-12)
    for world_size in (2, 3, 6):
        blocks = [tasks.sample(step, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
        for name in ("support_x", "support_y", "query_x", "query_y"):
            assert torch.equal(torch.cat([getattr(part, name) for part in blocks]), getattr(batch, name)), name


def test_features_have_the_covariance_of_their_task():
    tasks = LinearRegression(3, 20_000, 1, spectrum=(0.5, 2), **DOUBLE)
    x = tasks.sample(0, 4).support_x
    _, sigma = tasks.parameters(DrawCoordinates("train", 0, np.arange(4)))
    spectra = np.linalg.eigvalsh(sigma)
    assert spectra.min() > 0.5
    assert spectra.max() < 2
    # of entry jk the standard error is at most λ_max √(2/N)
    assert np.abs((x.mT @ x).numpy() / 20_000 - sigma).max() < 5 * 2 * math.sqrt(2 / 20_000)


def test_rotations_are_uniform():
    """Of a uniform rotation every entry has the mean 0 and the mean square 1/d, and no two tasks have the same one."""
    _, sigma = LinearRegression(3, 1, spectrum=(1, 4)).parameters(DrawCoordinates("train", 0, np.arange(4000)))
    _, vectors = np.linalg.eigh(sigma)
    assert np.abs((vectors**2).mean(0) - 1 / 3).max() < 5 * 0.3 / math.sqrt(4000)
    assert np.abs(sigma.mean(0) - 2.5 * np.eye(3)).max() < 5 * 1.0 / math.sqrt(4000)


def test_thetas_have_their_size():
    theta, _ = LinearRegression(4, 1, theta_std=3).parameters(DrawCoordinates("train", 0, np.arange(2000)))
    assert abs(theta.std() - 3) < 5 * 3 / math.sqrt(2 * theta.size)
    assert abs(theta.mean()) < 5 * 3 / math.sqrt(theta.size)


def test_noise_moves_no_point_and_has_its_size():
    clean, noisy = (LinearRegression(3, 5, 200, noise=noise).sample(0, 50) for noise in (0, 0.3))
    assert torch.equal(clean.query_x, noisy.query_x)
    noise = noisy.query_y - clean.query_y
    assert abs(noise.std().item() - 0.3) < 5 * 0.3 / math.sqrt(2 * noise.numel())
    assert abs(noise.mean().item()) < 5 * 0.3 / math.sqrt(noise.numel())


def test_given_parts_may_lie_beside_drawn_ones():
    """Given Σ_i and drawn θ_i: tasks in turn, other planes at each step."""
    tasks = LinearRegression(2, 3, covariance=np.stack([np.eye(2), 4 * np.eye(2)]))
    (first, sigma), (second, _) = (tasks.parameters(DrawCoordinates("train", step, np.arange(4))) for step in (0, 1))
    assert sigma[:, 0, 0].tolist() == [1, 4, 1, 4]
    assert len({*first[:, 0], *second[:, 0]}) == 8


@pytest.mark.parametrize("replacement", [True, False])
def test_points_of_data_are_points_of_the_data(replacement):
    numbers = torch.arange(30.0)
    tasks = LinearRegression(
        2, 7, 10, data=(numbers.view(5, 6)[:, :2].repeat(2, 1), numbers[:10]), replacement=replacement
    )
    batch = tasks.sample(0, 50)
    labels = batch.query_y.long().squeeze(-1)
    assert torch.equal(batch.query_x, numbers.view(5, 6)[:, :2].repeat(2, 1)[labels])
    assert all((len(set(row)) == 10) is not replacement for row in labels.tolist())
    assert set(batch.support_y.flatten().tolist()) == set(range(10))


def test_every_task_can_have_its_own_data():
    features, labels = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0)), torch.arange(24.0).view(3, 8)
    tasks = LinearRegression(2, 4, 4, data=(features, labels))
    assert tasks.given == 3
    which = (tasks.sample(0, 6).support_y / 8).floor().squeeze(-1)
    assert torch.equal(which, torch.tensor([0.0, 1, 2, 0, 1, 2])[:, None].expand(6, 4))


def test_parameters_of_data_are_its_least_squares():
    theta, sigma = LinearRegression(2, 1, data=(X, Y[:, 0])).parameters(DrawCoordinates("train", 0, np.arange(3)))
    np.testing.assert_allclose(theta, [[0, 5 / 6]] * 3, atol=1e-15)
    np.testing.assert_allclose(sigma, [np.diag([0.75, 1.5])] * 3, atol=1e-15)


def test_what_was_given_is_copied():
    theta = np.ones(2)
    tasks = LinearRegression(2, 1, theta=theta)
    theta[:] = 7
    assert tasks.theta.tolist() == [[1, 1]]


def test_description_is_json_and_contains_no_mass_of_numbers():
    many = LinearRegression(2, 1, data=(torch.zeros(5000, 2), torch.zeros(5000)))
    assert len(json.dumps(many.describe())) < 1000
    assert json.loads(json.dumps(two_tasks(2).describe()))["theta"] == [[1, 0], [0, 1]]


TWO, THREE = np.stack([np.eye(2)] * 2), np.zeros((3, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be >= 1"),
        ({"shots": 0}, "shots must be >= 1"),
        ({"queries": 0}, "queries must be >= 1"),
        ({"noise": -1}, "noise is a standard deviation"),
        ({"theta_std": math.inf}, "theta_std is a standard deviation"),
        ({"covariance": np.eye(3)}, r"covariance must be \[2, 2\].*got \[3, 3\]"),
        ({"covariance": [[1, 2], [0, 1]]}, "covariance must be symmetric"),
        ({"covariance": -np.eye(2)}, "covariance must be positive semidefinite; got the eigenvalue -1"),
        ({"covariance": np.full((2, 2), math.nan)}, "covariance must be finite; got nan"),
        ({"covariance": np.eye(2), "spectrum": (1, 2)}, "Leave one out"),
        ({"covariance": TWO, "theta": THREE}, "2 of covariance, 3 of theta"),
        ({"spectrum": (2, 1)}, "spectrum must be a finite range"),
        ({"theta": [1, 2, 3]}, r"theta must be \[2\].*got \[3\]"),
        ({"data": (X, Y)}, r"data must be features \[N, 2\] and labels \[N\]"),
        ({"data": (X[:, :1], Y[:, 0])}, r"data must be features \[N, 2\]"),
        ({"data": (X[:0], Y[:0, 0])}, "data must have points"),
        ({"data": (X, Y[:, 0]), "noise": 0.1, "theta": [1, 2]}, "got data and theta, noise"),
        ({"data": (X, Y[:, 0]), "replacement": False, "shots": 5}, "at most the data's N=4 points; got 5"),
        ({"replacement": False}, "pass data="),
        ({"seed": -1}, "0 <= seed"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearRegression(**{"dim": 2, "shots": 3, "queries": 4, **arguments})


def test_a_meta_batch_has_every_given_task_equally_often():
    with pytest.raises(ValueError, match=r"each of the 2 given tasks equally often; got 3.*FixedTasks\(..., n=2\)"):
        two_tasks(2).sample(0, 3)


def test_a_loss_of_other_shapes():
    with pytest.raises(ValueError, match="one shape"):
        half_squared_error(torch.zeros(3, 1), torch.zeros(3))
