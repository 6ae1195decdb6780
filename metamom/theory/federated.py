"""EF21 with absent workers (EF21-PP), and with a compressed message to the workers (EF21-P): steps and bounds.

Legend as in feedback.py. Each worker is present with probability p in each step, however the draws of different workers
depend on each other; gradients are exact and the server takes plain steps. Proofs: docs/theory/operators.md.
"""

from __future__ import annotations

from math import sqrt

from metamom.theory import checks
from metamom.theory.feedback import ef21_step


@checks.as_stated
def ef21_pp_step(alpha_c: float, p: float, L: float, L_tilde: float) -> float:
    """The largest step size of EF21-PP: that of EF21 with the contraction ``p alpha_c``.

    Args:
        alpha_c: contraction, in (0, 1].
        p: probability that a worker is present, in (0, 1].
        L, L_tilde: as for `ef21_step`.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(ef21_pp_step(alpha_c=0.5, p=0.5, L=1.0, L_tilde=1.5), 9)
        0.093491562

    Reference: docs/theory/operators.md, "Absent workers"; the method is Fatkhullin, Sokolov, Gorbunov, Li and
    Richtárik's (2021), whose constants differ.
    """
    checks.weight(alpha_c=alpha_c, p=p)
    return ef21_step(p * alpha_c, L, L_tilde)


@checks.as_stated
def bound_ef21_pp(
    alpha_c: float, p: float, L: float, L_tilde: float, gamma: float, delta0: float, start_error_sq: float, K: float
) -> float:
    """EF21-PP: ``2 delta0/(gamma K) + G0/((1 - sqrt(1 - p alpha_c)) K)``: no floor, however much the workers differ.

    Absent workers slow the estimates down as a weaker operator would, and do nothing else: the server averages all
    estimates. Where workers differ, a mean over the present ones' gradients has the draws' noise, and a floor.

    Args:
        alpha_c, p, L, L_tilde: as for `ef21_pp_step`.
        gamma: step size, in (0, `ef21_pp_step`].
        delta0: ``f(x_0) - f*``, >= 0.
        start_error_sq: ``G0 = 1/n sum E ||g_i - grad f_i(x_0)||^2`` after the first messages, >= 0; starting from
            ``g_i = 0`` it is at most ``(1 - p alpha_c)/n sum ||grad f_i(x_0)||^2``.
        K: number of steps, >= 1.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> bound_ef21_pp(1.0, 0.75, L=1.0, L_tilde=1.0, gamma=0.5, delta0=1.0, start_error_sq=2.0, K=100)
        0.08

    Reference: docs/theory/operators.md, "Absent workers".
    """
    limit = ef21_pp_step(alpha_c, p, L, L_tilde)
    checks.step(gamma, limit, f"EF21-PP (alpha_c={alpha_c}, p={p}, L={L}, L_tilde={L_tilde})")
    checks.not_negative(delta0=delta0, start_error_sq=start_error_sq)
    checks.horizon(K)
    return 2 * delta0 / (gamma * K) + start_error_sq / ((1 - sqrt(1 - p * alpha_c)) * K)


@checks.as_stated
def ef21_p_step(alpha_c: float, L: float) -> float:
    """The largest step size of EF21-P: ``(1 - a) / L``, ``a = sqrt(1 - alpha_c)``.

    Args:
        alpha_c: contraction of the operator on the server's message, in (0, 1].
        L: smoothness of f, > 0.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> ef21_p_step(alpha_c=0.75, L=2.0)
        0.25

    Reference: docs/theory/operators.md, "A compressed message to the workers"; the method is Gruntkowska, Tyurin and
    Richtárik's (2022), whose constants differ.
    """
    checks.weight(alpha_c=alpha_c)
    checks.positive(L=L)
    return (1 - sqrt(1 - alpha_c)) / L


@checks.as_stated
def bound_ef21_p(alpha_c: float, L: float, gamma: float, delta0: float, K: float) -> float:
    """EF21-P: ``2 delta0/(gamma K)`` for ``1/K sum ||grad f(w_k)||^2`` at the server's weights: no floor.

    Assumed: exact gradients at the workers' weights x, sent uncompressed; x and w start at the same weights.

    Args:
        alpha_c, L: as for `ef21_p_step`.
        gamma: step size, in (0, `ef21_p_step`].
        delta0: ``f(w_0) - f*``, >= 0.
        K: number of steps, >= 1.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> bound_ef21_p(0.75, L=2.0, gamma=0.25, delta0=1.0, K=100)
        0.08

    Reference: docs/theory/operators.md, "A compressed message to the workers".
    """
    checks.step(gamma, ef21_p_step(alpha_c, L), f"EF21-P (alpha_c={alpha_c}, L={L})")
    checks.not_negative(delta0=delta0)
    checks.horizon(K)
    return 2 * delta0 / (gamma * K)
