"""Schedules that need no constants of the problem: normalised EF21 with four momenta (arXiv 2511.14501).

The weight of the new gradient is ``eta_t = t^-a`` and the length of a step ``gamma_t = gamma t^-b``, t = 1, 2, ...
The powers balance the terms of the bound: the distance that T steps can cover, ``1/(T gamma_T)``; the noise that the
average keeps, ``sqrt(eta_T)``; and the momentum's lag, ``gamma_T / eta_T`` for heavy ball, its square with gradients
at extrapolated points, and ``gamma_T / sqrt(eta_T)`` for a change that has noise of its own.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from metamom.common.choices import Variant
from metamom.theory import checks


class Powers(NamedTuple):
    """The powers of ``1/t`` of a variant's schedules, and of its rate.

    Attributes:
        weight: a, of the weight of the new gradient.
        step: b, of the length of a step.
        rate: of the bound on the mean gradient norm after t steps, up to logarithms.
    """

    weight: Fraction
    step: Fraction
    rate: Fraction


_POWERS: dict[Variant, Powers] = {
    "heavy-ball": Powers(Fraction(1, 2), Fraction(3, 4), Fraction(1, 4)),
    "igt": Powers(Fraction(4, 7), Fraction(5, 7), Fraction(2, 7)),
    "storm": Powers(Fraction(2, 3), Fraction(2, 3), Fraction(1, 3)),
    "hessian": Powers(Fraction(2, 3), Fraction(2, 3), Fraction(1, 3)),
}


@checks.as_stated
def variant_powers(variant: Variant) -> Powers:
    """The powers of a variant's schedules and rate.

    Args:
        variant: as of `metamom.CompositeMomentum`.

    Raises:
        ValueError: for another one.

    Example:
        >>> [str(power) for power in variant_powers("igt")]
        ['4/7', '5/7', '2/7']

    Reference: Sadiev, Demidovich, Sokolov, Malinovsky, Khirirat, Richtárik, arXiv 2511.14501.
    """
    return _POWERS[variant]


@checks.as_stated
def variant_weight(variant: Variant, t: int) -> float:
    """The weight of the new gradient in step t: ``eta_t = t^-a``.

    As ``eta_1 = 1``, the momentum starts at the first gradient.

    Args:
        variant: as of `metamom.CompositeMomentum`.
        t: number of the step, >= 1.

    Raises:
        ValueError: for another variant, or a t out of range.

    Example:
        >>> variant_weight("heavy-ball", 100)
        0.1

    Reference: arXiv 2511.14501, of which this has the powers. Its factors, if any, are left to the user.
    """
    return float(_step(t) ** -float(_POWERS[variant].weight))


@checks.as_stated
def variant_step(variant: Variant, t: int, gamma: float = 1.0) -> float:
    """The length of the normalised step t: ``gamma_t = gamma t^-b``.

    Any gamma > 0 converges at the rate of `variant_powers`. Those that suit the problem do so from the first steps.

    Args:
        variant: as of `metamom.CompositeMomentum`, with ``normalize=True``.
        t: number of the step, >= 1.
        gamma: length of the first step, > 0.

    Raises:
        ValueError: for another variant, or a number out of range.

    Example:
        >>> round(variant_step("storm", 1000, gamma=0.5), 9)
        0.005

    Reference: arXiv 2511.14501, of which this has the powers. Its factors, if any, are left to the user.
    """
    checks.positive(gamma=gamma)
    return gamma * float(_step(t) ** -float(_POWERS[variant].step))


def _step(t: int) -> float:
    checks.counts(t=t)
    return float(t)
