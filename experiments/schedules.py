"""Schedules of the step size: ``constant``, ``cosine:N``, ``power:P``, ``plateau:FACTOR,PATIENCE``, after a warm-up.

β has ``power:P`` too, and so has the workers' own weight η.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from metamom.bias import EF21SGDM, BiasOperator, LambdaEta
from metamom.common.checks import MOST, check_whole
from metamom.common.numbers import real, shown, whole
from metamom.experiments.defaults import PLATEAU
from metamom.optim import LambdaBeta


class Schedule(NamedTuple):
    """A parsed schedule.

    Attributes:
        kind: what it does.
        length: iterations of the cosine; ``None`` for all that remain after the warm-up.
        factor: of the step size at a plateau.
        patience: validations without improvement before that.
        power: P, of 1/t; ``None`` for that of the variant of the momentum.
    """

    kind: Literal["constant", "cosine", "plateau", "power"]
    length: int | None = None
    factor: float = PLATEAU[0]
    patience: int = PLATEAU[1]
    power: float | None = None


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
        if kind == "power":
            return Schedule("power", power=_power(rest) if colon else None)
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
        f"plateau:FACTOR,PATIENCE, or power:P such as power:3/4; got {shown(text)}{why}."
    )


def parse_beta_schedule(text: str) -> Schedule:
    """Parse the SPEC of a schedule of β.

    Raises:
        ValueError: for anything but ``power:P``, ``power`` or ``constant``.
    """
    schedule = parse_schedule(text)
    if schedule.kind not in ("constant", "power"):
        raise ValueError(f"the schedule of beta is constant, or power:P such as power:1/2; got {shown(text)}.")
    return schedule


def with_power(text: str, power: Fraction | None) -> str:
    """The schedule with the power that ``power`` alone stands for.

    Args:
        text: the schedule.
        power: of the variant of the momentum; ``None`` without one.

    Raises:
        ValueError: for ``power`` alone without a variant.
    """
    schedule = parse_schedule(text)
    if schedule.kind != "power" or schedule.power is not None:
        return text
    if power is None:
        raise ValueError("the schedule power takes its P from the variant: choose one (--variant), or write power:P.")
    return f"power:{power}"


def _power(text: str) -> float:
    above, slash, below = text.partition("/")
    power = real(above) / (real(below) or math.nan) if slash else real(above)
    if not 0 < power <= 1:
        raise ValueError(f"P must be in (0, 1]; got {text}.")
    return power


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
    if schedule.kind == "power":
        return [LambdaLR(optimizer, _power_factor(_given(schedule), warmup or 0))]
    return [LambdaLR(optimizer, _factor(schedule.length, warmup or 0))]


def make_beta_schedulers(
    text: str | None, optimizer: Optimizer, operator: BiasOperator | None = None
) -> list[LambdaBeta] | list[LambdaEta]:
    """The scheduler of β, if any: ``beta t^-P`` in iteration t = 1, 2, ...

    Args:
        text: the schedule.
        optimizer: with the beta.
        operator: if the workers carry the momentum, its eta is scheduled instead.

    Raises:
        ValueError: for an operator whose eta cannot be scheduled.
    """
    if text is None or parse_beta_schedule(text).kind == "constant":
        return []
    factor = _power_factor(_given(parse_beta_schedule(text)), 0)
    if operator is None or not operator.carries_momentum:
        return [LambdaBeta(optimizer, factor)]
    if not isinstance(operator, EF21SGDM):
        raise ValueError(
            f"the schedule of beta is that of the workers' momentum, which {operator.spec} does not have: use "
            "ef21-sgdm(ETA):A, or no schedule (--beta-schedule)."
        )
    return [LambdaEta(operator, factor)]


def _given(schedule: Schedule) -> float:
    if schedule.power is None:
        raise ValueError("a schedule power needs its P: power:P, or a recipe with a variant.")
    return schedule.power


def _power_factor(power: float, warmup: int) -> Callable[[int], float]:
    """The factor by the number of steps done: ``t^-P`` in iteration t = 1, 2, ... after the warm-up."""

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else float(step - warmup + 1) ** -power

    return factor


def _factor(length: int | None, warmup: int) -> Callable[[int], float]:
    """The factor of the step size by the number of steps done."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if length is None:
            return 1.0
        return max(1 + math.cos(math.pi * min(step - warmup, length) / length), 1e-6) / 2

    return factor
