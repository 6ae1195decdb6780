"""Momentum and Adam inside: against loops over tasks, torch's own optimizers, and closed forms."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metamom
from metamom import MAML, CompositeMomentum, TaskBatch, evaluate, train
from metamom.experiments.recipes import Recipe
from metamom.maml import BOIL, InnerAdam, InnerSGD, Reptile
from metamom.maml.annealing import step_weights
from metamom.maml.inner_optimizer import as_inner_optimizer
from metamom.tasks import Sinusoid

SPECS = ["momentum:0.9", "nesterov:0.8", "adam", "adam:beta1=0.5,beta2=0.9,eps=0.01", "adam:eps_root=1e-4"]
STEPS, ALPHA = 3, 0.05
TASKS = Sinusoid(shots=5, queries=4)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def sample(step: int = 0, tasks: int = 4) -> TaskBatch:
    return TASKS.sample(step, tasks).to("cpu", torch.float64)


def made(spec: Any, model: nn.Module | None = None, **options: Any) -> MAML:
    options = {"inner_lr": ALPHA, "inner_steps": STEPS} | options
    return MAML(network() if model is None else model, F.mse_loss, inner_optimizer=spec, **options)


def textbook_steps(spec: str, weights: list[Tensor], gradients: Any, alphas: list[list[Any]]) -> list[list[Tensor]]:
    """The weights after 0, 1, ... steps, by each optimizer's formulas; entries of Adam's gradients are not 0."""
    o, found = as_inner_optimizer(spec), [weights]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for j, alpha in enumerate(alphas, 1):
        new = []
        for i, (w, g) in enumerate(zip(found[-1], gradients(found[-1]), strict=True)):
            if isinstance(o, InnerSGD):
                first[i] = o.momentum * first[i] + g
                step = g + o.momentum * first[i] if o.nesterov else first[i]
            else:
                first[i] = o.beta1 * first[i] + (1 - o.beta1) * g
                second[i] = o.beta2 * second[i] + (1 - o.beta2) * g**2
                m, v = first[i] / (1 - o.beta1**j), second[i] / (1 - o.beta2**j)
                step = m / ((v + o.eps_root).sqrt() + o.eps)
            new.append(w - alpha[i] * step)
        found.append(new)
    return found


def slow(
    model: nn.Module, batch: TaskBatch, spec: str, alphas: Any = ALPHA, weights: Any = None, first_order: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the mean query loss in the model's weights and in the tensors of ``alphas``, task by task."""
    names, start = zip(*((n, p.detach().clone().requires_grad_()) for n, p in model.named_parameters()), strict=True)
    leaves = [a.detach().clone().requires_grad_() for a in alphas] if isinstance(alphas, list) else []
    by_step = [[a[j] if a.shape == (STEPS,) else a for a in leaves] or [alphas] * len(names) for j in range(STEPS)]
    total = torch.zeros((), dtype=torch.float64)
    for x, y, query_x, query_y in zip(*batch[:4], strict=True):

        def loss(at: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(functional_call(model, dict(zip(names, at, strict=True)), (x,)), y)

        def gradients(at: list[Tensor], x: Tensor = x, y: Tensor = y) -> Any:
            return torch.autograd.grad(loss(at, x, y), at, create_graph=not first_order)

        _, *after = textbook_steps(spec, list(start), gradients, by_step)
        for weight, at in zip(weights or [0.0] * (STEPS - 1) + [1.0], after, strict=True):
            total = total + weight * loss(at, query_x, query_y) / batch.num_tasks
    found = torch.autograd.grad(total, [*start, *leaves])
    return list(found[: len(start)]), list(found[len(start) :])


@pytest.mark.parametrize("options", [{}, {"vectorize": "loop"}, {"chunk_size": 1}, {"compile": True}])
@pytest.mark.parametrize("spec", SPECS)
def test_three_outer_steps_are_those_of_a_loop_over_tasks(spec, options, traced):
    learner = made(spec, **options)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.05)
    for k in range(3):
        expected, _ = slow(copy.deepcopy(learner.model), sample(k), spec)
        optimizer.zero_grad()
        learner.backward(sample(k), workers=2)
        for p, grad in zip(learner.model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-10)
        optimizer.step()


