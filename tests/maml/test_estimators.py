"""Estimators of the meta-gradient: against their formulas task by task, and what they cannot work with."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_mean, gradients, point_learner, replicates
from problems import (
    WAYS,
    assert_close,
    conv4,
    generator,
    image_batch,
    mlp,
    problem,
    randomised,
    regression_batch,
    relative_error,
)
from slow_maml import slow_estimate
from torch import Tensor, nn
from torch.nn import functional as F

import metamom.maml.chunking
import metamom.maml.inner_step
from metamom import MAML, TaskBatch
from metamom.experiments.recipes import Recipe
from metamom.maml.estimators import ESTIMATORS, INNER_BATCHES, check_support, cut, memoryless_estimators, support_parts
from metamom.maml.finite_differences import difference, gradient_by_differences
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Episodes, Quadratic, Sinusoid, quadratic_loss

# the others are in test_tracking.py and test_proximal.py
STATELESS = [name for name in memoryless_estimators() if not ESTIMATORS[name].proximal]
HALVED = ["independent", "hessian-free", "cross-fit", "richardson"]
# Of differences in float64: r = 6e-6 of truncation r^2 and of rounding 1e-16/r, 1e-10 each, at derivatives of order 1.
TOLERANCES = {"hessian-free": 1e-6}


def tolerance(estimator: str) -> float:
    return TOLERANCES.get(estimator, 1e-10)


def points(estimator: str, steps: int, inner_batches: str, each: int = 2) -> int:
    return each * support_parts(estimator, steps, inner_batches)


# ---- against the formulas

STEPS = (1, 2, 3)
# of images, which take longer, every pair of an estimator, a number of steps and a choice of inner batches
PAIRS = [
    (name, estimator, steps, INNER_BATCHES[(i + steps) % 2])
    for i, (name, estimator) in enumerate([*(("Conv4", e) for e in STATELESS), ("GroupNorm", "hessian-free")])
    for steps in STEPS
]


@pytest.mark.parametrize(
    ("name", "estimator", "steps", "inner_batches"),
    [*itertools.product(["MLP"], STATELESS, STEPS, INNER_BATCHES), *PAIRS],
)
def test_agrees_with_the_formula(name, estimator, steps, inner_batches, monkeypatch):
    shots = points(estimator, steps, inner_batches)
    if name == "MLP":
        model, loss_fn, batch = randomised(mlp()), F.mse_loss, regression_batch(support=shots)
    else:
        model, loss_fn, _ = problem(name) if name == "GroupNorm" else (conv4(), F.cross_entropy, None)
        batch = image_batch(3, size=8 if name == "GroupNorm" else 28, shots=(shots, 1))
    if name == "Conv4":
        smaller_radius(monkeypatch, 0.01)
    learner = MAML(model, loss_fn, inner_lr=0.05, inner_steps=steps, estimator=estimator, inner_batches=inner_batches)
    assert learner.support_parts == support_parts(estimator, steps, inner_batches)
    compare_with_formula(learner, batch, workers=2)


def smaller_radius(monkeypatch, factor: float) -> None:
    """Of differences: so small that of thousands of ReLUs none has its kink between the two ends."""

    def closer(along: Any, hessian: Any, own: Any, others: Any, precision: float) -> Any:
        return gradient_by_differences(along, hessian, own, others, precision * factor**3)

    monkeypatch.setattr(metamom.maml.inner_step, "gradient_by_differences", closer)


OPTIONS: list[tuple[int, dict[str, Any]]] = [
    (1, {"adapt": ["2"]}),
    (3, {"adapt": ["2.weight", "4"], "learn_inner_lr": "tensor"}),
    (1, {"learn_inner_lr": "scalar"}),
    (3, {"learn_inner_lr": "entry"}),
    (3, {"chunk_size": 1}),
    (3, {"chunk_size": 4, "adapt": ["0", "4"]}),
]


@pytest.mark.parametrize(("workers", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("inner_batches", INNER_BATCHES)
@pytest.mark.parametrize("estimator", STATELESS)
def test_options_change_no_estimator(estimator, inner_batches, workers, options):
    """Workers, subsets, learned step sizes and chunks."""
    model, batch = randomised(mlp()), regression_batch(tasks=6, support=points(estimator, 2, inner_batches, 1))
    options = {"inner_steps": 2, "inner_batches": inner_batches, **options}
    learner = MAML(model, F.mse_loss, inner_lr=0.05, estimator=estimator, **options)
    learned = learner.step_sizes.learned()
    with torch.no_grad():
        for alpha in learned.values():
            alpha.mul_(torch.rand(alpha.shape, generator=generator(3)) + 0.5)
    compare_with_formula(learner, batch, workers)


@pytest.mark.parametrize(
    ("estimator", "inner_batches", "workers", "options"),
    [
        ("independent", "fresh", 2, {"inner_steps": 2, "learn_inner_lr": "scalar"}),
        ("hessian-free", "same", 2, {"adapt": ["2", "4"]}),
        ("cross-fit", "same", 2, {"chunk_size": 2}),
        ("richardson", "same", 1, {"adapt": ["2"], "learn_inner_lr": "tensor"}),
    ],
)
def test_traced_agrees_with_the_formula(estimator, inner_batches, workers, options, traced):
    model, steps = randomised(mlp()), options.get("inner_steps", 1)
    learner = MAML(
        model, F.mse_loss, inner_lr=0.05, estimator=estimator, inner_batches=inner_batches, compile=True, **options
    )
    for seed in (0, 7):
        compare_with_formula(learner, regression_batch(seed, support=points(estimator, steps, inner_batches)), workers)
    assert len(traced) == 1


def compare_with_formula(learner: MAML, batch: TaskBatch, workers: int) -> None:
    result = learner.meta_gradient(batch, workers)
    for i, part in enumerate(batch.split(workers)):
        expected, losses = slow_estimate(
            learner.model,
            learner.loss_fn,
            part,
            learner.estimator,
            steps=learner.inner_steps,
            fresh=learner.inner_batches == "fresh",
            inner_lr=0.05,
            adapted=learner.adapted,
            learned=learner.step_sizes.learned(),
        )
        assert_close({n: g[i] for n, g in result.grads.items()}, expected, tolerance(learner.estimator))
        torch.testing.assert_close(result.losses.view(workers, -1)[i], losses, rtol=1e-10, atol=1e-12)


def test_the_estimators_differ():
    """Else the comparisons above would prove little."""
    model, batch = randomised(mlp()), regression_batch(support=12)
    found = [
        MAML(model, F.mse_loss, inner_lr=0.05, inner_steps=2, estimator=e, inner_batches=i).meta_gradient(batch).grads
        for e in STATELESS
        for i in INNER_BATCHES
        if e != "hessian-free"
    ]
    assert min(relative_error(a, b) for a, b in itertools.combinations(found, 2)) > 1e-3


@pytest.mark.parametrize("chunk_size", [None, 3, "auto"])
@pytest.mark.parametrize("estimator", HALVED)
def test_backward_of_the_losses_is_backward(estimator, chunk_size, monkeypatch):
    monkeypatch.setattr(metamom.maml.chunking, "BUDGET", 100_000)
    model, batch = randomised(mlp()), regression_batch(support=6)
    learner = MAML(model, F.mse_loss, inner_lr=0.05, inner_steps=2, estimator=estimator, chunk_size=chunk_size)
    learner.losses(batch).mean().backward()
    by_hand = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    result = learner.backward(batch, workers=2)
    assert_close({n: p.grad for n, p in model.named_parameters()}, by_hand)
    with torch.no_grad():
        assert result.loss.item() == pytest.approx(float(learner.losses(batch).mean()), rel=1e-12)


@pytest.mark.parametrize("estimator", STATELESS)
def test_losses_and_accuracy_are_of_plain_adaptation(estimator):
    """On the points that the first inner steps go along; `adapt` itself takes all that it is given."""
    model, loss_fn, batch = problem("BatchNorm2d")
    learner = MAML(model, loss_fn, inner_lr=0.3, inner_steps=3, estimator=estimator)
    half = estimator in ("independent", "hessian-free", "cross-fit")
    along = batch.support_x.shape[1] // (2 if half else 1)
    with torch.no_grad():
        adapted = learner.adapt(batch.support_x[:, :along], batch.support_y[:, :along])
        scores = learner.predict(adapted, batch.query_x)
    losses = torch.func.vmap(loss_fn)(scores, batch.query_y)
    result = learner.backward(batch)
    assert float(result.loss) == pytest.approx(float(losses.mean()), rel=1e-10)
    assert result.metrics["accuracy"] == pytest.approx(float((scores.argmax(-1) == batch.query_y).double().mean()))
    plain = MAML(model, loss_fn, inner_lr=0.3).adapt(batch.support_x, batch.support_y, steps=2)
    ours = learner.adapt(batch.support_x, batch.support_y, steps=2)
    assert_close({n: w.detach() for n, w in ours.items()}, {n: w.detach() for n, w in plain.items()}, 1e-15)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), estimator=st.sampled_from(list(ESTIMATORS)), inner_batches=st.sampled_from(INNER_BATCHES))
def test_cutting(data, estimator, inner_batches):
    """Every support point is used, in each step of each adaptation the same number; copies of a task are neighbours."""
    tasks, steps, each = (data.draw(st.integers(1, 4)) for _ in range(3))
    support = points(estimator, steps, inner_batches, each)
    x = torch.arange(tasks * support).view(tasks, support)
    batch = TaskBatch(x, x, x[:, :1], x[:, :1])
    terms = cut(batch, estimator, steps, inner_batches)
    assert sum(term.weight * term.copies for term in terms) == 1
    for term in terms:
        assert len(term.steps) == steps
        assert term.query_x.tolist() == x[:, :1].repeat_interleave(term.copies, 0).tolist()
        for step in term.steps:
            used = [step.x] if step.hessian is None else [step.x, step.hessian[0]]
            for points_of_it in used:
                assert (points_of_it // support == torch.arange(tasks).repeat_interleave(term.copies)[:, None]).all()
            assert torch.equal(step.x, step.y)
    batches = [x for term in terms for step in term.steps for x in (step.x, *(step.hessian or ()))]
    assert set(torch.cat([x.flatten() for x in batches]).tolist()) == set(range(tasks * support))


@pytest.mark.parametrize("estimator", HALVED)
@pytest.mark.parametrize("inner_batches", INNER_BATCHES)
def test_parts_of_episodes_are_balanced(estimator, inner_batches):
    parts = support_parts(estimator, 3, inner_batches)
    images, labels = torch.rand(40, 1, 2, 2, generator=generator(0)), torch.arange(4).repeat_interleave(10)
    batch = Episodes(images, labels, ways=3, shots=parts, queries=1).sample(0, 4)
    check_support(batch, estimator, 3, inner_batches)
    labels = batch.support_y.view(4, parts, 3)
    assert torch.equal(labels, torch.arange(3).expand(4, parts, 3))


# ---- Hessian-free


def quartic(own: dict[str, Tensor], others: dict[str, Tensor]) -> Tensor:
    """``a u²/2 + c u⁴/4 + k u``, of one number a task."""
    u = own["u"]
    return 1.5 * u**2 / 2 + 0.5 * u**4 / 4 + others["k"] * u if others else 1.5 * u**2 / 2 + 0.5 * u**4 / 4


@pytest.mark.parametrize("r", [0.3, 0.1, 0.01])
def test_the_error_of_differences(r):
    """It is c r² v exactly, and at most ρδv²/2 with ρ the Lipschitz constant of the Hessian between the two ends."""
    u = torch.tensor([0.3, -1.3, 2.0], dtype=torch.float64)
    v = torch.tensor([0.7, -2.0, 1e-9], dtype=torch.float64)
    along, _ = difference(quartic, {"u": u}, {}, {"u": v}, r**3)
    radius = r * u.abs().clamp(min=1)
    error = along["u"] - (1.5 + 1.5 * u**2) * v
    torch.testing.assert_close(error, 0.5 * radius**2 * v, rtol=1e-9, atol=1e-20)
    rho, delta = 3 * (u.abs() + radius), radius / v.abs()
    assert (error.abs() <= rho * delta * v**2 / 2).all()


def test_differences_task_by_task():
    """What tasks share gets the sum, whatever the sizes of their directions; no direction gives zero."""
    u = torch.tensor([0.3, -1.3, 2.0], dtype=torch.float64)
    for v in torch.tensor([[0.7, -200.0, 1e-9], [1.0, 0.0, 1e12]], dtype=torch.float64):
        along, mixed = difference(quartic, {"u": u}, {"k": torch.ones((), dtype=torch.float64)}, {"u": v}, 2e-16)
        torch.testing.assert_close(along["u"], (1.5 + 1.5 * u**2) * v, rtol=1e-9, atol=0)
        torch.testing.assert_close(mixed["k"], v.sum(), rtol=1e-9, atol=0)
    along, mixed = difference(quartic, {"u": u}, {"k": u}, {"u": 0 * v}, 2e-16)
    assert not along["u"].any()
    assert not mixed["k"].any()


def test_hessian_free_is_exact_on_quadratics_up_to_rounding():
    batch = replicates(one_task(0.5, 0.7), 4, 3, 100)
    exact, free = (gradients(point_learner(W, ALPHA, estimator=e), batch) for e in ("independent", "hessian-free"))
    torch.testing.assert_close(free, exact, rtol=0, atol=1e-8)


def test_hessian_free_keeps_no_second_order_graph(monkeypatch):
    graphs, grad = [], torch.autograd.grad

    def noting(*args: Any, **kwargs: Any) -> Any:
        graphs.append(kwargs.get("create_graph", False))
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", noting)
    for estimator, second_order in (("hessian-free", False), ("independent", True)):
        graphs.clear()
        MAML(mlp().double(), F.mse_loss, inner_steps=2, estimator=estimator).meta_gradient(regression_batch(support=4))
        assert any(graphs) is second_order


def test_hessian_free_in_float32():
    """r = 5e-3 |u|: truncation and rounding are of 1e-5 each at derivatives of order 1."""
    model = SinusoidMLP((8, 8), generator=generator(0))
    batch = Sinusoid(shots=10, seed=3).sample(0, 8)
    learners = [MAML(model, F.mse_loss, inner_lr=0.01, estimator=e) for e in ("hessian-free", "first-order")]
    free, first_order = (learner.meta_gradient(batch).grads for learner in learners)
    exact = MAML(model, F.mse_loss, inner_lr=0.01, estimator="independent").meta_gradient(batch).grads
    assert relative_error(free, exact) < 1e-2 * relative_error(first_order, exact) + 1e-3


# ---- quadratics with noise in the Hessian: no bias without coupling

A = torch.tensor([[1.0, 0.3], [0.3, -0.4]], dtype=torch.float64)
C, W, ALPHA = (0.5, -1.0), (1.5, 1.0), 0.4
M = torch.eye(2, dtype=torch.float64) - ALPHA * A
DELTA = torch.tensor(W, dtype=torch.float64) - torch.tensor(C, dtype=torch.float64)


def one_task(gradient_noise: float, hessian_noise: float):
    def family(shots: int, queries: int) -> Quadratic:
        noises = {"gradient_noise": gradient_noise, "hessian_noise": hessian_noise}
        return Quadratic(2, shots, queries, hessian=A, center=C, dtype=torch.float64, **noises)

    return family


@pytest.mark.parametrize("estimator", HALVED)
def test_no_bias_from_the_hessian_s_noise(estimator):
    """Where the exact estimator has (α²s²/m)(A + tr(A) I)δ, more than 15 standard errors of as many draws."""
    draws = gradients(point_learner(W, ALPHA, estimator=estimator), replicates(one_task(0.5, 0.7), 4, 5, 50_000))
    assert_mean(draws, A @ M @ M @ DELTA)


@pytest.mark.parametrize("estimator", ["independent", "cross-fit"])
def test_no_bias_along_fresh_batches(estimator):
    learner = point_learner(W, ALPHA, estimator=estimator, inner_steps=2, inner_batches="fresh")
    draws = gradients(learner, replicates(one_task(0.5, 0.7), 8, 5, 50_000))
    assert_mean(draws, A @ torch.linalg.matrix_power(M, 4) @ DELTA)


def test_curvature_is_a_bias_of_its_own():
    """A quartic loss: the independent estimator has a bias, Richardson's has none at the order 1/m."""

    def loss(predictions: Tensor, targets: Tensor) -> Tensor:
        return quadratic_loss(predictions, targets) + 0.5 / 4 * (predictions**4).mean()

    # ±s/√m for the mean slope of m points: the meta-gradient is a cubic in it, so that two points stand for N(0, s²/m)
    signs = torch.tensor(list(itertools.product((1, -1), repeat=2)), dtype=torch.float64)
    batch = Quadratic(1, 2, 1, center=[0], dtype=torch.float64).sample(0, 4)
    batch.support_y[..., 2] = 0.8 * signs[..., None]
    population, at_m_1 = 0.32121200037905545, 0.001845871872 * 5
    means = {e: float(gradients(point_learner([1.3], 0.2, loss, estimator=e), batch).mean()) for e in STATELESS}
    assert means["independent"] == pytest.approx(population + at_m_1, abs=1e-12)
    assert means["cross-fit"] == pytest.approx(population + at_m_1, abs=1e-12)
    assert means["exact"] == pytest.approx(population + at_m_1 / 2, abs=1e-12)
    assert means["richardson"] == pytest.approx(population, abs=1e-12)


