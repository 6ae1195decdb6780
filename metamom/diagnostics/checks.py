"""Checks of the arguments of the bias meter, before anything is computed."""

from __future__ import annotations

import math

from metamom.batch import TaskBatch
from metamom.bias import BiasOperator
from metamom.common.checks import AT_ONCE, check_number, check_whole
from metamom.common.kinds import named_type
from metamom.diagnostics.sources import half_points, pairs, points_per_shot
from metamom.maml.estimators import ESTIMATORS, memoryless_estimators
from metamom.maml.inner_optimizer import check_inner_optimizer
from metamom.maml.learner import MAML


def check_plan(
    learner: MAML,
    operator: BiasOperator | None,
    sizes: tuple[int, ...],
    draws: int,
    each: int,
    queries: int | None,
    confidence: float,
) -> None:
    """Check the arguments of `metamom.diagnostics.measure`.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: for one that is out of range, an estimator with a memory, or an operator with error feedback.
    """
    if not isinstance(learner, MAML):
        raise TypeError(f"wanted a learner, MAML(model, loss_fn, ...); got {named_type(learner)}.")
    if learner.kind not in ("maml", "boil"):
        raise ValueError(
            f"the bias is measured for the meta-gradients of MAML; got a learner of kind {learner.kind!r}, which has "
            "another one. Measure MAML(learner.model, learner.loss_fn, ...) at the same weights."
        )
    if learner.estimator not in memoryless_estimators():
        raise ValueError(
            f"the bias is measured for estimators without memory: {', '.join(memoryless_estimators())}; got "
            f"{learner.estimator!r}, which remembers earlier steps. Measure one of these at the same weights "
            "(--estimator)."
        )
    reference = ESTIMATORS[learner.estimator].reference
    try:
        check_inner_optimizer(reference, learner.inner_optimizer)
    except ValueError:
        raise ValueError(
            f"the bias is measured against estimator {reference!r}, which takes steps of inner_optimizer 'sgd' or "
            f"'momentum:0.9' only; got {learner.inner_optimizer.spec!r}. Measure a learner with one of these at the "
            "same weights."
        ) from None
    for size in sizes:
        check_whole("an inner batch", size, -math.inf, AT_ONCE)
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"inner_batches must be one or more different numbers of shots >= 1; got {sizes}.")
    if check_whole("draws", draws, -math.inf, AT_ONCE) < 3:
        raise ValueError(f"an interval needs at least 3 draws; got draws={draws}.")
    for name, value in (("tasks_per_worker", each), ("queries", queries)):
        if value is not None or name == "tasks_per_worker":
            check_whole(name, value, 1, AT_ONCE)
    check_number("confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1); got {confidence}. 95 % is 0.95.")
    if operator is not None and operator.keeps_start:
        raise ValueError(
            f"{operator.spec} starts at what its last step found, which a single draw does not show. Measure "
            f"{operator.spec}:fresh, which keeps nothing."
        )
    if operator is not None and operator.feeds_back:
        raise ValueError(
            f"{operator.spec} has error feedback: its bias depends on all earlier gradients, which a single draw "
            "does not show. Measure the operator inside it, such as topk:5%."
        )


def check_pool(learner: MAML, pool: TaskBatch, sizes: tuple[int, ...], queries: int | None) -> None:
    """Check the pool before anything is computed."""
    shot = points_per_shot(pool)
    if queries is not None and queries * shot > pool.query_x.shape[1]:
        raise ValueError(
            f"queries={queries} shots are more than the {pool.query_x.shape[1] // shot} that the sampler draws."
        )
    for m in sizes:
        pairs(pool, half_points(learner, m, pool))
