"""Theorem 1C: normalised momentum. Steps have length gamma whatever the gradient, so gamma has no limit."""

from __future__ import annotations

from math import sqrt

from metamom.theory import checks


@checks.as_stated
def bound_1c(
    L: float, beta: float, gamma: float, delta0: float, grad0: float, K: float, b: float, sigma2: float
) -> float:
    """A bound on ``1/K sum_{k<K} E ||grad f(x_k)||`` (norms, not squares) of ``x <- x - gamma v / ||v||``.

    ``delta0/(gamma K) + L gamma/2
    + 2 [(1-beta) grad0/(beta K) + (1-beta) L gamma/beta + b + sqrt(sigma2 beta/(2-beta))]``.
    Assumed: f is L-smooth and bounded below, ``||bias|| <= b``, the noise has mean zero given the past and variance at
    most sigma2, ``v_{-1} = 0``. The floor of the bias is 2b, a norm.

    Args:
        L: smoothness of f, > 0.
        beta: in (0, 1].
        gamma: length of a step, > 0.
        delta0: ``f(x_0) - f*``, >= 0.
        grad0: ``||grad f(x_0)||``, >= 0.
        K: number of steps, >= 1; ``math.inf`` gives the floor.
        b: norm of the bias, >= 0.
        sigma2: variance of the noise, >= 0.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(bound_1c(L=1, beta=0.1, gamma=0.01, delta0=1, grad0=1, K=float("inf"), b=0.3, sigma2=0.5), 9)
        1.109442842

    Reference: docs/theory/theorems.md, Theorem 1C; the method is Cutkosky and Mehta's (2020).
    """
    checks.positive(L=L, gamma=gamma)
    checks.weight(beta=beta)
    checks.not_negative(delta0=delta0, grad0=grad0, b=b, sigma2=sigma2)
    checks.horizon(K)
    keep = (1 - beta) / beta  # the momentum's lag in steps
    deviation = keep * grad0 / K + keep * L * gamma + b + sqrt(sigma2 * beta / (2 - beta))
    return delta0 / (gamma * K) + L * gamma / 2 + 2 * deviation
