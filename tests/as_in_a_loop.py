"""The check that MAML trains a model as a plain loop over tasks does, and leaves it as it was."""

from __future__ import annotations

import torch
from model_zoo import Problem
from problems import assert_close
from slow_maml import adapt_by_copies, called_with, meta_gradient_by_copies
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamom import MAML, CompositeMomentum
from metamom.estimators import Estimator

INNER_LR = 0.05
SMALL = 0.001  # for the inputs of PyTorch's own tests, which are up to 9, and for deep networks


def state_of(model: nn.Module) -> list[tuple[str, object]]:
    """Every tensor where it is registered, as the object that it is, and every mode."""
    return [
        *((name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)),
        *((name, id(b)) for name, b in model.named_buffers(remove_duplicate=False)),
        *((name, type(p)) for name, p in model.named_parameters(remove_duplicate=False)),
        *((name, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)),
        *((name, module.training) for name, module in model.named_modules()),
    ]


def check(
    case: Problem, steps: int = 1, estimator: Estimator = "exact", inner_lr: float = INNER_LR, tolerance: float = 1e-9
) -> None:
    """Two meta-steps, and an adaptation, are those of a loop, and leave the model as it was."""
    model, loss_fn, batch = case
    before, buffers = state_of(model), {name: b.clone() for name, b in model.named_buffers()}
    learner = MAML(model, loss_fn, inner_lr=inner_lr, inner_steps=steps, estimator=estimator)
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
    assert state_of(model) == before
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
