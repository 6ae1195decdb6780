"""What normalisation uses: each choice against a plain loop over tasks, in which the layers are written out."""

from __future__ import annotations

import pytest
import torch
from as_in_a_loop import Given, state_of
from normalised_models import CASES, INNER_LR, TASKS, case, loop
from problems import assert_close
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, evaluate
from metamom.common.choices import NORMS

SLOW = {("ResNet12", "train"): pytest.mark.slow}


@pytest.mark.parametrize(
    ("name", "norm", "training"),
    [
        pytest.param(name, norm, mode == "train", id=f"{name}-{norm}-{mode}", marks=SLOW.get((name, mode), ()))
        for name, norm in CASES
        for mode in ("train", "eval")
    ],
)
def test_two_meta_steps_are_those_of_a_loop_and_leave_the_statistics(name, norm, training):
    model, batch = case(name)
    model.train(training)
    slow, before = loop(name, model, norm), (state_of(model), {n: b.clone() for n, b in model.named_buffers()})
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, inner_steps=2, norm=norm)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.1)
    for _ in range(2):
        expected, losses = slow.meta_gradient(model, batch, steps=2)
        found = learner.meta_gradient(batch, workers=2)
        assert_close({n: g.mean(0) for n, g in found.grads.items()}, expected, 1e-9)
        torch.testing.assert_close(found.losses, losses)
        torch.testing.assert_close(learner.losses(batch), losses, check_dtype=False)
        optimizer.zero_grad()
        learner.backward(batch)
        optimizer.step()
    assert state_of(model) == before[0]
    assert all(torch.equal(b, before[1][n]) for n, b in model.named_buffers())


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_predictions_and_evaluation_are_those_of_a_loop(name, norm):
    model, batch = case(name)
    slow, learner = loop(name, model, norm), MAML(model, F.cross_entropy, inner_lr=INNER_LR, norm="batch")
    before, buffers = state_of(model), {n: b.clone() for n, b in model.named_buffers()}
    weights = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    rows = []
    for steps in (0, 2):
        adapted = [slow.adapt(weights, x, y, steps, list(weights)) for x, y in zip(*batch[:2], strict=True)]
        expected = torch.stack(
            [slow.predict(own, x, s) for own, x, s in zip(adapted, batch.query_x, batch.support_x, strict=True)]
        ).detach()
        other = learner.like(norm=norm)
        params = other.adapt(batch.support_x, batch.support_y, steps=steps)
        predictions = other.predict(params, batch.query_x, support_x=batch.support_x)
        torch.testing.assert_close(predictions.detach(), expected)
        rows.append((expected.argmax(2) == batch.query_y).double().mean(1))
    found = evaluate(learner, Given(batch), tasks=TASKS, steps=(0, 2), norm=norm)
    torch.testing.assert_close(found.values, torch.stack(rows))
    assert found.norm == norm
    assert learner.norm == "batch"
    assert evaluate(learner, Given(batch), tasks=TASKS, steps=(0,)).norm == "batch"
    assert state_of(model) == before
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_the_choices_differ():
    model, batch = case("2d")
    losses = [MAML(model, F.cross_entropy, norm=norm).meta_gradient(batch).losses for norm in NORMS]
    assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(losses, losses[1:] + losses[:1], strict=True))


@pytest.mark.parametrize("norm", ["frozen", "support"])
def test_a_query_alone_has_the_logits_that_it_has_among_others(norm):
    model, batch = case("2d", queries=5)
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, norm=norm)
    params = learner.adapt(batch.support_x, batch.support_y)
    among = learner.predict(params, batch.query_x, support_x=batch.support_x)
    for at in (slice(0, 1), slice(7, 8), slice(3, 9)):
        alone = learner.predict(params, batch.query_x[:, at], support_x=batch.support_x)
        torch.testing.assert_close(alone, among[:, at], rtol=1e-12, atol=1e-12)
