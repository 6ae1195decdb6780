"""A run whose momentum follows the weights: what does not go with it, and which optimizer the gradients are for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from metamom.bias import BiasOperator, LambdaEta
from metamom.common.choices import FOLLOWING
from metamom.distributed import World
from metamom.maml.learner import MAML
from metamom.maml.steps.following import check_alone, check_variant
from metamom.optim import CompositeMomentum
from metamom.server.robust import RobustMean
from metamom.training.options import Options
from metamom.training.plan import federation


def following(optimizer: Optimizer) -> CompositeMomentum | None:
    """The optimizer, if its variant takes gradients elsewhere too; else ``None``."""
    return optimizer if isinstance(optimizer, CompositeMomentum) and optimizer.variant in FOLLOWING else None


def check_following(
    learner: MAML, optimizer: Optimizer, operator: BiasOperator | None, options: Options, world: World
) -> None:
    """Refuse options of a run that the optimizer's variant does not go with.

    Raises:
        ValueError: with what to use instead.
    """
    ours = following(optimizer)
    if ours is None:
        return
    assert ours.variant is not None
    check_variant(learner._plan(), ours.variant, operator, options.workers, world)
    check_alone(ours.variant, federation(options, options.local_lr), RobustMean(options.aggregate, options.attack))
    if options.clip_grad is not None and ours.variant != "igt":
        raise ValueError(
            f"clip_grad (--clip-grad) scales one gradient a step, and variant={ours.variant!r} takes the difference of "
            "two: use normalize=True (--normalize) for steps of bounded length."
        )


def check_eta_schedules(schedulers: Iterable[Any], operator: BiasOperator | None) -> None:
    """Refuse a schedule of another operator's eta, which would change nothing.

    Raises:
        ValueError: saying so.
    """
    for each in schedulers:
        if isinstance(each, LambdaEta) and each.operator is not operator:
            raise ValueError(
                "LambdaEta schedules another operator than the run's, so that it would change nothing: make it of the "
                "operator that is passed as bias."
            )
