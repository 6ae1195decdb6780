"""DIANA, MARINA and DASHA: weights, step sizes and bounds for unbiased operators on differences of gradients.

Legend: workers i = 1..n with ``f = 1/n sum f_i``; an unbiased C with ``E ||C(g) - g||^2 <= omega ||g||^2`` and
independent draws (``operator.constants(d).M``); L is the smoothness of f, ``L_tilde^2 = 1/n sum L_i^2`` that of its
terms. Gradients are exact, the server takes plain steps. Bounds are on ``1/K sum_{k<K} E ||grad f(x_k)||^2``: none has
a floor, however much the workers differ. Proofs: docs/theory/operators.md.
"""

from __future__ import annotations

from math import inf, sqrt

from metamom.theory import checks


@checks.as_stated
def diana_alpha(omega: float) -> float:
    """The largest weight of DIANA's shift: ``1 / (1 + omega)``.

    Args:
        omega: variance of the operator, >= 0.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> diana_alpha(omega=3.0)
        0.25

    Reference: Mishchenko, Gorbunov, Takáč, Richtárik (2019); docs/theory/operators.md.
    """
    checks.not_negative(omega=omega)
    return 1 / (1 + omega)


@checks.as_stated
def diana_step(omega: float, alpha: float, L: float, L_tilde: float, workers: int) -> float:
    """A step size at which DIANA converges: ``min(1/(2L), alpha/(2 L_tilde) sqrt(n / (omega (alpha + 2))))``.

    Args:
        omega: variance of the operator, >= 0.
        alpha: weight of the shift, in (0, `diana_alpha`].
        L: smoothness of f, > 0.
        L_tilde: root mean square smoothness of its terms, > 0.
        workers: n.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(diana_step(omega=2.0, alpha=0.25, L=1.0, L_tilde=1.5, workers=4), 9)
        0.07856742

    Reference: docs/theory/operators.md; the method is Mishchenko, Gorbunov, Takáč and Richtárik's (2019).
    """
    limit = diana_alpha(omega)
    checks.weight(alpha=alpha)
    if alpha > limit:
        raise ValueError(f"DIANA needs alpha <= 1/(1 + omega) = {limit:g}; got {alpha}.")
    checks.positive(L=L, L_tilde=L_tilde)
    checks.counts(workers=workers)
    noise = alpha / (2 * L_tilde) * sqrt(workers / (omega * (alpha + 2))) if omega > 0 else inf
    return min(1 / (2 * L), noise)


@checks.as_stated
def bound_diana(
    omega: float,
    alpha: float,
    L: float,
    L_tilde: float,
    workers: int,
    gamma: float,
    delta0: float,
    shift_error_sq: float,
    K: float,
) -> float:
    """DIANA: ``2 delta0/(gamma K) + 4 L gamma omega S0/(n alpha K)``.

    Args:
        omega, alpha, L, L_tilde, workers: as for `diana_step`.
        gamma: step size, in (0, `diana_step`].
        delta0: ``f(x_0) - f*``, >= 0.
        shift_error_sq: ``S0 = 1/n sum ||grad f_i(x_0) - h_i||^2``; shifts start at 0.
        K: number of steps, >= 1.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> bound_diana(0.0, 1.0, 1.0, 1.0, workers=1, gamma=0.5, delta0=1.0, shift_error_sq=2.0, K=100)
        0.04

    Reference: docs/theory/operators.md.
    """
    checks.step(gamma, diana_step(omega, alpha, L, L_tilde, workers), f"DIANA (omega={omega}, alpha={alpha})")
    checks.not_negative(delta0=delta0, shift_error_sq=shift_error_sq)
    checks.horizon(K)
    return 2 * delta0 / (gamma * K) + 4 * L * gamma * omega * shift_error_sq / (workers * alpha * K)


@checks.as_stated
def marina_step(omega: float, p: float, L: float, L_tilde: float, workers: int) -> float:
    """The largest step size of MARINA: ``1 / (L + L_tilde sqrt((1 - p) omega / (p n)))``.

    Args:
        omega: variance of the operator, >= 0.
        p: probability of whole gradients, in (0, 1].
        L, L_tilde, workers: as for `diana_step`.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> marina_step(omega=4.0, p=0.2, L=1.0, L_tilde=1.5, workers=4)
        0.25

    Reference: Gorbunov, Burlachenko, Li, Richtárik (2021), theorem 2.1; docs/theory/operators.md.
    """
    checks.not_negative(omega=omega)
    checks.weight(p=p)
    checks.positive(L=L, L_tilde=L_tilde)
    checks.counts(workers=workers)
    return 1 / (L + L_tilde * sqrt((1 - p) * omega / (p * workers)))


