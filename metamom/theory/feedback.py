"""Error feedback: the step sizes and bounds of EF21, EF14 and Clip21.

Legend: workers i = 1..n with ``f = 1/n sum f_i``; a contraction C has ``E ||C(g) - g||^2 <= (1 - alpha_c) ||g||^2``
(`operator.contraction(d)`), ``a = sqrt(1 - alpha_c)``; L is the smoothness of f, ``L_tilde^2 = 1/n sum L_i^2`` that of
its terms. The server takes plain steps ``x <- x - gamma * estimate``. Bounds are on ``1/K sum_{k<K} E ||grad
f(x_k)||^2``.
"""

from __future__ import annotations

from math import ceil, sqrt

from metamom.theory import checks


@checks.as_stated
def ef21_step(alpha_c: float, L: float, L_tilde: float) -> float:
    """The largest step size of EF21: ``1 / (L + L_tilde a / (1 - a))``; assumed as for `bound_ef21`.

    Args:
        alpha_c: contraction, in (0, 1].
        L: smoothness of f, > 0.
        L_tilde: root mean square smoothness of its terms, > 0 (at least L, if both are the smallest possible).

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(ef21_step(alpha_c=0.25, L=1.0, L_tilde=1.5), 9)
        0.093491562

    Reference: Richtárik, Sokolov, Fatkhullin (2021); docs/theory/operators.md, "Error feedback".
    """
    checks.weight(alpha_c=alpha_c)
    checks.positive(L=L, L_tilde=L_tilde)
    a = sqrt(1 - alpha_c)
    return 1 / (L + L_tilde * a / (1 - a))


@checks.as_stated
def bound_ef21(
    alpha_c: float, L: float, L_tilde: float, gamma: float, delta0: float, start_error_sq: float, K: float
) -> float:
    """EF21: ``2 delta0/(gamma K) + G0/((1 - a) K)``: no floor, however much the workers differ.

    Assumed: exact gradients; a contraction that need not be unbiased.

    Args:
        alpha_c, L, L_tilde: as for `ef21_step`.
        gamma: step size, in (0, `ef21_step`].
        delta0: ``f(x_0) - f*``, >= 0.
        start_error_sq: ``G0 = 1/n sum ||g_i - grad f_i(x_0)||^2`` after the first message, >= 0; starting from
            ``g_i = 0`` it is at most ``(1 - alpha_c)/n sum ||grad f_i(x_0)||^2``.
        K: number of steps, >= 1.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> bound_ef21(1.0, L=1.0, L_tilde=1.0, gamma=1.0, delta0=1.0, start_error_sq=0.0, K=100)
        0.02

    Reference: Richtárik, Sokolov, Fatkhullin (2021); docs/theory/operators.md, "Error feedback".
    """
    checks.step(gamma, ef21_step(alpha_c, L, L_tilde), f"EF21 (alpha_c={alpha_c}, L={L}, L_tilde={L_tilde})")
    checks.not_negative(delta0=delta0, start_error_sq=start_error_sq)
    checks.horizon(K)
    return 2 * delta0 / (gamma * K) + start_error_sq / ((1 - sqrt(1 - alpha_c)) * K)


@checks.as_stated
def ef14_step(alpha_c: float, L: float) -> float:
    """The largest step size of EF14: ``(1 - a) / ((1 + a) L)``; assumed as for `bound_ef14`.

    Args:
        alpha_c: contraction, in (0, 1].
        L: smoothness of f, > 0.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(ef14_step(alpha_c=0.25, L=1.0), 9)
        0.07179677

    Reference: docs/theory/operators.md, "Error feedback"; the method is Seide et al.'s (2014).
    """
    checks.weight(alpha_c=alpha_c)
    checks.positive(L=L)
    a = sqrt(1 - alpha_c)
    return (1 - a) / ((1 + a) * L)


@checks.as_stated
def bound_ef14(
    alpha_c: float,
    L: float,
    gamma: float,
    delta0: float,
    K: float,
    zeta2: float,
    b2: float = 0,
    sigma_w2: float = 0,
    workers: int = 1,
) -> float:
    """EF14: ``2 delta0/(gamma K) + b2 + L gamma sigma_w2/n + L gamma a/(1-a) (zeta2 + sigma_w2)``.

    The part due to compression vanishes with gamma. Assumed: noise independent between workers; a bias of the
    gradients themselves that all workers share.

    Args:
        alpha_c, L: as for `ef14_step`.
        gamma: step size, in (0, `ef14_step`].
        delta0: ``f(x_0) - f*``, >= 0.
        K: number of steps, >= 1; ``math.inf`` gives the floor.
        zeta2: ``1/n sum ||grad f_i - grad f||^2 <= zeta2``.
        b2: squared bias of the gradients before compression, >= 0.
        sigma_w2: variance of one worker's gradient, >= 0.
        workers: n.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> bound_ef14(0.75, L=1.0, gamma=0.25, delta0=1.0, K=100, zeta2=2.0)
        0.58

    Reference: docs/theory/operators.md, "Error feedback".
    """
    checks.step(gamma, ef14_step(alpha_c, L), f"EF14 (alpha_c={alpha_c}, L={L})")
    checks.not_negative(delta0=delta0, zeta2=zeta2, b2=b2, sigma_w2=sigma_w2)
    checks.horizon(K)
    checks.counts(workers=workers)
    a = sqrt(1 - alpha_c)
    noise = sigma_w2 / workers + a / (1 - a) * (zeta2 + sigma_w2)
    return 2 * delta0 / (gamma * K) + b2 + L * gamma * noise


@checks.as_stated
def clip21_inactive(tau: float, gamma: float, L_max: float, estimate_norm: float) -> bool:
    """Whether a step is short enough for Clip21 to stop clipping: ``gamma L_max ||g|| <= tau / 2``.

    While this holds, the largest ``||grad f_i(x) - g_i||`` decreases by tau/2 or more each step until it is at most
    tau. From then on nothing is clipped, and the method is exact gradient descent. Check it during the run.

    Args:
        tau: the clipping threshold, > 0.
        gamma: step size, > 0.
        L_max: the largest smoothness of a worker's f_i, > 0.
        estimate_norm: ``||1/n sum g_i||``, >= 0.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> clip21_inactive(tau=1.0, gamma=0.1, L_max=2.0, estimate_norm=2.0)
        True

    Reference: docs/theory/operators.md, "Clip21"; the method is Khirirat et al.'s (2023).
    """
    checks.positive(tau=tau, gamma=gamma, L_max=L_max)
    checks.not_negative(estimate_norm=estimate_norm)
    return gamma * L_max * estimate_norm <= tau / 2


@checks.as_stated
def clip21_steps(tau: float, distance: float) -> int:
    """The number of steps until Clip21 stops clipping, if `clip21_inactive` holds: ``ceil(2 (D_0 - tau) / tau)``.

    Args:
        tau: the clipping threshold, > 0.
        distance: ``D_0 = max_i ||grad f_i(x_0) - g_i||``, >= 0.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> clip21_steps(tau=0.5, distance=6.0)
        22

    Reference: docs/theory/operators.md, "Clip21".
    """
    checks.positive(tau=tau)
    checks.not_negative(distance=distance)
    return max(0, ceil(2 * (distance - tau) / tau))
