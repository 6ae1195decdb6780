"""Adaptation by proximal problems with the losses of a problem's inner batches.

Legend: T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from metamom.common.trees import Tree, mapped
from metamom.maml.estimators import InnerBatch
from metamom.maml.features import Features
from metamom.maml.finite_differences import Losses, drawing_refused_for
from metamom.maml.implicit.proximal_step import InnerProblem, proximal_step
from metamom.maml.modes import out_of_inference
from metamom.maml.predicting import losses, predictions
from metamom.maml.problem import Problem
from metamom.maml.running.run_by_task import Support
from metamom.maml.step_gradients import check_constant, check_cut
from metamom.maml.task_weights import Params, Start
from metamom.maml.vmap_errors import explained


def proximal_trajectory(
    problem: Problem, start: Start, steps: Iterable[InnerBatch], keep_graph: bool
) -> Iterator[Params]:
    """`trajectory`, in which each step is a solution of the proximal problem around the weights before it."""
    own = start.own
    yield own
    for batch in steps:
        with out_of_inference(), torch.enable_grad():
            inner = inner_problem(problem, start, batch)
            own = proximal_step(inner, own, start.kept | start.shared, keep_graph)
        yield own


def inner_problem(problem: Problem, start: Start, batch: InnerBatch) -> InnerProblem:
    """The proximal problem with the losses of an inner batch."""

    def attempt(compute: Callable[[], Any]) -> Any:
        with explained(problem.model, loop=problem.loops()), drawing_refused_for(problem.estimator):
            return compute()

    eps = max(torch.finfo(problem.autocast or w.dtype).eps for w in start.own.values())
    return InnerProblem(
        losses_of(problem, start, batch.points()),
        lambda compute: problem.vectorization.attempt(problem.parts(), lambda: attempt(compute)),
        lambda missing: check_cut(problem, missing, *batch.points()),
        lambda names: check_constant(problem, names, batch),
        problem.proximal,
        problem.proximal.tolerance_of(problem.estimator, eps),
        problem.solves,
        eps,
    )


def losses_of(
    problem: Problem, start: Start, points: tuple[Tree, Tree, Tensor | None], support: Support | None = None
) -> Callable[[Tensor | None, bool], Losses]:
    """Losses without random draws, for `metamom.maml.implicit.proximal_step.InnerProblem`."""

    def of(some: Tensor | None, constant: bool) -> Losses:
        def chosen(tree: Tree) -> Tree:
            return tree if some is None else mapped(lambda each: each[some], tree)

        x, y, mask = map(chosen, points)
        given = None if support is None else Support(*map(chosen, support))
        features = Features([x, x], graph=False) if constant else None

        def losses_at(own: Params, others: Params) -> Tensor:
            kept, shared = ({name: others[name] for name in each} for each in (start.kept, start.shared))
            there = start._replace(kept=kept if some is None else {n: w[some] for n, w in kept.items()}, shared=shared)
            predicted = predictions(problem, there, own, x, mask, support=given, draws=False, features=features)
            return losses(problem, there, own, predicted, y, mask)

        return losses_at

    return of
