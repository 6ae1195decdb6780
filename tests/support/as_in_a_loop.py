"""The check that MAML trains a model as a plain loop over tasks does, and leaves it as it was."""

from __future__ import annotations

import copy

import torch
from model_zoo import Problem
from problems import assert_close
from slow_maml import adapt_by_copies, called_with, meta_gradient_by_copies
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamom import MAML, CompositeMomentum, TaskBatch, evaluate
from metamom.maml.estimators import Estimator
from metamom.maml.running.vectorize import Vectorize

INNER_LR = 0.05
SMALL = 0.001  # for the inputs of PyTorch's own tests, which are up to 9, and for deep networks


def state_of(model: nn.Module) -> list[tuple[str, object]]:
    """Every tensor where it is registered, as the object that it is, every mode, and the attributes that there are."""
    return [
        *((name, sorted(module.__dict__)) for name, module in model.named_modules()),
        *((name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)),
        *((name, id(b)) for name, b in model.named_buffers(remove_duplicate=False)),
        *((name, type(p)) for name, p in model.named_parameters(remove_duplicate=False)),
        *((name, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)),
        *((name, module.training) for name, module in model.named_modules()),
    ]


class Given:
    """A sampler of one batch."""

    def __init__(self, batch: TaskBatch) -> None:
        self.batch = batch

    def sample(self, step: int, num_tasks: int) -> TaskBatch:
        assert num_tasks == self.batch.num_tasks
        return self.batch


def judged_as_in_a_loop(learner: MAML, batch: TaskBatch, inner_lr: float, tolerance: float) -> None:
    """`evaluate`'s values are those of a loop in evaluation mode."""
    found = evaluate(learner, Given(batch), tasks=batch.num_tasks, steps=(0, 1))
    model, loss_fn = copy.deepcopy(learner.model).eval(), learner.loss_fn
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for steps in (0, 1):
        for t, (x, y, query_x, query_y) in enumerate(zip(*batch[:4], strict=True)):
            own = adapt_by_copies(model, loss_fn, weights, x, y, steps=steps, inner_lr=inner_lr)
            out = called_with(model, own, query_x).detach()
            expected = loss_fn(out, query_y) if found.metric == "loss" else (out.argmax(1) == query_y).double().mean()
            torch.testing.assert_close(found.values[steps, t], expected, rtol=tolerance, atol=tolerance)


def check(
    case: Problem,
    steps: int = 1,
    estimator: Estimator = "exact",
    inner_lr: float = INNER_LR,
    tolerance: float = 1e-9,
    evaluated: bool = True,
    vectorize: Vectorize = "auto",
) -> None:
    """Two meta-steps, an adaptation and an evaluation are those of a loop, and leave the model as it was."""
    model, loss_fn, batch = case
    before, buffers = state_of(model), {name: b.clone() for name, b in model.named_buffers()}
    learner = MAML(model, loss_fn, inner_lr=inner_lr, inner_steps=steps, estimator=estimator, vectorize=vectorize)
    first_order = estimator == "first-order"
    params = [p for p in learner.parameters() if p.requires_grad]
    optimizer = CompositeMomentum(params, lr=inner_lr, beta=1.0)
    for _ in range(2):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            expected = meta_gradient_by_copies(
                model, loss_fn, batch, steps=steps, inner_lr=inner_lr, first_order=first_order
            )
        optimizer.zero_grad()
        learner.backward(batch)
        assert_close({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected, tolerance)
        optimizer.step()
    with sdpa_kernel(SDPBackend.MATH):
        weights = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            adapted = learner.adapt(batch.support_x, batch.support_y)
            predictions = learner.predict(adapted, batch.query_x)
        for t in range(batch.num_tasks):
            own = adapt_by_copies(
                model,
                loss_fn,
                weights,
                batch.support_x[t],
                batch.support_y[t],
                steps=steps,
                inner_lr=inner_lr,
                first_order=first_order,
            )
            torch.testing.assert_close(
                predictions[t], called_with(model, own, batch.query_x[t]).detach(), rtol=tolerance, atol=tolerance
            )
        if evaluated:
            judged_as_in_a_loop(learner, batch, inner_lr, tolerance)
    assert state_of(model) == before
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
