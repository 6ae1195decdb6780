"""What a run takes as schedulers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metamom.common.kinds import named_type
from metamom.optim import LambdaBeta


@runtime_checkable
class Scheduler(Protocol):
    """Anything that advances after each step: torch's LR schedulers, `metamom.optim.LambdaBeta`."""

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


Schedulers: TypeAlias = Scheduler | ReduceLROnPlateau | Sequence[Scheduler | ReduceLROnPlateau]


def as_schedulers(schedulers: Schedulers, optimizer: Optimizer) -> list[Scheduler | ReduceLROnPlateau]:
    """Convert one scheduler or several to a list.

    Raises:
        TypeError: for anything but a scheduler.
        ValueError: for a scheduler of another optimizer, which would have no effect.
    """
    if not isinstance(schedulers, (Scheduler, Iterable)):
        raise TypeError(f"schedulers are one or a list of them, such as LambdaLR(optimizer, ...); got {schedulers!r}.")
    found: list[Scheduler | ReduceLROnPlateau]
    found = [schedulers] if isinstance(schedulers, (Scheduler, ReduceLROnPlateau)) else list(schedulers)
    scheduler: Any
    for scheduler in found:
        if isinstance(scheduler, (LRScheduler, LambdaBeta)) and scheduler.optimizer is not optimizer:
            raise ValueError(
                f"{type(scheduler).__name__} schedules another optimizer than the one that trains, so that it would "
                "change nothing: make it of this one."
            )
        if isinstance(scheduler, (type, Optimizer)) or not isinstance(scheduler, Scheduler):
            wanted = "LambdaLR(optimizer, ...) or LambdaBeta(optimizer, ...)"
            raise TypeError(f"schedulers are such as {wanted}; got {named_type(scheduler)}.")
    return found
