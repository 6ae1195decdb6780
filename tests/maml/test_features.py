"""Features that no inner step changes are computed once for each set, with the results of a plain loop."""

from __future__ import annotations

import copy

import pytest
import torch
from as_in_a_loop import Given, judged_as_in_a_loop
from backbone_and_head import ALPHA, HEAD, STEPS, Counted, Net, agrees, anil, batch_of, calls_in
from problems import WAYS, assert_close, labelled_batch, mean_over_workers, randomised
from slow_maml import adapt_task, slow_estimate, slow_meta_gradient, weights_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from metamom import evaluate
from metamom.interop.imports import import_torchvision
from metamom.maml.estimators import ESTIMATORS


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("estimator", ["exact", "first-order"])
@pytest.mark.parametrize("learn", [False, "tensor"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_backbone_runs_once_for_each_set(frozen, estimator, learn, workers):
    model, batch = randomised(Net()), batch_of()
    model.body.requires_grad_(not frozen)
    learner = anil(model, estimator=estimator, learn_inner_lr=learn)
    agrees(learner, batch, workers)
    assert calls_in(model, lambda: learner.meta_gradient(batch, workers)) == 2
    assert calls_in(model, lambda: learner.losses(batch)) == 2
    assert calls_in(model, lambda: learner.adapt(batch.support_x, batch.support_y)) == 1
    with torch.no_grad():
        assert calls_in(model, lambda: learner.adapt(batch.support_x, batch.support_y)) == 1
    assert calls_in(model, lambda: [*learner.trajectory(batch.support_x, batch.support_y, steps=7)]) == 1


def test_the_first_meta_gradient_runs_it_once_too():
    model, batch = randomised(Net()), batch_of()
    assert calls_in(model, lambda: anil(model).meta_gradient(batch)) == 2


def test_one_inner_step_runs_as_ever():
    model, batch = randomised(Net()), batch_of()
    learner = anil(model, inner_steps=1)
    agrees(learner, batch)
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == 2
    assert not learner._run.heads._decided


@pytest.mark.parametrize("fresh", ["same", "fresh"])
@pytest.mark.parametrize("estimator", ["exact", "independent", "cross-fit", "richardson"])
def test_each_inner_batch_has_features_of_its_own(estimator, fresh):
    """Batch statistics of a part are not those of the set."""
    model = randomised(Net(nn.BatchNorm1d(5, track_running_stats=False)))
    learner = anil(model, estimator=estimator, inner_batches=fresh, inner_steps=2, inner_lr=0.05)
    batch = batch_of(support=24)
    for _ in range(2):
        grads, losses = learner.meta_gradient(batch, 2)
        expected, expected_losses = slow_estimate(
            copy.deepcopy(model), F.cross_entropy, batch, estimator, steps=2, fresh=fresh == "fresh", adapted=HEAD,
            inner_lr=0.05,
        )  # fmt: skip
        assert_close(mean_over_workers(grads), expected, 1e-10)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-10)
    sets = {"exact": 1, "independent": 2, "cross-fit": 2, "richardson": 2}[estimator]
    terms = len(ESTIMATORS[estimator].terms)
    steps = 2 if fresh == "fresh" else 1
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == sets * steps + terms


def test_differences_of_gradients_use_no_features():
    model, batch = randomised(Net()), batch_of(support=12)
    learner = anil(model, estimator="hessian-free", inner_lr=0.05)
    expected, _ = slow_estimate(
        copy.deepcopy(model), F.cross_entropy, batch, "hessian-free", steps=STEPS, inner_lr=0.05, adapted=HEAD
    )
    for _ in range(2):
        assert_close(mean_over_workers(learner.meta_gradient(batch)[0]), expected, 1e-6)
    assert calls_in(model, lambda: learner.meta_gradient(batch)) > 2 * STEPS


@pytest.mark.parametrize("norm", ["batch", "frozen", "support"])
def test_an_evaluation_runs_it_once_for_each_set(norm):
    model = randomised(Net(nn.BatchNorm1d(5)))
    model.body.layers[1].running_var.fill_(2.0)
    model.head = nn.Sequential(nn.Linear(5, WAYS), nn.BatchNorm1d(WAYS)).double()
    learner, batch = anil(model, norm=norm), batch_of()
    steps = (0, 1, 2, 5)
    fewer = evaluate(learner, Given(batch), tasks=4, steps=steps)
    whole = anil(model, norm=norm)
    whole._run.heads._unsteady = True
    every_time = evaluate(whole, Given(batch), tasks=4, steps=steps)
    assert torch.equal(fewer.values, every_time.values)
    few = 1 + (2 if norm == "support" else 1)  # the statistics of the support set are taken again
    assert calls_in(model, lambda: evaluate(learner, Given(batch), tasks=4, steps=steps)) == few
    all_of_them = 5 + 4 * (2 if norm == "support" else 1)
    assert calls_in(model, lambda: evaluate(whole, Given(batch), tasks=4, steps=steps)) == all_of_them


def test_an_evaluation_is_that_of_a_loop():
    learner = anil(randomised(Net()), adapt=None)
    judged_as_in_a_loop(learner, batch_of(), ALPHA, 1e-10)
    model, batch = randomised(Net()), batch_of()
    found = evaluate(anil(model), Given(batch), tasks=4, steps=(0, 1, 2, 6))
    for row, steps in enumerate(found.steps):
        for t, (x, y, query_x, query_y) in enumerate(zip(*batch[:4], strict=True)):
            own = adapt_task(
                model, F.cross_entropy, weights_of(model), x, y, steps=steps, inner_lr=lambda name: ALPHA, adapted=HEAD
            )
            right = torch.func.functional_call(model, own, (query_x,)).argmax(1) == query_y
            assert found.values[row, t] == right.double().mean()


# ---- heads


class Nested(Net):
    """The smallest module with the adapted parameters is inside the head."""

    def __init__(self) -> None:
        super().__init__(head=nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.Linear(4, WAYS)), nn.LogSoftmax(-1)))


