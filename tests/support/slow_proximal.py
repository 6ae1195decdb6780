"""Implicit MAML written to be obviously right: task by task, by Newton's method and dense Hessians."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from slow_maml import weights_of
from torch import Tensor, nn

from metamom.batch import TaskBatch

Params = dict[str, Tensor]
Loss = Callable[[Params, Tensor, Tensor], Tensor]


def loss_of(model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> tuple[Loss, Params]:
    """The loss as a function of all weights, those of a loss module among them, and these weights."""
    weights = weights_of(model)
    own = weights_of(loss_fn) if isinstance(loss_fn, nn.Module) else {}

    def loss(all_weights: Params, x: Tensor, y: Tensor) -> Tensor:
        predicted = torch.func.functional_call(model, {n: all_weights[n] for n in weights}, (x,))
        if not own:
            return loss_fn(predicted, y)
        return torch.func.functional_call(loss_fn, {n: all_weights[f"loss_fn.{n}"] for n in own}, (predicted, y))

    return loss, weights | {f"loss_fn.{n}": w for n, w in own.items()}


def hessian_of(objective: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient and, row by row, the Hessian. (torch.func's is wrong for affine layer normalisation, torch 2.13.)"""
    u = u.detach().requires_grad_()
    (g,) = torch.autograd.grad(objective(u), u, create_graph=True)
    rows = [torch.autograd.grad(g_i, u, retain_graph=True)[0] for g_i in g]
    return g.detach(), torch.stack(rows)


def slow_solution(objective: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """A local minimum by Newton's method, with steps halved until they lead down; and the Hessian there."""
    u = start.clone()
    for _ in range(30):
        g, hessian = hessian_of(objective, u)
        if float(g.norm()) < 1e-13:
            return u, hessian
        step, size = torch.linalg.solve(hessian, g), 1.0
        while objective(u - size * step) > objective(u) and size > 1e-3:
            size /= 2
        u = u - size * step
    return u, hessian


def slow_implicit(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batch: TaskBatch,
    strength: float,
    adapted: Collection[str] | None = None,
) -> tuple[Params, Tensor]:
    """The mean over the tasks of the meta-gradient, ``(I + H/lambda)^-1 grad L_q`` in w, and the losses ``[T]``."""
    loss, weights = loss_of(model, loss_fn)
    adapted = [n for n in weights if not n.startswith("loss_fn.")] if adapted is None else list(adapted)
    rest = {n: w for n, w in weights.items() if n not in adapted}
    w = torch.cat([weights[n].detach().flatten() for n in adapted])

    def of(u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = zip(adapted, u.split([weights[n].numel() for n in adapted]), strict=True)
        return loss({**rest, **{n: part.view(weights[n].shape) for n, part in parts}}, x, y)

    totals = {n: torch.zeros_like(x) for n, x in weights.items()}
    losses = []
    for x, y, query_x, query_y in zip(*batch[:4], strict=True):

        def objective(u: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            return of(u, x, y) + strength / 2 * ((u - w) ** 2).sum()

        u, hessian = slow_solution(objective, w)  # of the support loss, plus lambda
        u.requires_grad_()
        asked = of(u, query_x, query_y)
        in_u, *direct = torch.autograd.grad(asked, [u, *rest.values()])
        z = torch.linalg.solve(hessian, in_u)
        for n, part in zip(adapted, (strength * z).split([weights[n].numel() for n in adapted]), strict=True):
            totals[n] += part.view(weights[n].shape)
        if rest:
            (g,) = torch.autograd.grad(of(u, x, y), u, create_graph=True)
            mixed = torch.autograd.grad(g @ z, [*rest.values()])
            for n, a, b in zip(rest, direct, mixed, strict=True):
                totals[n] += a - b
        losses.append(asked.detach())
    return {n: total.detach() / len(losses) for n, total in totals.items()}, torch.stack(losses)
