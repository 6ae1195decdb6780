"""The workers' meta-gradients on one chunk of tasks, and its losses with their graph, as functions of the weights.

Legend: T tasks, n workers, d entries of all meta-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from metamom.batch import TaskBatch
from metamom.common.trees import lone, restored
from metamom.compile.tracing import is_tracing
from metamom.maml.checks.unused import from_outside
from metamom.maml.episodes import episodes, support_of
from metamom.maml.estimators import Adaptations
from metamom.maml.fast_paths.at_once import AT_ONCE
from metamom.maml.fast_paths.in_turn import IN_TURN
from metamom.maml.fast_paths.settled import Computed, by_fast_path_or
from metamom.maml.inner_step import gradients, straight_through
from metamom.maml.plan import Plan
from metamom.maml.step_gradients import check_cut
from metamom.maml.task_weights import Params
from metamom.maml.vmap_errors import explained
from metamom.nets.low_rank import plain
from metamom.server.aggregate import flatten

FAST_PATHS = (AT_ONCE, IN_TURN)


def chunk_gradient(
    plan: Plan,
    weights: Params,
    memory: Params,
    workers: int,
    scale: float,
    form: TreeSpec,
    *batch: Tensor,
    starts: Params | None = None,
) -> tuple[Tensor, ...]:
    """Query losses, predictions, tracked averages, and each worker's gradient of ``scale`` times the sum of losses.

    The batch comes as its form and its tensors (`metamom.common.trees.flattened`), as compiled graphs take it. The
    result is a flat tuple, as they return it. Gradients are ``[workers, *shape]`` for each parameter. In a graph they
    are ``[workers, d]``, unless a weight is not contiguous: a compiler would reorder it entry by entry in the middle of
    the sum over tasks. With ``starts`` ``[workers, *shape]``, each worker's gradient is that at its own weights.
    """
    fields = restored(form, batch)
    tasks = TaskBatch(*fields[:4])._replace(support_mask=fields[4], query_mask=fields[5])
    with torch.enable_grad():
        terms = plan.cut(tasks)
        general = partial(_general_path, plan, weights, memory, workers, scale, terms, starts)
        if len(terms) > 1 or memory or starts is not None or is_tracing():
            return general()
        given = plan.problem, weights, terms[0], workers, scale * terms[0].weight
        return by_fast_path_or(FAST_PATHS, *given, otherwise=general, finish=_flat)


def _flat(found: Computed) -> tuple[Tensor, ...]:
    return found.losses, found.predictions, *found.gradients.values()


def _general_path(
    plan: Plan,
    weights: Params,
    memory: Params,
    workers: int,
    scale: float,
    terms: Sequence[Adaptations],
    starts: Params | None,
) -> tuple[Tensor, ...]:
    """`chunk_gradient` of these adaptations, with the weights of all tasks in one tensor for each parameter."""
    problem = plan.problem
    first: tuple[Tensor, ...] = ()
    totals: list[Tensor] = []
    with torch.enable_grad():
        rows = {
            name: (w.detach().expand(workers, *w.shape) if starts is None else starts[name].detach()).requires_grad_()
            for name, w in weights.items()
        }
        around = {} if is_tracing() else weights  # the losses may depend on these through the rows only
        for term in terms:
            found = episodes(problem, rows, term, memory)
            with explained(problem.model, loop=problem.loops()):
                grads = gradients(found.objective.sum() * (scale * term.weight), [*rows.values(), *around.values()])
            past = [name for name, grad in zip(around, grads[len(rows) :], strict=True) if grad is not None]
            if past:
                raise from_outside(past)
            own = dict(zip(rows, grads[: len(rows)], strict=True))
            missing = [name for name, grad in own.items() if grad is None]
            check_cut(problem, missing, *term.query(), support_of(problem, term))
            new = [torch.zeros_like(rows[name]) if grad is None else plain(grad) for name, grad in own.items()]
            if not totals:
                averages = [plain(u).detach() for u in found.adapted.values()] if memory else []
                judged = lone(found.predictions)
                judged = found.losses.new_empty(len(found.losses), 0) if judged is None else judged
                first = found.losses.detach()[:: term.copies], judged.detach()[:: term.copies], *averages
            totals = [a + b for a, b in zip(totals, new, strict=True)] if totals else new
    if is_tracing() and all(w.is_contiguous() for w in weights.values()):
        totals = [flatten(totals)]
    return *first, *totals


def estimated_losses(plan: Plan, rows: Params, batch: TaskBatch) -> Tensor:
    """The tasks' query losses ``[T]`` as functions of the workers' parameters ``[n, *shape]``, with their graph."""
    memory = plan.recall(batch)
    thin = not torch.is_grad_enabled()  # the caller may keep the graph
    found = [(term, episodes(plan.problem, rows, term, memory, thin=thin)) for term in plan.cut(batch)]
    each = [(term, results.objective.view(-1, term.copies)) for term, results in found]
    first = found[0][1].losses.view(-1, found[0][0].copies)[:, 0]
    if len(each) == 1 and each[0][0].copies == 1 and plan.problem.objective is None:
        return each[0][1][:, 0]
    return straight_through(first, torch.stack([term.weight * losses.sum(1) for term, losses in each]).sum(0))
