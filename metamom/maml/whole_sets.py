"""Adaptation on whole support sets, and predictions with the adapted weights.

Legend: T tasks, S support points, N points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from metamom.common.checks import check_whole
from metamom.common.trees import Tree, count
from metamom.maml.checks.batch_checks import check_mask, check_set
from metamom.maml.estimators import InnerBatch
from metamom.maml.features import shared
from metamom.maml.inner_loop import trajectory
from metamom.maml.modes import differentiable
from metamom.maml.normalisation.step_norms import after
from metamom.maml.predicting import predictions
from metamom.maml.problem import Problem, start_of
from metamom.maml.running.run_by_task import Support
from metamom.maml.task_weights import Params, Start


def adaptations(
    problem: Problem,
    parameters: Params,
    support_x: Tree,
    support_y: Tree,
    steps: int,
    mask: Tensor | None = None,
    *,
    keep_graph: bool = False,
) -> Iterator[Params]:
    """The adapted parameters, ``[T, *shape]``, after 0, 1, ..., ``steps`` inner steps.

    Args:
        problem: the model, and how it adapts.
        parameters: the meta-parameters.
        support_x: ``[T, S, ...]``.
        support_y: ``[T, S, ...]`` or ``None``.
        steps: number of inner steps >= 0.
        mask: the points that count, ``[T, S]``; all by default.
        keep_graph: whether the results are differentiable in the meta-parameters.

    Raises:
        ValueError: for sets and numbers of steps that do not fit.
    """
    steps = check_whole("the number of inner steps", steps, 0)
    check_set("support", support_x, support_y, empty=steps == 0)
    check_mask("support", support_x, mask)
    whole = InnerBatch(differentiable(support_x), differentiable(support_y), None, mask)
    rows = {name: (p if keep_graph else p.detach()).unsqueeze(0) for name, p in parameters.items()}
    start = start_of(problem, rows, count(support_x), whole)
    found = trajectory(problem, start, [whole] * steps, keep_graph=keep_graph)
    return ({**own, **after(start.norms, step)} for step, own in enumerate(found))


def predicted(problem: Problem, params: Params, x: Tree, mask: Tensor | None, support: Support | None) -> Any:
    """Predict ``[T, N, ...]`` from ``x: [T, N, ...]`` with each task's weights; see `metamom.MAML.predict`."""
    start = Start(params, {}, {}, {})
    return predictions(problem, start, params, differentiable(x), mask, support=support, features=shared())
