"""A learner in one line: its model, its loss and the options that decide what it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metamom.bias.function import function_name
from metamom.common.summaries import summary
from metamom.maml.estimators import ESTIMATORS

if TYPE_CHECKING:
    from metamom.maml.configured import Configured


def representation(learner: Configured) -> str:
    """What `repr` gives."""
    model, loss = learner.model, learner.loss_fn
    every = set(learner._movable()) == set(learner.adapted)
    step_sizes = learner.inner_lr if learner.step_sizes.kind is False else f"learned ({learner.step_sizes.kind})"
    values = {
        "inner_lr": "by parameter" if isinstance(step_sizes, dict) else step_sizes,
        "inner_steps": learner.inner_steps,
        "positive_inner_lr": learner.step_sizes.positive or None,
        "estimator": learner.estimator,
        "inner_batches": None if learner.inner_batches == "same" else learner.inner_batches,
        "tracking": None if learner.memory is None else learner.memory.tracking,
        "proximal": learner.proximal.spec if ESTIMATORS[learner.estimator].proximal else None,
        **({} if learner.annealing is None else learner.annealing.describe()),
        "step_norms": None if learner.norms_by_step is None else True,
        "inner_optimizer": None if learner.inner_optimizer.plain else learner.inner_optimizer.spec,
        "adapt": None if every or learner.kind == "boil" else learner.adapted,
        "head": getattr(learner, "head", None),
        "norm": learner.norm,
    }
    size = f"{type(model).__name__} of {sum(p.numel() for p in model.parameters()):,} parameters"
    return summary(type(learner).__name__, values, size, function_name(loss).rpartition(".")[2])