# ---- compiled, in half precision


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.slow
def test_torchinductor_agrees():
    """Of one that has more in its graph than derivatives; the others' graphs are in `test_traced_...`."""
    model, batch = randomised(SinusoidMLP((3,))), regression_batch(tasks=2, support=4, dim=1)
    eager, compiled = (MAML(model, F.mse_loss, estimator="hessian-free", compile=c) for c in (False, True))
    for _ in range(2):
        ours, theirs = compiled.meta_gradient(batch, 2), eager.meta_gradient(batch, 2)
        assert_close(ours.grads, theirs.grads, 1e-8)
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-10, atol=0)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)


@pytest.mark.parametrize("estimator", STATELESS)
def test_bfloat16(estimator):
    """Of 8 bits, after up to three passes."""
    model, batch = SinusoidMLP((16,), generator=generator(0)), Sinusoid(shots=8).sample(0, 8)
    exact = MAML(model, F.mse_loss, estimator=estimator).meta_gradient(batch).grads
    ours = MAML(model, F.mse_loss, estimator=estimator, autocast=torch.bfloat16).meta_gradient(batch).grads
    assert 0 < relative_error(ours, exact) < 0.1


# ---- refusals


@pytest.mark.parametrize(
    ("options", "support", "message"),
    [
        (
            {"estimator": "independent"},
            5,
            r"estimator 'independent' takes its inner batches from 2 equal parts of the support set; got 5 support "
            r"points\. Use shots=6, or another multiple of 2",
        ),
        ({"estimator": "richardson"}, 1, r"2 equal parts of the support set; got 1 support points\. Use shots=2"),
        (
            {"inner_batches": "fresh", "inner_steps": 3},
            5,
            r"estimator 'exact' with 3 fresh inner batches takes them from 3 equal parts.*Use shots=6",
        ),
        (
            {"estimator": "cross-fit", "inner_batches": "fresh", "inner_steps": 2},
            6,
            r"'cross-fit' with 2 fresh inner batches takes them from 4 equal parts.*got 6 support points\. Use shots=8",
        ),
    ],
)
def test_a_support_set_that_cannot_be_cut(options, support, message):
    learner, batch = MAML(mlp().double(), F.mse_loss, **options), regression_batch(support=support)
    for call in (learner.meta_gradient, learner.backward, learner.losses):
        with pytest.raises(ValueError, match=message):
            call(batch)
    learner.adapt(batch.support_x, batch.support_y)
    assert all(p.grad is None for p in learner.parameters())


