"""Theorems 2A and 2B: linear convergence under the Polyak-Lojasiewicz inequality, up to a floor.

Legend: mu-PL means ``||grad f(x)||^2 >= 2 mu (f(x) - f*)``; ``r = sqrt(1 - beta)``; bias and noise as in nonconvex.py.
"""

from __future__ import annotations

from math import sqrt
from typing import Literal, NamedTuple

from metamom.theory import checks


class LinearRate(NamedTuple):
    """``E[f(x_K) - f*] <= (1 - rate)^K phi0 + floor``.

    Attributes:
        rate: the relative decrease of the distance in each step.
        floor: the remainder due to bias and noise.
        weight: the weight of ``||v_{-1} - grad f(x_0)||^2`` in ``phi0``, next to ``f(x_0) - f*``.
    """

    rate: float
    floor: float
    weight: float

    @checks.as_stated
    def bound(self, phi0: float, K: float) -> float:
        """The bound after K steps from ``phi0``."""
        checks.not_negative(phi0=phi0)
        checks.horizon(K)
        return float((1 - self.rate) ** K * phi0 + self.floor)


@checks.as_stated
def max_step_2a(L: float, beta: float) -> float:
    """The largest step size of Theorem 2A without relative errors: ``(1 - sqrt(1-beta)) / (2L)``.

    Args:
        L: smoothness of f, > 0.
        beta: in (0, 1].

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> max_step_2a(L=1.0, beta=0.75)
        0.25

    Reference: docs/theory/theorems.md, Theorem 2A.
    """
    checks.positive(L=L)
    checks.weight(beta=beta)
    return (1 - sqrt(1 - beta)) / (2 * L)


@checks.as_stated
def rate_2a(
    L: float, mu: float, beta: float, gamma: float, b2: float, sigma2: float, form: Literal["sharp", "simple"] = "sharp"
) -> LinearRate:
    """Theorem 2A: ``E[f(x_K) - f*] <= (1 - gamma mu)^K phi0 + floor`` for bias and noise without relative parts.

    With ``A = gamma / (2 (1 - gamma mu - r))``: floor ``(1 - gamma mu) A beta (b2 + beta sigma2) / (gamma mu)``, and
    ``phi0 = f(x_0) - f* + A r ||v_{-1} - grad f(x_0)||^2``. Assumed: f is L-smooth and mu-PL.

    Args:
        L: smoothness of f, > 0.
        mu: in (0, L].
        beta: in (0, 1].
        gamma: step size, in (0, `max_step_2a`].
        b2: squared bias, >= 0.
        sigma2: variance of the noise, >= 0.
        form: "simple" has the larger floor ``(1 + r)(b2 + beta sigma2) / mu``.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> rate = rate_2a(L=2, mu=0.1, beta=0.2, gamma=0.02, b2=0.04, sigma2=0.5)
        >>> round(rate.bound(phi0=3, K=500), 9)
        2.451536474

    Reference: docs/theory/theorems.md, Theorem 2A.
    """
    _check(L, mu, b2, sigma2)
    checks.step(gamma, max_step_2a(L, beta), f"Theorem 2A (L={L}, beta={beta})")
    r, rate = sqrt(1 - beta), gamma * mu
    A = gamma / (2 * (1 - rate - r))
    error = b2 + beta * sigma2
    floor = (1 - rate) * A * beta * error / rate if form == "sharp" else (1 + r) * error / mu
    return LinearRate(rate, floor, A * r)


@checks.as_stated
def rate_2a_affine(
    L: float, mu: float, beta: float, gamma: float, b2: float, sigma2: float, B: float, M: float, theta: float
) -> LinearRate:
    """Theorem 2A for bias and noise with relative parts B and M.

    With ``kappa = B + beta M``, ``s = (1-theta) beta``, ``q = gamma mu (1 - beta kappa)``:
    ``tau = [s + q - sqrt((s + q)^2 - 4 gamma mu (s - beta kappa))] / 2``, ``A = gamma / (2 (s - tau))``, rate tau,
    floor ``(1 - tau) A beta (b2 + beta sigma2) / tau``, and ``phi0 = f(x_0) - f* + A (1 - s) ||v_{-1} - grad
    f(x_0)||^2``. Assumed: f is L-smooth and mu-PL, and ``1/(2 gamma) - L/2 >= A (1-beta)(1-beta+theta beta) L^2 /
    (theta beta)``.

    Args:
        L, mu, beta, b2, sigma2: as for `rate_2a`.
        gamma: step size, > 0, small enough for this condition.
        B, M: as for `bound_1a`, ``B + beta M < 1``.
        theta: in (0, 1 - B - beta M); smaller for a lower floor, larger for larger steps.

    Raises:
        ValueError: for a number out of its range, or a step size that violates the condition.

    Example:
        >>> rate = rate_2a_affine(2, 0.1, 0.2, 0.01, b2=0.04, sigma2=0.5, B=0.2, M=0.1, theta=0.4)
        >>> round(rate.rate, 12), round(rate.floor, 9)
        (0.000631625975, 1.855685515)

    Reference: docs/theory/theorems.md, Theorem 2A.
    """
    _check(L, mu, b2, sigma2)
    checks.weight(beta=beta)
    checks.positive(gamma=gamma)
    checks.not_negative(B=B, M=M)
    kappa = B + beta * M
    if not 0 < theta < 1 - kappa:
        raise ValueError(f"theta must be in (0, 1 - B - beta M) = (0, {1 - kappa:.6g}); got {theta!r}.")
    s, push = (1 - theta) * beta, gamma * mu
    both = s + push * (1 - beta * kappa)
    product = push * (s - beta * kappa)
    tau = 2 * product / (both + sqrt(both**2 - 4 * product))  # the smaller root, without cancellation
    A = gamma / (2 * (s - tau)) if s > tau else float("inf")
    C = (1 - beta) * (1 - beta + theta * beta) * L**2 / (theta * beta)
    # for beta = 1 there is no lag (C = 0), but A must still exist
    if not (s > tau and 1 / gamma - L >= 2 * A * C * (1 - 1e-12)):
        raise ValueError(
            f"Theorem 2A (L={L}, beta={beta}, theta={theta}) needs 1/(2 gamma) - L/2 >= {A * C:.6g}, which "
            f"gamma={gamma} violates. Use a smaller step, or a theta closer to 1/2."
        )
    return LinearRate(tau, (1 - tau) * A * beta * (b2 + beta * sigma2) / tau, A * (1 - s))