HEADS = {
    "two layers": (lambda: Net(head=nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, WAYS))), ["head"]),
    "its last layer": (lambda: Net(head=nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, WAYS))), ["head.2"]),
    "inside a module": (Nested, ["head.1"]),
    "a bias": (Net, ["head.bias"]),
    "weight norm": (lambda: Net(head=parametrizations.weight_norm(nn.Linear(5, WAYS))), ["head"]),
    "nn.Sequential": (lambda: nn.Sequential(Counted(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, WAYS)), ["1"]),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
def test_heads(kind):
    make, adapt = HEADS[kind]
    model, batch = randomised(make()), batch_of()
    agrees(anil(model, adapt=adapt), batch, 2)
    counted = next(module for module in model.modules() if isinstance(module, Counted))
    counted.calls.clear()
    anil(model, adapt=adapt).meta_gradient(batch)
    assert len(counted.calls) == 2


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
def test_a_resnet_with_an_adapted_head():
    resnet18 = import_torchvision().models.resnet18
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet18(num_classes=WAYS).double().eval()
    model.requires_grad_(False).fc.requires_grad_(True)
    calls, conv = [], model.conv1.forward
    model.conv1.forward = lambda x: (calls.append(1), conv(x))[1]
    batch = labelled_batch(3, 32, 32, tasks=2, support=WAYS, queries=WAYS)
    learner = anil(model, adapt=["fc"])
    state = {name: t.clone() for name, t in model.state_dict().items()}
    grads, losses = learner.meta_gradient(batch)
    assert len(calls) == 2
    expected, expected_losses = slow_meta_gradient(
        model, F.cross_entropy, batch, steps=STEPS, inner_lr=ALPHA, adapted=learner.adapted
    )
    assert_close(mean_over_workers(grads), expected, 1e-10)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