@pytest.mark.parametrize("kind", ["tensor", "tensor-step", "entry"])
@pytest.mark.parametrize("spec", ["nesterov:0.8", "adam"])
def test_learned_step_sizes_and_losses_after_each_step(spec, kind):
    """The second of three iterations of an annealed multi-step loss."""
    learner = made(spec, learn_inner_lr=kind, multi_step=3)
    learner.backward(sample())
    learner.zero_grad()
    learner.backward(sample(1))
    weights, learned = learner.meta_parameters(), learner.step_sizes.learned()
    model, alphas = slow(learner.model, sample(1), spec, list(learned.values()), step_weights(1, 3, STEPS))
    expected = dict(zip(weights, [*model, *alphas], strict=True))
    assert_close({name: p.grad for name, p in weights.items()}, expected, 1e-10)


@pytest.mark.parametrize("spec", SPECS)
def test_first_order(spec):
    learner = made(spec, estimator="first-order")
    expected, _ = slow(learner.model, sample(), spec, first_order=True)
    found = {name: grad[0] for name, grad in learner.meta_gradient(sample()).grads.items()}
    assert_close(found, dict(zip(learner.adapted, expected, strict=True)), 1e-10)


def torchs(spec: str, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> list[dict[str, Tensor]]:
    """The weights after 1, 2, ... steps of torch's optimizer on one task."""
    o, model, found = as_inner_optimizer(spec), copy.deepcopy(model), []
    if isinstance(o, InnerSGD):
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=ALPHA, momentum=o.momentum, nesterov=o.nesterov)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=ALPHA, betas=(o.beta1, o.beta2), eps=o.eps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return found


@pytest.mark.parametrize("spec", SPECS[:4])
def test_steps_are_those_of_torchs_optimizers(spec):
    """Also in a test of more steps than in training, in `evaluate`, and with a weight that the loss does not reach."""
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    learner, batch = made(spec, model), sample()
    wanted = [torchs(spec, model, x, y, 7) for x, y in zip(*batch[:2], strict=True)]
    _, *found = learner.trajectory(*batch[:2], steps=7)
    for j, weights in enumerate(found):
        for name, w in weights.items():
            torch.testing.assert_close(w, torch.stack([each[j][name] for each in wanted]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(learner.adapt(*batch[:2], steps=7), found[-1])
    losses = [
        [F.mse_loss(functional_call(model, each[j - 1], (x,)), y).item() for j in (1, 7)]
        for each, x, y in zip(wanted, *batch[2:4], strict=True)
    ]
    tasks = Given(batch)
    torch.testing.assert_close(evaluate(learner, tasks, tasks=4, steps=(1, 7)).values.T.tolist(), losses)
    module = learner.fit(batch.support_x[0], batch.support_y[0], steps=7)
    torch.testing.assert_close(dict(module.named_parameters()), wanted[0][6], rtol=1e-12, atol=1e-12)


class Given(metamom.TaskSampler):
    """The same tasks whatever is asked for."""

    def __init__(self, batch: TaskBatch) -> None:
        self.batch = batch

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        return self.batch


# ---- closed forms on a quadratic, L(u) = h/2 (u - c)^2


def scalar(
    h: float, c: float, query: tuple[float, float], w: float, halves: float = 0.0
) -> tuple[nn.Module, TaskBatch]:
    """A model u * x of one weight, and one task. Half B of the support set has the curvature ``h + halves``."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, w)

    def points(*of: tuple[float, float]) -> tuple[Tensor, Tensor]:  # mean((u x - y)^2) has h = 2 x^2
        x = torch.tensor([[[(h / 2) ** 0.5] for h, _ in of]], dtype=torch.float64)
        return x, x * torch.tensor([[[c] for _, c in of]], dtype=torch.float64)

    return model, TaskBatch(*points((h, c), (h + halves, c)), *points(query))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("estimator", ["exact", "independent", "cross-fit", "hessian-free"])
def test_momentum_on_a_quadratic(nesterov, estimator):
    """The state (u - c, b) is multiplied by a matrix M in each step, so du_J/dw is an entry of M^J; B's M in others."""
    h, other, c, mu, J, w = 0.7, 1.1, 0.4, 0.9, 4, 2.0
    q, cq = 1.3, -0.2

    def moved(h: float) -> float:
        ahead = torch.tensor([[1 - ALPHA * h, -ALPHA * mu], [h, mu]], dtype=torch.float64)
        if nesterov:  # u - alpha (g + mu (mu b + g))
            ahead[0] = torch.tensor([1 - ALPHA * h * (1 + mu), -ALPHA * mu**2], dtype=torch.float64)
        return float(torch.linalg.matrix_power(ahead, J)[0, 0])

    model, batch = scalar(h, c, (q, cq), w, other - h)
    spec = InnerSGD(mu, nesterov=nesterov)
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA, inner_steps=J, estimator=estimator, inner_optimizer=spec)

    def at(h: float) -> float:
        return q * (c + moved(h) * (w - c) - cq)

    both = (h + other) / 2
    wanted = {
        "exact": moved(both) * at(both),
        "independent": moved(other) * at(h),
        "cross-fit": (moved(other) * at(h) + moved(h) * at(other)) / 2,
        "hessian-free": moved(other) * at(h),
    }[estimator]
    found = learner.meta_gradient(batch).grads["weight"].item()
    assert found == pytest.approx(wanted, rel=1e-6 if estimator == "hessian-free" else 1e-12)


@pytest.mark.parametrize(
    ("w", "eps", "eps_root"), [(2.0, 1e-8, 0.0), (2.0, 0.5, 0.1), (0.4, 1e-3, 0.0), (0.4, 0.1, 0.2)]
)
def test_adam_on_a_quadratic(w, eps, eps_root):
    """One step: ``u = w - alpha g / (sqrt(g^2 + r) + eps)``, with its derivative also where g is exactly 0 (w = c)."""
    h, c, q, cq = 0.5, 0.4, 1.3, -0.2
    model, batch = scalar(h, c, (q, cq), w)
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA, inner_optimizer=InnerAdam(eps=eps, eps_root=eps_root))
    g = h * (w - c)
    root = (g**2 + eps_root) ** 0.5
    slope = (eps + eps_root / root if root else eps) / (root + eps) ** 2
    wanted = (1 - ALPHA * h * slope) * q * (w - ALPHA * g / (root + eps) - cq)
    assert learner.meta_gradient(batch).grads["weight"].item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("options", [{}, {"vectorize": "loop"}, {"compile": True}])
