"""The gradient's norm has a bound, and the step size falls where validations no longer improve."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from forked import run_forked
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, MultiplicativeLR, ReduceLROnPlateau
from training_runs import KINDS, TASKS, go, learner, momentum

from metamom import MAML, train
from metamom.distributed import start
from metamom.tasks import Episodes
from metamom.training.checkpoints import CheckpointError, Checkpoints, load, save

VALIDATED = {"validation": TASKS, "evaluate_every": 2, "evaluate_tasks": 4}


def sgd(lr=0.02):
    made = learner()
    return momentum()._replace(learner=made, optimizer=SGD(made.parameters(), lr=lr))


@pytest.mark.parametrize("most", [0.7, 1e9])
def test_clipped_as_torch_clips(most):
    """A loop with `torch.nn.utils.clip_grad_norm_`; it divides by the norm + 1e-6."""
    ours, theirs = sgd(), sgd()
    result = go(ours, clip_grad=most, iterations=5, workers=2)
    for step, line in enumerate(result.metrics):
        theirs.optimizer.zero_grad()
        theirs.learner.backward(TASKS.sample(step, 8), workers=2)
        norm = float(nn.utils.clip_grad_norm_(theirs.learner.parameters(), most))
        theirs.optimizer.step()
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert line["clip_factor"] == pytest.approx(min(1.0, most / norm), rel=1e-4)
    assert (min(line["clip_factor"] for line in result.metrics) < 1) == (most < 1)
    for a, b in zip(ours.learner.parameters(), theirs.learner.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_bound_that_is_never_reached_changes_nothing():
    runs = sgd(), sgd()
    go(runs[0], clip_grad=1e9)
    assert "clip_factor" not in go(runs[1]).metrics[0]
    for a, b in zip(*(each.learner.parameters() for each in runs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("most", [0, -1.0, math.inf, math.nan])
def test_no_bound(most):
    with pytest.raises(ValueError, match="clip_grad is the largest norm of the gradient, finite and > 0"):
        go(momentum(), clip_grad=most)


def test_another_bound_is_another_run(tmp_path):
    go(momentum(), tmp_path, iterations=4)
    with pytest.raises(ValueError, match=r"clip_grad is None there and 0\.5 here"):
        go(momentum(), tmp_path, resume=True, clip_grad=0.5)


def rates(parts, **options):
    """The step size after each step, and the validations."""
    seen = []
    group, step = parts.optimizer.param_groups[0], parts.optimizer.step
    parts.optimizer.step = lambda *args: (seen.append(group["lr"]), step(*args))[1]
    result = go(parts, **{**VALIDATED, **options})
    return seen, [line["validation"] for line in result.metrics if "validation" in line]


def test_the_step_size_falls_at_plateaus():
    parts = momentum()
    plateau = ReduceLROnPlateau(parts.optimizer, factor=0.1, patience=0, threshold=1e9, threshold_mode="abs")
    seen, _ = rates(parts._replace(schedulers=(plateau,)), iterations=8)
    assert seen == pytest.approx([0.02] * 4 + [0.002] * 2 + [0.0002] * 2)
    assert plateau.last_epoch == 4


def test_it_is_given_the_validations():
    parts = momentum()
    plateau = ReduceLROnPlateau(parts.optimizer)
    _, values = rates(parts._replace(schedulers=(plateau,)))
    assert plateau.best == min(values)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_accuracies(mode):
    """In either mode, what counts is that they rise."""
    images, labels = torch.arange(8.0).repeat_interleave(4)[:, None] / 8, torch.arange(8).repeat_interleave(4)
    tasks = Episodes(images, labels, ways=2, shots=1, queries=2, seed=0)
    made = MAML(nn.Linear(1, 2), F.cross_entropy, inner_lr=0.5)
    optimizer = SGD(made.parameters(), lr=0.1)
    plateau = ReduceLROnPlateau(optimizer, mode=mode)
    options = {"validation": tasks, "evaluate_every": 1, "evaluate_tasks": 10}
    result = train(made, optimizer, tasks, iterations=4, meta_batch=2, schedulers=plateau, **options)
    best = max(line["validation"] for line in result.metrics)
    assert plateau.best == pytest.approx(1 - best if mode == "min" else best)


def test_losses_that_should_rise():
    parts = momentum()
    plateau = ReduceLROnPlateau(parts.optimizer, mode="max")
    with pytest.raises(ValueError, match=r'the validation is a loss, .* with mode="min"'):
        go(parts._replace(schedulers=(plateau,)), **VALIDATED)


def test_a_schedule_that_undoes_it():
    parts = momentum()
    plateau = ReduceLROnPlateau(parts.optimizer)
    with pytest.raises(ValueError, match="LambdaLR computes each step size from the first one"):
        go(parts._replace(schedulers=(LambdaLR(parts.optimizer, lambda k: 1.0), plateau)), **VALIDATED)
    multiplied = MultiplicativeLR(parts.optimizer, lambda k: 0.5)
    go(parts._replace(schedulers=(multiplied, plateau)), iterations=2, **VALIDATED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0.3}, "factor should be 0.5, as in this schedule"),
        ({"num_bad_epochs": -1}, "num_bad_epochs should be a whole number >= 0"),
        ({"best": float("nan")}, "best should be a number"),
        ({"last_epoch": -1}, "last_epoch should be a whole number >= 0"),
    ],
)
def test_states_that_no_plateau_has(change, message, tmp_path):
    go(KINDS["plateaus"](), tmp_path)
    path = Checkpoints(tmp_path / "checkpoints").path(12)
    state = load(path)
    save(path, {**state, "scheduler1": {**state["scheduler1"], **change}})
    with pytest.raises(CheckpointError, match=message):
        go(KINDS["plateaus"](), tmp_path, resume=True, iterations=14)


def both(folder: Path) -> None:
    """With several processes."""
    with start(timeout=60) as world:
        print(json.dumps({kind: ending(kind, world=world) for kind in ("plateaus", "clipped")}))


def ending(kind, **options):
    torch.manual_seed(7)
    made = KINDS[kind]()
    made.learner.double()
    options = {"workers": 2, "tasks": TASKS, **options}
    result = go(made, **options)
    weights = [p.tolist() for p in made.learner.parameters()]
    return weights, made.optimizer.param_groups[0]["lr"], [line.get("clip_factor", 1.0) for line in result.metrics]


@pytest.mark.xdist_group("processes")
def test_on_two_processes(tmp_path):
    one = {kind: ending(kind) for kind in ("plateaus", "clipped")}
    assert one["plateaus"][1] < 0.02
    assert min(one["clipped"][2]) < 1
    for status, said in run_forked(both, 2, tmp_path, tmp_path):
        assert status == 0, said
        (line,) = [line for line in said.splitlines() if line.startswith("{")]
        for kind, (weights, lr, factors) in json.loads(line).items():  # other batches are rounded differently
            for a, b in zip(weights, one[kind][0], strict=True):
                torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-6, atol=1e-6)
            assert lr == one[kind][1]
            assert factors == pytest.approx(one[kind][2], rel=1e-6)
