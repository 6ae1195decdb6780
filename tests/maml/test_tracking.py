"""Inner tracking: against its formulas visit by visit, what the memory does, and where it makes momentum end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracles import assert_mean, linear_learner
from problems import assert_close, generator, mlp, randomised, regression_batch, relative_error
from slow_maml import slow_tracked
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, TaskBatch, cli, evaluate, train
from metamom.experiments.recipes import Recipe
from metamom.maml.checks.batch_checks import NonFiniteDataError
from metamom.maml.estimators import tracked_estimators
from metamom.maml.tracking import moml, scsc
from metamom.nets.models import SinusoidMLP
from metamom.tasks import FixedTasks, LinearRegression, PerWorker, Sinusoid
from metamom.theory import regression
from metamom.theory.designs import Gaussian
from metamom.theory.fixed_points import bias_floor
from metamom.training.checkpoints import Checkpoints, load

INDEPENDENT = ["moml", "scsc"]

TRACKED = tracked_estimators()


def learner_of(estimator: str, **options: Any) -> MAML:
    model = randomised(mlp())
    return MAML(model, F.mse_loss, **{"inner_lr": 0.05, "estimator": estimator, "tracking": 0.3, **options})


def visits(steps: int, *, n: int = 6, tasks: int = 3, support: int = 6) -> list[TaskBatch]:
    """Batches of a few of n tasks, with points that are new at each visit."""
    batches = []
    for k in range(steps):
        ids = torch.randperm(n, generator=generator(k))[:tasks]
        batches.append(regression_batch(10 * k, tasks=tasks, support=support)._replace(task_ids=ids))
    return batches


def move(learner: MAML, k: int) -> None:
    """The weights, as far as an outer step would."""
    with torch.no_grad():
        for i, p in enumerate(learner.model.parameters()):
            p.add_(0.2 * torch.randn(p.shape, generator=generator(100 * k + i), dtype=p.dtype))


def state(learner: MAML) -> dict[str, Any]:
    return copy.deepcopy(learner.state_dict()["memory._extra_state"])


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Bit for bit."""
    assert torch.equal(a["ids"], b["ids"])
    assert list(a["tensors"]) == list(b["tensors"])
    for key, kept in a["tensors"].items():
        assert torch.equal(kept, b["tensors"][key]), f"{key} differs"


