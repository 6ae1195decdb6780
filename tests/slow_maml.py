"""MAML written to be obviously right: a loop over tasks, one at a time, and autograd through each adaptation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from metamom.batch import TaskBatch

Params = dict[str, Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]


def weights_of(model: nn.Module) -> Params:
    """The trainable parameters, as leaves of their own."""
    return {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}


def adapt_task(
    model: nn.Module,
    loss_fn: LossFn,
    weights: Params,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    inner_lr: Callable[[str], float | Tensor],
    adapted: Collection[str],
    first_order: bool = False,
) -> Params:
    """One task's weights after ``steps`` inner steps, differentiable in ``weights`` and in the step sizes."""
    current = dict(weights)
    for _ in range(steps):
        loss = loss_fn(torch.func.functional_call(model, current, (x,)), y)
        moving = [name for name in current if name in adapted]
        grads = torch.autograd.grad(
            loss, [current[n] for n in moving], create_graph=not first_order, allow_unused=True, materialize_grads=True
        )
        for name, grad in zip(moving, grads, strict=True):
            current[name] = current[name] - inner_lr(name) * grad
    return current


def slow_meta_gradient(
    model: nn.Module,
    loss_fn: LossFn,
    batch: TaskBatch,
    *,
    steps: int = 1,
    inner_lr: float | Mapping[str, float | Tensor] = 0.01,
    learned: Mapping[str, Tensor] | None = None,
    adapted: Collection[str] | None = None,
    first_order: bool = False,
) -> tuple[Params, Tensor]:
    """The mean over the tasks of the meta-gradient, and the query losses ``[T]``.

    Args:
        learned: learned step sizes by ``"inner_lr"`` or ``"inner_lr.NAME"``; they come instead of ``inner_lr``.
        adapted: names of the parameters that the inner steps move; all by default.
    """
    weights = weights_of(model)
    alphas = {name: a.detach().clone().requires_grad_() for name, a in (learned or {}).items()}
    leaves = weights | alphas

    def alpha(name: str) -> float | Tensor:
        if alphas:
            return alphas["inner_lr" if "inner_lr" in alphas else f"inner_lr.{name}"]
        return inner_lr[name] if isinstance(inner_lr, Mapping) else inner_lr

    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    losses = []
    for t in range(batch.num_tasks):
        end = adapt_task(
            model,
            loss_fn,
            weights,
            batch.support_x[t],
            batch.support_y[t],
            steps=steps,
            inner_lr=alpha,
            adapted=weights if adapted is None else adapted,
            first_order=first_order,
        )
        loss = loss_fn(torch.func.functional_call(model, end, (batch.query_x[t],)), batch.query_y[t])
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        for name, grad in zip(leaves, grads, strict=True):
            total[name] += grad / batch.num_tasks
        losses.append(loss.detach())
    return total, torch.stack(losses)
