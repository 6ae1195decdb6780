"""ReduceLROnPlateau, which advances at each validation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from metamom.evaluation import Evaluation

# these set the step size from its first value at each step, whatever it is now
_ABSOLUTE = ("LambdaLR", "OneCycleLR", "CyclicLR", "CosineAnnealingWarmRestarts")


def check_plateaus(schedulers: Iterable[Any], validates: bool) -> None:
    """Refuse schedulers that would never advance, or would be undone by another one.

    Args:
        schedulers: of the run.
        validates: whether the run validates before its end.

    Raises:
        ValueError: with what to do.
    """
    schedulers = list(schedulers)
    if not any(isinstance(each, ReduceLROnPlateau) for each in schedulers):
        return
    if not validates:
        raise ValueError(
            "ReduceLROnPlateau (--schedule plateau) advances at each validation: pass validation= and evaluate_every= "
            "(--evaluate-every N)."
        )
    for each in schedulers:
        if isinstance(each, tuple(getattr(lr_scheduler, name) for name in _ABSOLUTE)):
            raise ValueError(
                f"{type(each).__name__} computes each step size from the first one, and so undoes what "
                "ReduceLROnPlateau does: use one of them, or a scheduler that multiplies, such as LinearLR."
            )


def advance(scheduler: ReduceLROnPlateau, validation: Evaluation) -> None:
    """Advance after a validation. With ``mode="min"``, an accuracy counts as ``1 - accuracy``.

    Raises:
        ValueError: for a loss with ``mode="max"``, for which falling losses would be a plateau.
    """
    value = validation.mean[0]
    if validation.metric == "accuracy":
        value = 1 - value if scheduler.mode == "min" else value
    elif scheduler.mode == "max":
        raise ValueError('the validation is a loss, which is to fall: make ReduceLROnPlateau with mode="min".')
    scheduler.step(value)