# ---- against the formulas


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (1, {}),
        (3, {}),
        (1, {"chunk_size": 2}),
        (3, {"chunk_size": 1}),
        (1, {"chunk_size": "auto"}),
        (3, {"adapt": ["2"]}),
        (1, {"adapt": ["2.weight", "4"], "chunk_size": 2}),
        (1, {"inner_lr": dict.fromkeys([f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")], 0.05)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("estimator", TRACKED)
def test_agrees_with_the_formula(estimator, workers, options):
    """Over visits of sampled tasks, each seen again at weights that have moved."""
    follow(learner_of(estimator, **options), workers)


@pytest.mark.parametrize("estimator", TRACKED)
def test_traced_agrees_with_the_formula(estimator, traced):
    follow(learner_of(estimator, compile=True), workers=3, steps=3)
    assert len(traced) == 1


def follow(learner: MAML, workers: int, steps: int = 6) -> None:
    memory: dict[int, Any] = {}
    for k, batch in enumerate(visits(steps)):
        result = learner.meta_gradient(batch, workers)
        for i, part in enumerate(batch.split(workers)):
            expected, losses = slow_tracked(
                learner.model,
                learner.loss_fn,
                part,
                learner.estimator,
                memory,
                b_u=0.3,
                inner_lr=0.05,
                adapted=learner.adapted,
            )
            assert_close({n: g[i] for n, g in result.grads.items()}, expected)
            torch.testing.assert_close(result.losses.view(workers, -1)[i], losses, rtol=1e-10, atol=1e-12)
        move(learner, k)
    kept = state(learner)
    assert set(kept["ids"].tolist()) == set(memory)
    for row, i in enumerate(kept["ids"].tolist()):
        u, last = memory[i]
        wanted = {f"u.{n}": x for n, x in u.items()}
        if learner.estimator == "scsc":
            wanted |= {f"last.{n}": x.detach() for n, x in last.items()}
        assert_close({key: x[row] for key, x in kept["tensors"].items()}, wanted)


@pytest.mark.parametrize("estimator", TRACKED)
def test_without_an_average_it_is_independent(estimator):
    """b_u = 1, bit for bit; and so is each task's first visit for any b_u."""
    twin = "exact" if estimator == "moml-coupled" else "independent"
    ours, theirs = learner_of(estimator, tracking=1), learner_of(twin, tracking=None)
    for k, batch in enumerate(visits(4)):
        first = learner_of(estimator)
        first.model.load_state_dict(ours.model.state_dict())
        wanted = theirs.meta_gradient(batch)
        for learner in (ours, first):
            found = learner.meta_gradient(batch)
            assert torch.equal(found.losses, wanted.losses)
            for name, grad in wanted.grads.items():
                assert torch.equal(found.grads[name], grad)
        move(ours, k)
        move(theirs, k)


def test_they_differ():
    """Else the comparisons above would prove little."""
    found = {}
    for estimator in TRACKED:
        learner = learner_of(estimator)
        for k, batch in enumerate(visits(4)):
            found[estimator] = learner.meta_gradient(batch).grads
            move(learner, k)
    assert relative_error(found["moml"], found["scsc"]) > 1e-3
    assert relative_error(found["moml"], found["moml-coupled"]) > 1e-3


def test_the_rules():
    u, step, before = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 2.0, 1.5))
    assert moml(u, step, 0.2).item() == pytest.approx(0.8 * 1 + 0.2 * 2)
    assert scsc(u, step, before, 0.2).item() == pytest.approx(0.8 * 1.5 + 0.2 * 2)
    assert scsc(u, step, step, 0.2) == moml(u, step, 0.2)


@pytest.mark.parametrize("estimator", TRACKED)
def test_bfloat16(estimator):
    tasks, grads = FixedTasks(Sinusoid(shots=8), 4), []
    for autocast in (None, torch.bfloat16):
        model = SinusoidMLP((16,), generator=generator(0))
        learner = MAML(model, F.mse_loss, estimator=estimator, autocast=autocast)
        grads.append([learner.meta_gradient(tasks.sample(k, 4)).grads for k in range(3)][-1])
        assert all(kept.dtype is torch.float32 for kept in state(learner)["tensors"].values())
    assert 0 < relative_error(grads[1], grads[0]) < 0.1


# ---- what moves the memory, and what does not


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("estimator", TRACKED)
def test_only_meta_gradients_move_the_memory(estimator, chunk_size):
    learner = learner_of(estimator, chunk_size=chunk_size)
    first, second = visits(2)
    learner.backward(first)
    move(learner, 0)
    before = state(learner)
    learner.zero_grad()
    losses = learner.losses(second)
    losses.mean().backward()
    by_hand = {n: p.grad.clone() for n, p in learner.model.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(learner.losses(second), losses.detach(), rtol=1e-12, atol=0)
    learner.adapt(second.support_x, second.support_y, steps=3)
    list(learner.trajectory(second.support_x, second.support_y, steps=2))
    evaluate(MAML(nn.Linear(1, 1), F.mse_loss, estimator=estimator), Sinusoid(shots=4), tasks=4)
    assert_same(state(learner), before)
    learner.zero_grad()
    result = learner.backward(second)
    assert_close({n: p.grad for n, p in learner.model.named_parameters()}, by_hand)
    torch.testing.assert_close(result.loss, losses.mean().detach(), rtol=1e-12, atol=0)
    assert not torch.equal(state(learner)["ids"], before["ids"])


def test_only_the_tasks_of_the_batch_move():
    learner = learner_of("scsc")
    first, second = visits(2, tasks=4)
    learner.meta_gradient(first)
    before = state(learner)
    move(learner, 0)
    learner.meta_gradient(second)
    after = state(learner)
    visited = set(second.task_ids.tolist())
    for row, i in enumerate(before["ids"].tolist()):
        for key, kept in before["tensors"].items():
            assert torch.equal(kept[row], after["tensors"][key][row]) == (i not in visited)
    assert 0 < len(visited & set(before["ids"].tolist())) < 4
    learner.reset_tracking()
    assert len(state(learner)["ids"]) == 0
    learner_of("independent", tracking=None).reset_tracking()


class RefusedError(Exception):
    """What an operator raises."""


def refuse(gradient: Tensor) -> Tensor:
    raise RefusedError


def test_a_step_that_fails_leaves_the_memory():
    learner = learner_of("moml")
    first, second = visits(2)
    learner.meta_gradient(first)
    before = state(learner)
    with pytest.raises(RefusedError):
        learner.backward(second, bias=refuse)
    assert_same(state(learner), before)
    for field in ("support_x", "query_x"):
        bad = getattr(second, field).clone()
        bad[1] = float("nan")
        learner.meta_gradient(second._replace(**{field: bad}))
        with pytest.raises(NonFiniteDataError):
            learner.backward(second._replace(**{field: bad}))
        assert_same(state(learner), before)
    learner.meta_gradient(second)
    assert len(state(learner)["ids"]) > len(before["ids"])


def test_fixed_tasks_of_workers():
    """Ids are one set over all workers, so a worker's tasks are its own."""
    tasks = PerWorker([FixedTasks(Sinusoid(shots=4, dtype=torch.float64), 2)] * 2)
    together, apart = (MAML(SinusoidMLP((4,)).double(), F.mse_loss, estimator="scsc") for _ in range(2))
    apart.load_state_dict(together.state_dict())
    for k in range(3):
        batch = tasks.sample(k, 4)
        ours = together.meta_gradient(batch, workers=2).grads
        theirs = [apart.meta_gradient(part).grads for part in batch.split(2)]
        for name, grad in ours.items():
            torch.testing.assert_close(grad, torch.cat([g[name] for g in theirs]), rtol=1e-10, atol=1e-12)
    assert state(together)["ids"].tolist() == [0, 1, 2, 3]


# ---- checkpoints


@pytest.mark.parametrize("estimator", TRACKED)
def test_a_resumed_run_is_the_run(estimator, tmp_path):
    def go(name: str, iterations: int, **options: Any) -> MAML:
        learner = MAML(SinusoidMLP((8,), generator=generator(0)), F.mse_loss, estimator=estimator)
        optimizer = CompositeMomentum(learner.parameters(), lr=0.03)
        tasks = FixedTasks(Sinusoid(shots=6), 5)
        train(learner, optimizer, tasks, iterations=iterations, meta_batch=2, run_dir=tmp_path / name, **options)
        return learner

    whole = go("whole", 6)
    go("halves", 3)
    halves = go("halves", 6, resume=True)
    assert_same(state(whole), state(halves))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))
    path = Checkpoints(tmp_path / "forgetful" / "checkpoints").path(3)
    go("forgetful", 3)
    saved = load(path)
    assert len(saved["learner"]["memory._extra_state"]["ids"]) >= 2
    whole.reset_tracking()
    saved["learner"]["memory._extra_state"] = state(whole)
    Checkpoints(path.parent).save(3, {key: x for key, x in saved.items() if key not in ("step", "format")})
    forgetful = go("forgetful", 6, resume=True)
    assert not all(torch.equal(a, b) for a, b in zip(forgetful.parameters(), halves.parameters(), strict=True))


def test_what_is_loaded_is_a_copy():
    one, other = learner_of("scsc"), learner_of("scsc")
    first, second = visits(2)
    one.meta_gradient(first)
    other.load_state_dict(one.state_dict())
    before = state(other)
    assert_same(before, state(one))
    move(one, 0)
    one.meta_gradient(second)
    one.meta_gradient(first)
    assert_same(state(other), before)


def test_the_memory_of_another_learner():
    one = learner_of("moml")
    one.meta_gradient(visits(1)[0])
    for other in (learner_of("scsc"), learner_of("moml", adapt=["2"])):
        with pytest.raises(
            ValueError, match=r"memory of 3 tasks belongs to another estimator, or to other adapted weights"
        ):
            other.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match="memory"):
        learner_of("moml").load_state_dict(learner_of("independent", tracking=None).state_dict())
    assert not any("memory" in key for key in learner_of("exact", tracking=None).state_dict())


