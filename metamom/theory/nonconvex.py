"""Theorem 1A: momentum with biased gradients on a smooth function. The other files refine this bound.

Legend: ``v <- (1 - beta) v + beta g``, ``x <- x - gamma v``, ``v_{-1} = 0``; ``g - grad f = bias + noise`` with
``||bias||^2 <= B ||grad f||^2 + b2`` and ``E ||noise||^2 <= M ||grad f||^2 + sigma2``.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import NamedTuple

from metamom.theory import checks


class Terms(NamedTuple):
    """The terms of a bound on the mean of ``||grad f||^2``.

    Attributes:
        distance: the term from the start; it decreases as 1/K.
        bias: the term from the bias, which does not depend on K, gamma, beta or the number of workers.
        noise: the term from the noise; it decreases with gamma and with the number of workers.
    """

    distance: float
    bias: float
    noise: float

    @property
    def total(self) -> float:
        """The bound."""
        return self.distance + self.bias + self.noise


@checks.as_stated
def max_step(L: float, beta: float) -> float:
    """The largest step size of Theorem 1A: ``beta / ((2 - beta) L)``.

    It holds for every L-smooth f and every bias with B < 1; on a quadratic far larger steps are stable
    (`stable_limit`). For ``beta=1`` it is SGD's ``1/L``.

    Args:
        L: smoothness of f, > 0.
        beta: in (0, 1].

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(max_step(L=1.0, beta=0.1), 6)
        0.052632

    Reference: docs/theory/theorems.md, Theorem 1A.
    """
    checks.positive(L=L)
    checks.weight(beta=beta)
    return beta / ((2 - beta) * L)


@checks.as_stated
def bound_1a(
    L: float, beta: float, gamma: float, delta0: float, K: float, b2: float, sigma2: float, B: float = 0, M: float = 0
) -> float:
    """The bound of Theorem 1A on ``1/K sum_{k<K} E ||grad f(x_k)||^2``.

    ``[2 delta0 / (gamma K) + b2 + (2 - beta) L gamma sigma2] / [1 - B - (2 - beta) L gamma M]``. Assumed: f is
    L-smooth and bounded below; the noise has mean zero given the past. An adversary may choose the bias. If the noise
    does not have mean zero (a "total" error), put all of the error into B and b2.

    Args:
        L: smoothness of f, > 0.
        beta: in (0, 1].
        gamma: step size, in (0, `max_step`].
        delta0: ``f(x_0) - f*``, >= 0; `delta0_from` for a start other than ``v_{-1} = 0``.
        K: number of steps, >= 1; ``math.inf`` gives the floor.
        b2: absolute part of the squared bias, >= 0.
        sigma2: absolute part of the noise's variance, of the workers' mean (one worker's divided by n), >= 0.
        B: relative part of the squared bias, in [0, 1).
        M: relative part of the noise's variance, >= 0.

    Returns:
        The bound. `terms_1a` splits it.

    Raises:
        ValueError: for a number out of its range, or if ``B + (2 - beta) L gamma M >= 1``.

    Example:
        >>> round(bound_1a(L=2, beta=0.2, gamma=0.05, delta0=3, K=1000, b2=0.04, sigma2=0.5, B=0.1, M=0.3), 9)
        0.295508274

    Reference: docs/theory/theorems.md, Theorem 1A. The paper (arXiv 2403.00853) has a theorem of this kind; its
    constants may differ.
    """
    return terms_1a(L, beta, gamma, delta0, K, b2, sigma2, B, M).total


@checks.as_stated
def terms_1a(
    L: float, beta: float, gamma: float, delta0: float, K: float, b2: float, sigma2: float, B: float = 0, M: float = 0
) -> Terms:
    """Split `bound_1a` into the contributions of the start, the bias and the noise.

    Same assumptions, arguments and errors.

    Example:
        >>> terms_1a(L=1, beta=1, gamma=0.5, delta0=1, K=100, b2=0.25, sigma2=2)
        Terms(distance=0.04, bias=0.25, noise=1.0)

    Reference: docs/theory/theorems.md, Theorem 1A.
    """
    checks.not_negative(delta0=delta0, b2=b2, sigma2=sigma2, B=B, M=M)
    checks.horizon(K)
    checks.step(gamma, max_step(L, beta), f"Theorem 1A (L={L}, beta={beta})")
    drift = (2 - beta) * L * gamma
    advice = "Lower gamma, average over more workers (M), or use an estimator with a smaller relative bias (B)."
    room = checks.room(1 - B - drift * M, "B + (2-beta) L gamma M", advice)
    return Terms(2 * delta0 / (gamma * K) / room, b2 / room, drift * sigma2 / room)


@checks.as_stated
def delta0_from(delta0: float, beta: float, gamma: float, start_error_sq: float, start_grad_sq: float) -> float:
    """The replacement of delta0 in Theorem 1A if momentum starts at another ``v_{-1}``.

    ``delta0 + gamma (1 - beta) / (2 beta) (||v_{-1} - grad f(x_0)||^2 - ||grad f(x_0)||^2)``. For a zero start this is
    delta0; for a start at the exact gradient it is less. The start ``v_{-1} = g_0`` (``first_step="gradient"``) is
    covered if all error counts as bias (``sigma2 = M = 0``). With noise, ``v_{-1}`` must not depend on later noise.

    Args:
        delta0: ``f(x_0) - f*``, >= 0.
        beta: in (0, 1].
        gamma: the step size, > 0.
        start_error_sq: ``||v_{-1} - grad f(x_0)||^2``, >= 0.
        start_grad_sq: ``||grad f(x_0)||^2``, >= 0.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> delta0_from(1.0, beta=0.5, gamma=0.2, start_error_sq=0.0, start_grad_sq=4.0)
        0.6

    Reference: docs/theory/theorems.md, Theorem 1A, "Other starts".
    """
    checks.weight(beta=beta)
    checks.positive(gamma=gamma)
    checks.not_negative(delta0=delta0, start_error_sq=start_error_sq, start_grad_sq=start_grad_sq)
    return delta0 + gamma * (1 - beta) / (2 * beta) * (start_error_sq - start_grad_sq)


@checks.as_stated
def best_step(
    L: float, beta: float, delta0: float, K: int, b2: float, sigma2: float, B: float = 0, M: float = 0
) -> float:
    """The step size that minimises `bound_1a` over ``(0, max_step]``, in closed form.

    With ``a = 2 delta0 / K``, ``c = (2 - beta) L``, ``E = 1 - B``:
    ``gamma = a E / (a c M + sqrt(a^2 c^2 M^2 + a c E (sigma2 E + M b2)))``, or the largest step if that is larger. For
    M = 0 it is ``sqrt(2 delta0 / ((2 - beta) L K sigma2))``. A constant bias does not change it.

    Args:
        L, beta, delta0, b2, sigma2, B, M: as for `bound_1a`, delta0 > 0.
        K: number of steps, finite (for K to infinity the best step size goes to 0).

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(best_step(L=1.0, beta=1.0, delta0=1.0, K=200, b2=0.0, sigma2=1.0), 6)
        0.1

    Reference: docs/theory/theorems.md, Theorem 1A, "The best step".
    """
    limit = max_step(L, beta)
    checks.positive(delta0=delta0, K=K)
    checks.not_negative(b2=b2, sigma2=sigma2, B=B, M=M)
    checks.horizon(K)
    left = checks.room(1 - B, "B", "No step size helps: use an estimator with a smaller relative bias.")
    a, c = 2 * delta0 / K, (2 - beta) * L
    slope = a * c * M
    below = slope + sqrt(slope**2 + a * c * left * (sigma2 * left + M * b2))
    return min(limit, a * left / below if below > 0 else inf)
