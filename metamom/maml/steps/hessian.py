"""Hessian-vector products of the meta-loss, exactly: the meta-gradient differentiated once more.

Legend: T tasks, n workers with T/n tasks each, d entries of all meta-parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.batch import TaskBatch, block
from metamom.maml.chunk_gradient import estimated_losses
from metamom.maml.chunking import spans
from metamom.maml.gradient import MetaGradients
from metamom.maml.inner_step import gradients
from metamom.maml.plan import Plan
from metamom.maml.running.plain_autograd import uncompiled
from metamom.maml.steps.third_derivatives import ThirdDerivatives
from metamom.maml.task_weights import Params
from metamom.maml.under_vmap.draws import Step
from metamom.server.aggregate import flatten


def check_has_hessian(plan: Plan) -> None:
    """Refuse estimators that do not compute the gradient of a function.

    Raises:
        ValueError: with what to use.
    """
    if plan.problem.estimator != "exact" or plan.problem.rule.outer is not None:
        raise ValueError(
            'variant="hessian" needs meta-gradients that are the gradient of a function, as MAML with '
            f'estimator="exact" has; got estimator={plan.problem.estimator!r}. Use variant="storm".'
        )


def hessian_products(
    computer: MetaGradients, weights: Params, along: Params, batch: TaskBatch, workers: int, number: int = 0
) -> Tensor:
    """Each worker's Hessian of the mean query loss of its tasks, times one direction.

    Args:
        computer: says how the meta-gradients are computed.
        weights: the meta-parameters by name.
        along: the direction, of some of them; the others' part is zero.
        batch: T tasks.
        workers: n, must divide T.
        number: the index of the first task in the batch of all processes, which seeds a random model's draws.

    Returns:
        ``[n, d]``, the parameters flattened in order, without a graph.

    Raises:
        ValueError: as `check_has_hessian`, and as `metamom.MAML.meta_gradient`.
    """
    plan = computer.plan()
    plan.check(batch)
    check_has_hessian(plan)
    per_worker = len(block(batch.num_tasks, 0, workers))
    first = next(iter(weights.values()))
    total = torch.zeros(workers, sum(w.numel() for w in weights.values()), dtype=first.dtype, device=first.device)
    step = Step()
    for start, stop in spans(batch.num_tasks, computer.chunk_size(plan, batch), per_worker):
        mine = slice(start // per_worker, -(-stop // per_worker))
        with step.tasks(number + start, stop - start), torch.enable_grad(), uncompiled(), ThirdDerivatives():
            count = mine.stop - mine.start
            rows = {name: w.detach().expand(count, *w.shape).requires_grad_() for name, w in weights.items()}
            losses = estimated_losses(plan, rows, batch.part(start, stop))
            total[mine] += flatten(_product(losses.sum() / per_worker, rows, along))
    return total


def _product(loss: Tensor, rows: Params, along: Params) -> list[Tensor]:
    """The second derivative of a sum of the workers' losses, along the same direction for each. ``[n, *shape]``."""
    first = gradients(loss, [*rows.values()], create_graph=True)
    terms = [
        (grad * along[name].detach()).sum()
        for name, grad in zip(rows, first, strict=True)
        if grad is not None and name in along
    ]
    slopes = torch.stack(terms).sum() if terms else loss.new_zeros(())
    second = gradients(slopes, [*rows.values()])
    return [torch.zeros_like(w) if h is None else h.detach() for w, h in zip(rows.values(), second, strict=True)]