def test_another_dtype():
    """The memory follows the weights."""
    learner = MAML(SinusoidMLP((4,)), F.mse_loss, estimator="scsc")
    tasks = FixedTasks(Sinusoid(shots=4), 2)
    learner.meta_gradient(tasks.sample(0, 2))
    learner.double()
    learner.meta_gradient(tasks.sample(1, 2).to(dtype=torch.float64))
    assert all(kept.dtype is torch.float64 for kept in state(learner)["tensors"].values())


# ---- exact facts


@pytest.mark.parametrize("b_u", [0.2, 0.7])
@pytest.mark.parametrize("estimator", INDEPENDENT)
def test_the_variance_at_weights_that_stay(estimator, b_u):
    """``E||u - (w - α∇L(w))||² → b_u/(2 - b_u) α²σ_G²/m``, with ``σ_G² = (d+1)||δ||² + dσ²``."""
    d, m, alpha, noise = 3, 2, 0.4, 0.5
    theta = torch.tensor([[1.0, -0.5, 0.3]], dtype=torch.float64)
    w = torch.tensor([0.2, 0.4, -1.0], dtype=torch.float64)
    given = LinearRegression(d, 2 * m, 1, covariance=torch.eye(d), theta=theta, noise=noise, dtype=torch.float64)
    chains = 4000
    tasks = FixedTasks(given, chains)
    learner = linear_learner(w, alpha, estimator=estimator, tracking=b_u)
    for k in range(25):
        learner.meta_gradient(tasks.sample(k, chains))
    delta = w - theta[0]
    y = state(learner)["tensors"]["u.weight"][:, 0] - (w - alpha * delta)
    sigma_g2 = (d + 1) * delta.square().sum() + d * noise**2
    assert_mean(y.square().sum(1, keepdim=True), [b_u / (2 - b_u) * alpha**2 * sigma_g2 / m])
    assert_mean(y, [0, 0, 0])


