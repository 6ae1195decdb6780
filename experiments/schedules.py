"""Schedules of the step size: ``constant``, ``cosine``, ``cosine:N``, ``plateau:FACTOR,PATIENCE``, after a warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from metamom.common.checks import MOST, check_whole
from metamom.common.numbers import real, shown, whole
from metamom.experiments.defaults import PLATEAU


class Schedule(NamedTuple):
    """A parsed schedule.

    Attributes:
        kind: what it does.
        length: iterations of the cosine; ``None`` for all that remain after the warm-up.
        factor: of the step size at a plateau.
        patience: validations without improvement before that.
    """

    kind: Literal["constant", "cosine", "plateau"]
    length: int | None = None
    factor: float = PLATEAU[0]
    patience: int = PLATEAU[1]


def parse_schedule(text: str) -> Schedule:
    """Parse the SPEC of a schedule.

    Raises:
        ValueError: for any other text.
    """
    kind, colon, rest = text.partition(":")
    why = ""
    try:
        if text == "constant":
            return Schedule("constant")
        if kind == "cosine":
            return Schedule("cosine", check_whole("N", whole(rest), 1, MOST) if colon else None)
        if kind == "plateau":
            factor, comma, patience = rest.partition(",")
            found = Schedule(
                "plateau",
                factor=real(factor) if colon else PLATEAU[0],
                patience=check_whole("PATIENCE", whole(patience), 0, MOST) if comma else PLATEAU[1],
            )
            if not 0 < found.factor < 1:
                raise ValueError(f"FACTOR must be in (0, 1); got {found.factor}.")
            return found
    except ValueError as error:
        why = f" ({str(error).removesuffix('.')})"
    raise ValueError(
        "the schedule is constant, or cosine:N with N iterations >= 1, or cosine for all iterations, or "
        f"plateau:FACTOR,PATIENCE; got {shown(text)}{why}."
    )


def over(text: str, warmup: int | None, iterations: int) -> str:
    """The schedule of a run of so many iterations: ``cosine`` becomes ``cosine:N``.

    Raises:
        ValueError: if nothing remains after the warm-up.
    """
    schedule = parse_schedule(text)
    if schedule.kind != "cosine" or schedule.length is not None:
        return text
    if iterations <= (warmup or 0):
        raise ValueError(
            f"a cosine begins after the warm-up, which takes {warmup} of the {iterations} iterations: choose a shorter "
            "one (--warmup)."
        )
    return f"cosine:{iterations - (warmup or 0)}"


def make_schedulers(
    text: str, warmup: int | None, optimizer: Optimizer
) -> list[LambdaLR | LinearLR | ReduceLROnPlateau]:
    """The schedulers of the optimizer's step size γ.

    In the first ``warmup`` iterations it is γ/warmup, 2γ/warmup, ..., γ. After them comes the schedule.

    Raises:
        ValueError: for a cosine without a length.
    """
    schedule = parse_schedule(text)
    if schedule.kind == "plateau":  # it multiplies, and so must the warm-up
        plateau = ReduceLROnPlateau(optimizer, factor=schedule.factor, patience=schedule.patience)
        if warmup is None or warmup == 1:
            return [plateau]
        return [LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1), plateau]
    if schedule.kind == "cosine" and schedule.length is None:
        raise ValueError("a cosine over all iterations needs their number: Recipe.over(iterations), or cosine:N.")
    if schedule.kind == "constant" and warmup is None:
        return []
    return [LambdaLR(optimizer, _factor(schedule.length, warmup or 0))]


def _factor(length: int | None, warmup: int) -> Callable[[int], float]:
    """The factor of the step size by the number of steps done."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if length is None:
            return 1.0
        return max(1 + math.cos(math.pi * min(step - warmup, length) / length), 1e-6) / 2

    return factor
