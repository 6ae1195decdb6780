"""Scale and offset of batch normalisation by inner step, against a loop over tasks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import image_batch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, TaskBatch, evaluate
from metamom.nets import Conv4
from metamom.tasks import Sinusoid

STEPS = 2


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Tanh(), nn.Flatten())
    return nn.Sequential(net, nn.Linear(3 * 16, 2)).double()


def sample(k: int, tasks: int = 4) -> TaskBatch:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(2, tasks, 4, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1]).expand(tasks, 4)
    return TaskBatch(x[0], y, x[1], y)


def plain_gradients(learner: MAML, batch: TaskBatch, inner_lr: float) -> dict[str, Tensor]:
    """By a loop over tasks: gradients by the names of the meta-parameters."""
    model = learner.model
    meta = {n: p.detach().clone().requires_grad_() for n, p in learner.meta_parameters().items()}
    rows = {n.removeprefix("step_norms."): p for n, p in meta.items() if n.startswith("step_norms.")}
    total = torch.zeros((), dtype=torch.float64)
    for x, y, query_x, query_y in zip(*batch[:4], strict=True):
        current = {n: p for n, p in meta.items() if not n.startswith("step_norms.")}
        for j in range(STEPS):
            loss = F.cross_entropy(functional_call(model, {**current, **{n: r[j] for n, r in rows.items()}}, (x,)), y)
            grads = torch.autograd.grad(loss, list(current.values()), create_graph=True)
            current = {n: w - inner_lr * g for (n, w), g in zip(current.items(), grads, strict=True)}
        last = {**current, **{n: r[STEPS] for n, r in rows.items()}}
        total = total + F.cross_entropy(functional_call(model, last, (query_x,)), query_y) / batch.num_tasks
    return dict(zip(meta, torch.autograd.grad(total, list(meta.values())), strict=True))


@pytest.mark.parametrize("options", [{}, {"vectorize": "loop"}, {"chunk_size": 3}, {"compile": True}])
def test_gradients_are_those_of_a_loop_over_tasks(options, traced):
    learner = MAML(network(), F.cross_entropy, inner_lr=0.1, inner_steps=STEPS, step_norms=True, **options)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.5)
    own = copy.deepcopy(learner.model[0][1].state_dict())
    for k in range(3):
        expected = plain_gradients(learner, sample(k), 0.1)
        optimizer.zero_grad()
        learner.backward(sample(k), workers=2)
        assert "0.1.weight" not in expected
        assert expected["step_norms.0.1.weight"].shape == (STEPS + 1, 3)
        for name, p in learner.meta_parameters().items():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-10)
        optimizer.step()
    assert len(traced) == (1 if "compile" in options else 0)
    assert all(torch.equal(value, own[name]) for name, value in learner.model[0][1].state_dict().items())
    rows = learner.meta_parameters()["step_norms.0.1.weight"]
    assert not torch.equal(rows[0], rows[1])


def trained() -> MAML:
    learner = MAML(network(), F.cross_entropy, inner_lr=0.1, inner_steps=STEPS, step_norms=True)
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    for k in range(3):
        optimizer.zero_grad()
        learner.backward(sample(k))
        optimizer.step()
    return learner


def test_adapted_weights_have_the_rows_of_their_step():
    learner, batch = trained(), sample(9)
    rows = learner.meta_parameters()["step_norms.0.1.bias"]
    for steps in range(STEPS + 3):
        adapted = learner.adapt(batch.support_x, batch.support_y, steps=steps)
        assert torch.equal(adapted["0.1.bias"][1], rows[min(steps, STEPS)])
        predicted = learner.predict(adapted, batch.query_x)
        for t in range(batch.num_tasks):
            own = {name: w[t] for name, w in adapted.items()}
            torch.testing.assert_close(predicted[t], functional_call(learner.model, own, (batch.query_x[t],)))
    losses = learner.judge(learner.adapt(batch.support_x, batch.support_y), predicted, batch.query_y)
    assert losses[0].shape == (4,)
    torch.testing.assert_close(
        learner.losses(batch),
        learner.judge(
            adapted := learner.adapt(batch.support_x, batch.support_y),
            learner.predict(adapted, batch.query_x),
            batch.query_y,
        )[0],
    )


def test_frozen_ones_stay_in_use():
    """They are no meta-parameters then; the gradients of all others are the same."""
    learner, batch = trained(), sample(9)
    before, adapted = learner.meta_gradient(batch).grads, learner.adapt(batch.support_x, batch.support_y)
    assert learner.norms_by_step is not None
    learner.norms_by_step.get_parameter("0:1:bias").requires_grad_(False)
    grads = learner.meta_gradient(batch).grads
    assert set(before) - set(grads) == {"step_norms.0.1.bias"}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, before[name], rtol=1e-10, atol=1e-12)
    again = learner.adapt(batch.support_x, batch.support_y)
    for name, w in adapted.items():
        torch.testing.assert_close(again[name], w)


def test_fit_and_like_use_them():
    learner, batch = trained(), sample(9)
    x, y = batch.support_x[0], batch.support_y[0]
    adapted = learner.adapt(x[None], y[None])
    module = learner.fit(x, y, norm="batch")
    torch.testing.assert_close(module(batch.query_x[0]), learner.predict(adapted, batch.query_x[:1])[0])
    again = learner.like(norm="support")
    torch.testing.assert_close(again.adapt(x[None], y[None])["0.1.bias"], adapted["0.1.bias"])


def test_conv4_learns_with_them_and_multi_step_losses():
    batch = image_batch(tasks=3).to("cpu", torch.float64)
    net = Conv4(5, hidden=4).double()
    options: dict[str, Any] = {"inner_steps": 2, "learn_inner_lr": "tensor-step", "multi_step": 10}
    learner = MAML(net, F.cross_entropy, inner_lr=0.1, step_norms=True, **options)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.02)
    losses = []
    for _ in range(14):
        optimizer.zero_grad()
        losses.append(learner.backward(batch).loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    state = learner.state_dict()
    other = MAML(copy.deepcopy(net), F.cross_entropy, inner_lr=0.1, step_norms=True, **options)
    other.load_state_dict(state)
    torch.testing.assert_close(other.losses(batch), learner.losses(batch))
    assert "step_norms" in learner.describe()


def test_models_and_estimators_without_them():
    with pytest.raises(ValueError, match="has no trainable ones"):
        MAML(nn.Linear(1, 1), F.mse_loss, step_norms=True)
    with pytest.raises(ValueError, match="belongs to no inner step"):
        MAML(network(), F.cross_entropy, estimator="moml", step_norms=True)
    with pytest.raises(ValueError, match="not by inner steps"):
        MAML(network(), F.cross_entropy, estimator="implicit", step_norms=True)
    learner = MAML(network(), F.cross_entropy, step_norms=True)
    with pytest.raises(ValueError, match="not by inner steps"):
        learner.estimator = "implicit"
    with pytest.raises(ValueError, match="not by inner steps"):
        learner.like(estimator="perturbed")
    with pytest.raises(TypeError, match="step_norms must be True or False"):
        MAML(network(), F.cross_entropy, step_norms=1)
    with pytest.raises(ValueError, match=r"step_norms=True learns .*: leave '0\.1' out of adapt"):
        MAML(network(), F.cross_entropy, adapt=["0.1"], step_norms=True)
    with pytest.raises(ValueError, match=r"\['nope'\] is none of"):
        MAML(network(), F.cross_entropy, adapt=["nope"], step_norms=True)


def test_evaluate_with_more_steps_than_trained():
    net = nn.Sequential(nn.Linear(1, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh(), nn.Linear(5, 1))
    learner = MAML(net, F.mse_loss, inner_lr=0.01, inner_steps=1, step_norms=True)
    found = evaluate(learner, Sinusoid(shots=5), tasks=8, steps=(0, 1, 4))
    assert all(torch.isfinite(torch.tensor(found.mean)))