COVARIANCES = torch.stack([torch.eye(2), torch.eye(2) / 4]).double()
THETAS = torch.eye(2, dtype=torch.float64)
OPTIMUM = (0.5663716814159292, 0.4336283185840708)
ENDS = {
    "moml": OPTIMUM,
    "scsc": OPTIMUM,
    "moml-coupled": (0.6279245283018868, 0.37207547169811317),
    "exact": (0.7600950118764845, 0.23990498812351543),
}


class Chains(nn.Module):
    """C linear models that know nothing of each other: ``[N, C, 2] -> [N, C]``."""

    def __init__(self, chains: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.65, 0.35]], dtype=torch.float64).repeat(chains, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(-1)


def of_chains(predictions: Tensor, targets: Tensor) -> Tensor:
    """``½ mean`` over points, summed over chains, so that each has its own gradient and Hessian."""
    return (predictions - targets).square().mean(0).sum() / 2


@pytest.mark.parametrize("estimator", ENDS)
def test_where_momentum_ends(estimator):
    """The two regressions that differ, inner batches of 2: the mean over chains of the last weights."""
    chains, m, queries = 1500, 2, 2
    learner = MAML(Chains(chains), of_chains, inner_lr=0.5, estimator=estimator)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.3, beta=0.3)
    points = m * learner.support_parts
    given = LinearRegression(
        2, points * chains, queries * chains, covariance=COVARIANCES, theta=THETAS, dtype=torch.float64
    )
    tasks = FixedTasks(given, 2)
    for k in range(150):
        x, y, query_x, query_y, ids = tasks.sample(k, 2)[:5]
        dealt = [each.reshape(2, n, chains, -1) for each, n in ((x, points), (query_x, queries))]
        labels = [each.reshape(2, n, chains) for each, n in ((y, points), (query_y, queries))]
        optimizer.zero_grad()
        learner.backward(TaskBatch(dealt[0], labels[0], dealt[1], labels[1], ids))
        optimizer.step()
    assert_mean(learner.model.weight.detach(), ENDS[estimator])


