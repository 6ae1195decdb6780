"""Adaptations with the query losses that they lead to: what an estimator differentiates.

Legend: T tasks, c copies of each, n workers, Q query points.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.common.trees import Tree, count, joined
from metamom.maml.estimators import ESTIMATORS, Adaptations, InnerBatch
from metamom.maml.implicit.perturbed import perturbed_losses
from metamom.maml.implicit.proximal_adaptation import inner_problem, losses_of
from metamom.maml.inner_loop import trajectory
from metamom.maml.inner_step import straight_through
from metamom.maml.predicting import losses, predictions
from metamom.maml.problem import Problem, start_of
from metamom.maml.running.run_by_task import Support
from metamom.maml.task_weights import Params, Start
from metamom.maml.tracking import tracked


class Episodes(NamedTuple):
    """The results of T·c adaptations.

    Attributes:
        losses: query losses ``[T·c]``, after the last inner step.
        objective: what is differentiated, ``[T·c]``: these, or the weighted sums of those after each step.
        predictions: on the query sets, ``[T·c, Q, ...]``, a tensor or a tree.
        adapted: the adapted weights that made them, ``[T·c, *shape]``.
    """

    losses: Tensor
    objective: Tensor
    predictions: Tree
    adapted: Params


def episodes(problem: Problem, rows: Params, term: Adaptations, memory: Params, *, thin: bool = True) -> Episodes:
    """Adapt from the workers' parameters ``[n, *shape]`` and compute the query losses.

    Args:
        problem: the model and loss.
        rows: the workers' meta-parameters.
        term: the inner batches and the query sets.
        memory: the moving averages of a tracked estimator; empty for other estimators.
        thin: see `trajectory`; for graphs that are differentiated before anything else changes the weights.
    """
    start, outer = start_of(problem, rows, count(term.query_x), term.steps[0]), problem.rule.outer
    if ESTIMATORS[problem.estimator].perturbs and torch.is_grad_enabled():
        return _perturbed_episodes(problem, start, term)
    keep_graph, given = torch.is_grad_enabled() and outer is None, support_of(problem, term)

    def queried(adapted: Params, steps: int) -> tuple[Tensor, Tree]:
        there = start.at(steps)
        predicted = predictions(problem, there, adapted, term.query_x, term.query_mask, support=given)
        return losses(problem, there, adapted, predicted, *term.query()[1:]), predicted

    _, *before, adapted = trajectory(problem, start, term.steps, keep_graph, thin=thin)
    if memory:
        adapted = tracked(memory, adapted, lambda weights: _step_from(problem, weights, term.steps[0]))
    with nullcontext() if outer is None else torch.no_grad():
        last, predicted = queried(adapted, len(term.steps))
    objective = last if outer is None else outer(start.own, adapted, last)
    if problem.objective is not None:
        each = [queried(weights, number)[0] for number, weights in enumerate(before, 1)]
        objective = torch.stack([*each, last], 1) @ problem.objective.to(last)
    return Episodes(last, objective, predicted, adapted)


def _perturbed_episodes(problem: Problem, start: Start, term: Adaptations) -> Episodes:
    """`episodes` at the solutions of the proximal problem, with the derivatives of perturbed solutions."""
    with torch.no_grad():
        *_, adapted = trajectory(problem, start, term.steps, keep_graph=False)
        given = support_of(problem, term)
        predicted = predictions(problem, start, adapted, term.query_x, term.query_mask, support=given)
        values = losses(problem, start, adapted, predicted, *term.query()[1:])
    inner = inner_problem(problem, start, term.steps[0])
    query = losses_of(problem, start, term.query(), given)
    surrogate = perturbed_losses(inner, query, start.own, start.kept | start.shared, adapted)
    return Episodes(values, straight_through(values, surrogate), predicted, adapted)


def support_of(problem: Problem, term: Adaptations) -> Support | None:
    """The points that the inner steps take their gradients from, if normalisations use their statistics."""
    if problem.norm != "support":
        return None
    distinct = list({id(step.x): step for step in term.steps}.values())
    if len(distinct) == 1:
        return Support(distinct[0].x, distinct[0].mask)
    return Support(joined(partial(torch.cat, dim=1), [step.x for step in distinct]), None)  # a split set has no mask


def _step_from(problem: Problem, weights: Params, batch: InnerBatch) -> Params:
    """One inner step from each task's own weights ``[T, *shape]``, without a graph."""
    own = {name: w for name, w in weights.items() if name in problem.adapted}
    kept = {name: w for name, w in weights.items() if name not in own}
    *_, adapted = trajectory(problem, Start(own, kept, {}, {}), [batch], keep_graph=False)
    return adapted