@checks.as_stated
def bound_marina(
    omega: float, p: float, L: float, L_tilde: float, workers: int, gamma: float, delta0: float, K: float
) -> float:
    """MARINA: ``2 delta0/(gamma K)``.

    Args:
        omega, p, L, L_tilde, workers: as for `marina_step`.
        gamma: step size, in (0, `marina_step`].
        delta0: ``f(x_0) - f*``, >= 0.
        K: number of steps, >= 1.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> bound_marina(4.0, 0.2, L=1.0, L_tilde=1.5, workers=4, gamma=0.25, delta0=1.0, K=100)
        0.08

    Reference: Gorbunov, Burlachenko, Li, Richtárik (2021), theorem 2.1; docs/theory/operators.md.
    """
    checks.step(gamma, marina_step(omega, p, L, L_tilde, workers), f"MARINA (omega={omega}, p={p})")
    checks.not_negative(delta0=delta0)
    checks.horizon(K)
    return 2 * delta0 / (gamma * K)


@checks.as_stated
def dasha_weight(omega: float) -> float:
    """The weight a of DASHA's correction: ``1 / (2 omega + 1)``.

    Args:
        omega: variance of the operator, >= 0.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> dasha_weight(omega=2.0)
        0.2

    Reference: Tyurin, Richtárik (2023); docs/theory/operators.md.
    """
    checks.not_negative(omega=omega)
    return 1 / (2 * omega + 1)


@checks.as_stated
def dasha_step(omega: float, L: float, L_tilde: float, workers: int) -> float:
    """A step size at which DASHA with `dasha_weight` converges: ``1 / (L + L_tilde sqrt(2 omega (4 omega + 1) / n))``.

    Args:
        omega: variance of the operator, >= 0.
        L, L_tilde, workers: as for `diana_step`.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> dasha_step(omega=2.0, L=1.0, L_tilde=3.0, workers=4)
        0.1

    Reference: docs/theory/operators.md; Tyurin, Richtárik (2023), theorem 6.1, has 16 omega (2 omega + 1) / n.
    """
    checks.not_negative(omega=omega)
    checks.positive(L=L, L_tilde=L_tilde)
    checks.counts(workers=workers)
    return 1 / (L + L_tilde * sqrt(2 * omega * (4 * omega + 1) / workers))


@checks.as_stated
def bound_dasha(
    omega: float,
    L: float,
    L_tilde: float,
    workers: int,
    gamma: float,
    delta0: float,
    mean_error_sq: float,
    worker_error_sq: float,
    K: float,
) -> float:
    """DASHA with exact gradients: ``2 delta0/(gamma K) + ((2 omega + 1) G0 + 2 omega S0/n) / K``.

    Args:
        omega, L, L_tilde, workers: as for `dasha_step`.
        gamma: step size, in (0, `dasha_step`].
        delta0: ``f(x_0) - f*``, >= 0.
        mean_error_sq: ``G0 = E ||1/n sum h_i - grad f(x_0)||^2`` after the first message, >= 0; starting from
            ``h_i = 0`` it is at most ``omega S/n`` with ``S = 1/n sum ||grad f_i(x_0)||^2``.
        worker_error_sq: ``S0 = 1/n sum E ||h_i - grad f_i(x_0)||^2`` after it, >= 0, at most ``omega S``.
        K: number of steps, >= 1.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> bound_dasha(0.0, 1.0, 1.0, 1, gamma=1.0, delta0=1.0, mean_error_sq=0.0, worker_error_sq=0.0, K=100)
        0.02

    Reference: docs/theory/operators.md.
    """
    checks.step(gamma, dasha_step(omega, L, L_tilde, workers), f"DASHA (omega={omega})")
    checks.not_negative(delta0=delta0, mean_error_sq=mean_error_sq, worker_error_sq=worker_error_sq)
    checks.horizon(K)
    start = (2 * omega + 1) * mean_error_sq + 2 * omega * worker_error_sq / workers
    return 2 * delta0 / (gamma * K) + start / K
