"""When momentum oscillates on a quadratic instead of settling, and which beta stops it.

Along an axis of curvature lam, with ``c = gamma lam``: ``x_{k+1} = (2 - beta - beta c) x_k - (1 - beta) x_{k-1}``. Its
roots are complex, and x oscillates, for c between ``(1 - r)/(1 + r)`` and ``(1 + r)/(1 - r)``, ``r = sqrt(1 - beta)``.
The oscillation decays as ``r^k``, whatever gamma.
"""

from __future__ import annotations

from math import cos, pi, sqrt

from metamom.theory import checks


@checks.as_stated
def critical_beta(step: float) -> float:
    """The smallest beta that does not oscillate at ``step = gamma lam <= 1``: ``4 step / (1 + step)^2``.

    Args:
        step: gamma times the largest curvature, in (0, 1]; beyond 1 even plain SGD overshoots the minimum.

    Raises:
        ValueError: for a step out of its range.

    Example:
        >>> round(critical_beta(0.1), 6)
        0.330579

    Reference: docs/theory/quadratics.md, "Oscillation".
    """
    if not 0 < step <= 1:
        raise ValueError(
            f"step = gamma lam must be in (0, 1]; got {step!r}. Beyond 1 every beta overshoots: lower gamma."
        )
    return 4 * step / (1 + step) ** 2


@checks.as_stated
def swinging_step(beta: float, period: float) -> float:
    """``gamma lam`` of an axis with this period of oscillation: ``(2 - beta - 2 r cos(2 pi/period)) / beta``.

    The loss oscillates twice as fast as x around its minimum. Off the minimum (bias, or other axes), it oscillates as
    fast as x.

    Args:
        beta: in (0, 1).
        period: the period of x in steps, >= 2.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(swinging_step(beta=0.19, period=4), 6)  # cos = 0
        9.526316

    Reference: docs/theory/quadratics.md, "Oscillation".
    """
    checks.share(beta=beta)
    if not period >= 2:
        raise ValueError(f"an oscillation takes 2 steps or more; got period={period!r}.")
    return (2 - beta - 2 * sqrt(1 - beta) * cos(2 * pi / period)) / beta