def test_classes_that_a_part_lacks():
    """4-way 1-shot has an even number of points, but each half has two classes of four."""
    images, labels = torch.rand(40, 4, generator=generator(0)), torch.arange(4).repeat_interleave(10)
    learner = MAML(nn.Linear(4, 4), F.cross_entropy, estimator="independent")
    message = r"every class in each; got 1 shots of 4 classes, some of which are missing.*Use shots=2, or"
    with pytest.raises(ValueError, match=message):
        learner.meta_gradient(Episodes(images, labels, ways=4, shots=1, queries=1).sample(0, 2))
    learner.meta_gradient(Episodes(images, labels, ways=4, shots=2, queries=1).sample(0, 2))
    sorted_by_class = image_batch(tasks=2, size=2, shots=(2, 1))
    sorted_by_class = sorted_by_class._replace(support_y=sorted_by_class.support_y.sort(1).values)
    with pytest.raises(ValueError, match="ordered shot by shot"):
        MAML(nn.Sequential(nn.Flatten(), nn.Linear(4, WAYS)).double(), F.cross_entropy, estimator="cross-fit").losses(
            sorted_by_class
        )


def test_differences_of_a_model_that_draws():
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    batch = regression_batch(support=4)
    learner = MAML(model, F.mse_loss, estimator="hessian-free")
    with pytest.raises(ValueError, match=r"must not draw random numbers.*Call model\.eval\(\), or use"):
        learner.meta_gradient(batch)
    MAML(model, F.mse_loss, estimator="independent").meta_gradient(batch)
    model.eval()
    learner.meta_gradient(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "crossfit"}, "estimator must be one of exact, independent, .*perturbed; got 'crossfit'"),
        ({"inner_batches": "new"}, "inner_batches must be one of same, fresh; got 'new'"),
    ],
)
def test_unknown_names(options, message):
    with pytest.raises(ValueError, match=message):
        MAML(nn.Linear(1, 1), F.mse_loss, **options)
    with pytest.raises(ValueError, match=message):
        Recipe("sinusoid", **options)


# ---- recipes


@pytest.mark.parametrize(("split", "shots"), [("train", 36), ("validation", 6), ("test", 6)])
def test_the_training_sampler_supplies_the_extra_batches(split, shots):
    recipe = Recipe("sinusoid", shots=6, inner_steps=3, estimator="richardson", inner_batches="fresh")
    batch = recipe.sampler(split).sample(0, 2)
    assert batch.support_x.shape[1] == shots
    learner = recipe.learner()
    assert learner.describe()["inner_batches"] == "fresh"
    assert learner.support_parts * 6 == 36


def test_settings_are_part_of_what_is_compiled(traced):
    learner = MAML(nn.Linear(2, 1).double(), F.mse_loss, inner_steps=2, compile=True)
    batch = regression_batch(support=4)
    learner.meta_gradient(batch)
    learner.inner_batches = "fresh"
    fresh = learner.meta_gradient(batch).grads
    assert len(traced) == 2
    plain = MAML(learner.model, F.mse_loss, inner_steps=2, inner_batches="fresh")
    assert_close(fresh, plain.meta_gradient(batch).grads, 1e-12)