def test_dead_units_do_not_spoil_adam(options, traced):
    """Their gradients are exactly 0 in all steps, where automatic differentiation of a root gives NaN."""
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    nn.init.constant_(model[0].bias, -100.0)
    nn.init.constant_(model[0].bias[:2], 1.0)
    grads = made("adam", model, **options).meta_gradient(sample()).grads
    assert all(grad.isfinite().all() for grad in grads.values())
    alive = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    state = {n: p[..., :2] if n == "2.weight" else p if n == "2.bias" else p[:2] for n, p in model.state_dict().items()}
    alive.load_state_dict(state)
    wanted = made("adam", alive).meta_gradient(sample()).grads
    for name, grad in wanted.items():
        each = grads[name][..., :2] if name == "2.weight" else grads[name] if name == "2.bias" else grads[name][:, :2]
        torch.testing.assert_close(each, grad, rtol=1e-10, atol=1e-12)


# ---- other learners and options


def test_reptile_moves_to_where_torchs_adam_ends():
    model, batch = network(), sample(tasks=1)
    learner = Reptile(model, F.mse_loss, inner_lr=ALPHA, inner_steps=4, inner_optimizer="adam", train_on="support")
    end = torchs("adam", model, batch.support_x[0], batch.support_y[0], 4)[-1]
    wanted = {name: (p - end[name]).unsqueeze(0) for name, p in model.named_parameters()}
    assert_close(learner.meta_gradient(batch).grads, wanted, 1e-10)


