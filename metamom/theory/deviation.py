"""Theorem 1B: a bound via the deviation ``e = v - grad f``. Smaller steps than 1A, but allows schedules."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from typing import Literal

from metamom.theory import checks


@checks.as_stated
def max_step_1b(
    L: float, beta: float, form: Literal["exact", "simple", "half"] = "exact", theta: float | None = None
) -> float:
    """The largest constant step size of Theorem 1B.

    ``2 / (L (1 + sqrt(1 + 4 kappa)))`` with ``kappa = (1-beta)(1-beta+theta beta) / (theta (1-theta) beta^2)``.

    Args:
        L: smoothness of f, > 0.
        beta: in (0, 1].
        form: "exact": ``theta = r/(1+r)``, ``r = sqrt(1-beta)``, which minimises kappa, ``(r/(1-r))^2``; "simple":
            ``(1 - r)/L``, which is never larger; "half": the usual Lyapunov argument, kappa <= 4/beta^2.
        theta: in (0, 1), the member of the family to use instead of ``form``.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(max_step_1b(L=1.0, beta=0.1), 6), round(max_step_1b(L=1.0, beta=0.1, form="simple"), 6)
        (0.052649, 0.051317)

    Reference: docs/theory/theorems.md, Theorem 1B.
    """
    checks.positive(L=L)
    checks.weight(beta=beta)
    if theta is None and form == "simple":
        return (1 - sqrt(1 - beta)) / L
    kappa = 4 / beta**2 if theta is None and form == "half" else _kappa(beta, theta)
    return 2 / (L * (1 + sqrt(1 + 4 * kappa)))


@checks.as_stated
def theta_star(L: float, beta: float, gamma: float) -> float:
    """The smallest theta that admits a step size; the floor's factor is then ``1 / (1 - theta)``.

    ``R theta^2 - (R - beta) theta + (1 - beta) = 0`` with ``R = (1 - L gamma) beta^2 / (L^2 gamma^2 (1 - beta))``.

    Args:
        L: smoothness of f, > 0.
        beta: in (0, 1].
        gamma: step size, > 0.

    Returns:
        theta in (0, 1); 0 for beta = 1.

    Raises:
        ValueError: for a number out of its range, or a step size that no theta admits.

    Example:
        >>> round(theta_star(L=1.0, beta=0.1, gamma=0.01), 9)
        0.008257512

    Reference: docs/theory/theorems.md, Theorem 1B.
    """
    checks.step(gamma, max_step_1b(L, beta), f"Theorem 1B (L={L}, beta={beta})")
    if beta == 1:
        return 0.0
    R = (1 - L * gamma) * beta**2 / (L**2 * gamma**2 * (1 - beta))
    below = max((R - beta) ** 2 - 4 * R * (1 - beta), 0.0)  # 0 at the largest step, which rounding may miss
    return 2 * (1 - beta) / (R - beta + sqrt(below))  # the smaller root, without cancellation


@checks.as_stated
def phi0_1b(delta0: float, beta: float, gamma: float, start_error_sq: float, theta: float | None = None) -> float:
    """The initial value of Theorem 1B: ``delta0 + gamma rho / (2 (1-theta) beta) ||v_{-1} - grad f(x_0)||^2``.

    ``rho = 1 - (1-theta) beta``; the default theta makes it ``gamma r / (2 (1 - r))``.

    Args:
        delta0: ``f(x_0) - f*``, >= 0.
        beta: in (0, 1]; the first one of a schedule.
        gamma: step size, > 0; the first one of a schedule.
        start_error_sq: ``||v_{-1} - grad f(x_0)||^2``, >= 0: the squared gradient for ``v_{-1} = 0``.
        theta: as for `max_step_1b`.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(phi0_1b(1.0, beta=0.19, gamma=0.1, start_error_sq=2.0), 9)
        1.9

    Reference: docs/theory/theorems.md, Theorem 1B.
    """
    checks.positive(gamma=gamma)
    checks.not_negative(delta0=delta0, start_error_sq=start_error_sq)
    share = (1 - _theta(beta, theta)) * beta
    return delta0 + gamma * (1 - share) / (2 * share) * start_error_sq


@checks.as_stated
def bound_1b(
    L: float,
    beta: float,
    gamma: float,
    phi0: float,
    K: float,
    b2: float,
    sigma2: float,
    B: float = 0,
    M: float = 0,
    *,
    theta: float | None = None,
) -> float:
    """The bound of Theorem 1B on ``1/K sum_{k<K} E ||grad f(x_k)||^2``, for constant gamma and beta.

    ``[2 (1-theta) phi0 / (gamma K) + b2 + beta sigma2] / [1 - theta - B - beta M]``; the default theta makes it
    ``[2 phi0 / (gamma K) + (1+r)(b2 + beta sigma2)] / [1 - (1+r)(B + beta M)]``. Assumed: as in Theorem 1A, which is
    the better bound for constant parameters.

    Args:
        L, beta, K, b2, sigma2, B, M: as for `bound_1a`.
        gamma: step size, in (0, `max_step_1b`].
        phi0: from `phi0_1b` with the same theta.
        theta: None for the default; `theta_star` for the smallest floor, needed for B near 1.

    Raises:
        ValueError: for a number out of its range, or if ``theta + B + beta M >= 1``.

    Example:
        >>> round(bound_1b(L=2, beta=0.2, gamma=0.05, phi0=3, K=1000, b2=0.04, sigma2=0.5, B=0.1, M=0.3), 9)
        0.552768579

    Reference: docs/theory/theorems.md, Theorem 1B.
    """
    checks.not_negative(phi0=phi0, b2=b2, sigma2=sigma2, B=B, M=M)
    checks.horizon(K)
    checks.step(gamma, max_step_1b(L, beta, theta=theta), f"Theorem 1B (L={L}, beta={beta})")
    theta = _theta(beta, theta)
    advice = "Use theta=theta_star(...), a smaller beta (M), or an estimator with a smaller relative bias (B)."
    room = checks.room(1 - theta - B - beta * M, "theta + B + beta M", advice)
    return (2 * (1 - theta) * phi0 / (gamma * K) + b2 + beta * sigma2) / room


@checks.as_stated
def bound_1b_schedule(
    L: float,
    betas: Sequence[float],
    gammas: Sequence[float],
    phi0: float,
    b2: float,
    sigma2: float,
    B: float = 0,
    M: float = 0,
) -> float:
    """Theorem 1B for schedules: a bound on a weighted mean of ``E ||grad f(x_k)||^2``, and so on the smallest.

    ``sum_k w_k E ||grad f(x_k)||^2 <= 2 phi0 + sum_k gamma_k (1 + r_k)(b2 + beta_k sigma2)``, both sides divided by
    ``sum_k w_k``, where ``w_k = gamma_k [1 - (1 + r_k)(B + beta_k M)]`` and ``r_k = sqrt(1 - beta_k)``. Assumed and
    checked: (S1) ``gamma_k r_k / (1 - r_k)`` does not increase; (S2)
    ``1/(2 gamma_k) - L/2 >= gamma_{k+1} r_{k+1}^2 L^2 / (2 (1 - r_{k+1})^2)``; at the last step ``gamma <= 1/L``.

    Args:
        L: smoothness of f, > 0.
        betas: K weights in (0, 1].
        gammas: K step sizes, > 0.
        phi0: from `phi0_1b` with the first beta and gamma.
        b2, sigma2, B, M: as for `bound_1a`.

    Raises:
        ValueError: for a number out of its range, or a schedule that violates (S1) or (S2), naming the step.

    Example:
        >>> round(bound_1b_schedule(1.0, [0.5, 0.5], [0.2, 0.1], phi0=0.3, b2=0.0, sigma2=0.0), 9)
        2.0

    Reference: docs/theory/theorems.md, Theorem 1B.
    """
    checks.positive(L=L)
    checks.not_negative(phi0=phi0, b2=b2, sigma2=sigma2, B=B, M=M)
    if not 0 < len(betas) == len(gammas):
        raise ValueError(f"a schedule needs as many betas as gammas, at least one; got {len(betas)} and {len(gammas)}.")
    roots = []
    for beta, gamma in zip(betas, gammas, strict=True):
        checks.weight(beta=beta)
        checks.positive(gamma=gamma)
        roots.append(sqrt(1 - beta))
    lags = [gamma * r / (1 - r) for gamma, r in zip(gammas, roots, strict=True)]
    pulls = [lag * L**2 * r / (1 - r) for lag, r in zip(lags, roots, strict=True)]
    for k, gamma in enumerate(gammas):
        last = k + 1 == len(gammas)
        if not last and lags[k + 1] > lags[k] * (1 + 1e-12):
            raise ValueError(
                f"(S1) gamma r / (1 - r), r = sqrt(1 - beta), must not grow; at step {k + 1} it grows from "
                f"{lags[k]:.6g} to {lags[k + 1]:.6g}. Decrease gamma together with beta."
            )
        _check_s2(L, k, gamma, 0.0 if last else pulls[k + 1])
    weights, errors = 0.0, 0.0
    for beta, gamma, r in zip(betas, gammas, roots, strict=True):
        room = 1 - (1 + r) * (B + beta * M)
        weights += gamma * checks.room(room, "(1 + r)(B + beta M)", "Use an estimator with a smaller relative bias.")
        errors += gamma * (1 + r) * (b2 + beta * sigma2)
    return (2 * phi0 + errors) / weights


def _check_s2(L: float, k: int, gamma: float, pull: float) -> None:
    """Check ``1/gamma - L >= pull``, where pull belongs to the next step."""
    limit = 1 / (L + pull)
    if gamma > limit * (1 + 1e-12):
        raise ValueError(f"(S2) needs gamma <= {limit:.6g} at step {k}; got gamma={gamma!r}. Use smaller steps.")


def _theta(beta: float, theta: float | None) -> float:
    """The member of the family; by default the one that allows the largest steps."""
    checks.weight(beta=beta)
    if theta is None:
        r = sqrt(1 - beta)
        return r / (1 + r)
    if not (0 < theta < 1 or theta == 1 - beta == 0):
        raise ValueError(f"theta must be in (0, 1), or 0 for beta=1; got {theta!r}.")
    return theta


def _kappa(beta: float, theta: float | None) -> float:
    """The cost of the momentum's lag."""
    theta = _theta(beta, theta)
    if beta == 1:
        return 0.0
    below = theta * (1 - theta) * beta**2
    return (1 - beta) * (1 - beta + theta * beta) / below if below > 0 else inf