@checks.as_stated
def rate_2b(
    L: float, mu: float, beta: float, gamma: float, b2: float, sigma2: float, at: Literal["z", "x"] = "x"
) -> LinearRate:
    """Theorem 2B: larger steps than 2A, and a noise floor that vanishes with gamma.

    At ``z_K = x_K - gamma (1-beta)/beta v_{K-1}``:
    ``(1 - gamma mu)^K delta0 + b2/mu + gamma L sigma2 (1 + 2 (1-beta)^2) / (2 mu)``. At ``x_K``:
    ``2 (1 - gamma mu)^K delta0 + 2 b2/mu + (L gamma + (1 - L gamma) beta) sigma2/mu``: pass ``phi0 = 2 delta0`` to
    ``bound`` there. Assumed: f is L-smooth and mu-PL, ``v_{-1} = 0``, no relative errors.

    Args:
        L, mu, beta, b2, sigma2: as for `rate_2a`.
        gamma: step size, in (0, beta / (2L)].
        at: the point at which f is evaluated, "z" or "x".

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> rate = rate_2b(L=2, mu=0.1, beta=0.2, gamma=0.02, b2=0.04, sigma2=0.5, at="z")
        >>> round(rate.bound(phi0=3, K=500), 9)
        1.730533765

    Reference: docs/theory/theorems.md, Theorem 2B.
    """
    _check(L, mu, b2, sigma2)
    checks.weight(beta=beta)
    checks.step(gamma, beta / (2 * L), f"Theorem 2B (L={L}, beta={beta})")
    if at == "z":
        floor = b2 / mu + gamma * L * sigma2 * (1 + 2 * (1 - beta) ** 2) / (2 * mu)
    else:
        floor = 2 * b2 / mu + (L * gamma + (1 - L * gamma) * beta) * sigma2 / mu
    return LinearRate(gamma * mu, floor, 0.0)


@checks.as_stated
def rate_2b_bias(L: float, mu: float, beta: float, gamma: float, b2: float) -> LinearRate:
    """Theorem 2B at ``z_K`` without noise: the floor ``(1 + eps) b2 / (2 mu)``, tight as eps goes to 0.

    ``eps = q^2 / (X - q^2)`` with ``q = gamma L (1-beta)/beta`` and ``X = (1 - L gamma)(1 - gamma mu/beta)``; eps goes
    to 0 with gamma/beta. Assumed: f is L-smooth and mu-PL, ``v_{-1} = 0``, no relative errors, ``X > q^2``.

    Args:
        L, mu, beta, b2: as for `rate_2a`.
        gamma: step size, > 0; all steps up to ``beta / (2L)`` have ``X > q^2``, and some larger ones.

    Raises:
        ValueError: for a number out of its range, or if ``X <= q^2``.

    Example:
        >>> round(rate_2b_bias(L=1.0, mu=0.5, beta=1.0, gamma=0.5, b2=0.2).floor, 9)
        0.2

    Reference: docs/theory/theorems.md, Theorem 2B.
    """
    _check(L, mu, b2, 0.0)
    checks.weight(beta=beta)
    checks.positive(gamma=gamma)
    q2 = (gamma * L * (1 - beta) / beta) ** 2
    X = max(1 - L * gamma, 0.0) * max(1 - gamma * mu / beta, 0.0)
    if q2 >= X:
        raise ValueError(
            f"this form needs (1 - L gamma)(1 - gamma mu/beta) > {q2:.6g}; got {X:.6g}. Use a smaller step."
        )
    return LinearRate(gamma * mu, (1 + q2 / (X - q2)) * b2 / (2 * mu), 0.0)


def _check(L: float, mu: float, b2: float, sigma2: float) -> None:
    """Check the ranges that the theorems share."""
    checks.positive(L=L, mu=mu)
    if mu > L:
        raise ValueError(f"mu cannot exceed L={L}; got mu={mu!r}.")
    checks.not_negative(b2=b2, sigma2=sigma2)