def test_the_ends_are_those_of_theory():
    """The coupled average's bias is b_u times that of MAML."""
    designs = [Gaussian(covariance) for covariance in COVARIANCES]
    exact = [regression.population(design, 0.5) for design in designs]
    for estimator, share in [("moml", 0.0), ("moml-coupled", 0.2), ("exact", 1.0)]:
        biased = [regression.coupled(design, 0.5, 2, share=share) for design in designs]
        assert bias_floor(exact, biased, THETAS).end.tolist() == pytest.approx(ENDS[estimator], abs=1e-12)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "moml", "inner_steps": 2}, r"'moml' averages the results of one inner step; got inner_steps=2"),
        (
            {"estimator": "scsc", "learn_inner_lr": True},
            r"'scsc' averages inner steps of a fixed size; got learn_inner_lr",
        ),
        ({"estimator": "moml", "tracking": 0}, r"0 < tracking <= 1; got 0\."),
        ({"estimator": "scsc", "tracking": 1.5}, r"0 < tracking <= 1; got 1\.5"),
        ({"estimator": "moml", "tracking": float("nan")}, r"0 < tracking <= 1; got nan"),
        ({"tracking": 0.2}, r"tracking is the weight.*got tracking=0\.2 with estimator 'exact'\. Leave it out"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        MAML(nn.Linear(1, 1), F.mse_loss, **options)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("estimator", TRACKED)
def test_batches_that_cannot_be_tracked(estimator, chunk_size):
    learner, batch = learner_of(estimator, chunk_size=chunk_size), visits(1)[0]
    for call in (learner.meta_gradient, learner.backward, learner.losses):
        with pytest.raises(ValueError, match=r"remember each task by its id; got a batch without task_ids.*FixedTasks"):
            call(batch._replace(task_ids=None))
        with pytest.raises(ValueError, match=r"at most once in a batch.*got task_ids with 4 twice"):
            call(batch._replace(task_ids=torch.tensor([4, 1, 4])))
    assert len(state(learner)["ids"]) == 0


# ---- recipes


def test_recipes():
    recipe = Recipe("sinusoid", shots=6, estimator="scsc", tracking=0.5, fixed_tasks=12, meta_batch=4)
    learner = recipe.learner()
    assert learner.describe()["tracking"] == 0.5
    assert learner.memory.tracking == 0.5
    learner.backward(recipe.sampler().sample(0, 4))
    assert Recipe.from_settings(recipe.settings()) == recipe
    with pytest.raises(ValueError, match=r"'moml' remembers each task.*fixed_tasks"):
        Recipe("sinusoid", estimator="moml")
    with pytest.raises(ValueError, match=r"got tracking=0\.5 with estimator 'exact'"):
        Recipe("sinusoid", tracking=0.5).learner()


def test_from_the_shell(tmp_path, capsys):
    """A run that is interrupted and resumed is the run; its learner is evaluated on tasks that it has never seen."""
    options = ["--estimator", "scsc", "--tracking", "0.5", "--fixed-tasks", "6", "--meta-batch", "2", "--shots", "4"]
    for name, stops in (("whole", ["4"]), ("halves", ["2", "4"])):
        for stop in stops:
            run = ["--iterations", stop, "--run-dir", str(tmp_path / name), "--resume"]
            assert cli.main(["train", "sinusoid", *options, *run]) == 0
    whole, halves = (load(tmp_path / name / "checkpoints" / "step-00000004.pt") for name in ("whole", "halves"))
    memories = [saved["learner"]["memory._extra_state"] for saved in (whole, halves)]
    assert_same(*memories)
    assert len(memories[0]["ids"]) > 2
    assert cli.main(["evaluate", str(tmp_path / "whole"), "--tasks", "4", "--json"]) == 0
    capsys.readouterr()
    assert cli.main(["train", "sinusoid", "--estimator", "moml", "--run-dir", str(tmp_path / "none")]) == 2
    assert "--fixed-tasks" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