@pytest.mark.parametrize("spec", ["momentum:0.9", "adam:eps=0.01"])
def test_norms_by_step_and_boil(spec):
    """Batched and in a loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 1))
    for kind, options in ((MAML, {"step_norms": True}), (BOIL, {})):
        both = [
            kind(
                model.double(),
                F.mse_loss,
                inner_lr=ALPHA,
                inner_steps=2,
                inner_optimizer=spec,
                vectorize=way,
                **options,
            )
            for way in ("vmap", "loop")
        ]
        found, wanted = (each.meta_gradient(sample(), workers=2).grads for each in both)
        assert_close(found, wanted, 1e-10)


def test_copies_and_records():
    learner = made("nesterov:0.8")
    assert learner.describe()["inner_optimizer"] == "nesterov:0.8"
    assert "inner_optimizer=nesterov:0.8" in repr(learner).replace("'", "")
    for other in (learner.like(), copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert other.inner_optimizer == InnerSGD(0.8, nesterov=True)
    assert "inner_optimizer" not in made("sgd").describe()
    with pytest.raises(AttributeError, match="inner_optimizer is fixed when a learner is made"):
        learner.inner_optimizer = None


def test_a_run_has_it_and_goes_on(tmp_path):
    for spec, options in (("adam:eps=0.01", {}), ("momentum:0.5", {"estimator": "richardson"})):
        run = tmp_path / spec.partition(":")[0]
        for iterations in (1, 2):
            learner = made(spec, network().float(), **options)
            sampler = Sinusoid(shots=4, queries=4)
            optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
            train(learner, optimizer, sampler, iterations=iterations, meta_batch=2, run_dir=run, resume=True)
        loaded = metamom.load(run, model=network().float()).learner
        assert loaded.inner_optimizer == learner.inner_optimizer
        found, wanted = (each.adapt(*sampler.sample(0, 2)[:2], steps=4) for each in (loaded, learner))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        other = made("sgd", network().float(), **options)
        optimizer = CompositeMomentum(other.parameters(), lr=0.01)
        with pytest.raises(ValueError, match="inner_optimizer"):
            train(other, optimizer, sampler, iterations=3, meta_batch=2, run_dir=run, resume=True)
    recipe = Recipe("sinusoid", inner_optimizer="adam:eps=1e-2", inner_steps=2)
    assert recipe.inner_optimizer == "adam:eps=0.01"
    assert recipe.learner().inner_optimizer == InnerAdam(eps=0.01)
    assert Recipe.from_settings(recipe.settings()) == recipe
    assert Recipe("sinusoid", inner_optimizer="sgd") == Recipe("sinusoid")


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (None, InnerSGD()),
        ("sgd", InnerSGD()),
        ("momentum:0", InnerSGD()),
        (" momentum: .90", InnerSGD(0.9)),
        ("nesterov:0.9", InnerSGD(0.9, nesterov=True)),
        ("adam", InnerAdam()),
        ("adam:eps_root=1e-8, beta1=0", InnerAdam(beta1=0, eps_root=1e-8)),
        ("adam:beta2=0.123456789012", InnerAdam(beta2=0.123456789012)),
    ],
)
def test_specs(spec, found):
    assert as_inner_optimizer(spec) == found
    assert as_inner_optimizer(found.spec) == found == as_inner_optimizer(found)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adan", "inner_optimizer must be sgd, momentum:0.9, .*; got 'adan'; did you mean adam"),
        ("sgd:0.9", "inner_optimizer must be sgd, momentum"),
        ("momentum", "inner_optimizer 'momentum' needs its momentum: momentum:0.9"),
        ("momentum:1", r"the momentum of inner steps must be in \[0, 1\); got 1"),
        ("momentum:big", "wanted a number"),
        ("nesterov:0", "Nesterov's form of inner steps needs a momentum > 0"),
        ("adam:", "wanted options of adam once each"),
        ("adam:beta=0.9", "They are beta1, beta2, eps, eps_root; did you mean beta"),
        ("adam:eps=1,eps=1", "wanted options of adam once each"),
        ("adam:eps=0", "eps of Adam's inner steps must be > 0 and finite; got 0"),
        ("adam:eps_root=-1", "eps_root of Adam's inner steps must be >= 0 and finite; got -1"),
        ("adam:beta1=1", r"beta1 of Adam's inner steps must be in \[0, 1\); got 1"),
        (torch.optim.Adam, "inner_optimizer must be a text, such as sgd"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises((ValueError, TypeError), match=message):
        made(spec)


@pytest.mark.parametrize(
    ("spec", "estimator", "message"),
    [
        ("adam", "implicit", "adapts by solving a proximal problem"),
        ("momentum:0.9", "perturbed", "adapts by solving a proximal problem"),
        ("momentum:0.9", "moml", "averages the results of one plain inner step"),
        ("adam", "independent", "multiplies by Hessians of other points.* got inner_optimizer='adam'"),
        ("adam", "cross-fit", "multiplies by Hessians of other points"),
        ("adam", "hessian-free", "multiplies by Hessians of other points"),
    ],
)
def test_estimators_that_it_does_not_fit(spec, estimator, message):
    with pytest.raises(ValueError, match=message):
        made(spec, inner_steps=1, estimator=estimator)
    tasks = 4 if estimator == "moml" else None
    with pytest.raises(ValueError, match=message):
        Recipe("sinusoid", inner_optimizer=spec, estimator=estimator, fixed_tasks=tasks)
    if estimator not in ("moml", "implicit", "perturbed"):
        learner = made(spec)
        with pytest.raises(ValueError, match=message):
            learner.estimator = estimator
