"""EF21-SGDM: the workers average their gradients before they compress the change, which reduces the noise.

Legend as in feedback.py: contraction alpha_c, ``a = sqrt(1 - alpha_c)``, smoothness L of f and L_tilde of its terms;
each worker keeps ``v_i <- (1 - eta) v_i + eta grad f_i`` and sends ``C(v_i - g_i)``, which is added to its ``g_i``; the
server takes plain steps along the mean of the g_i.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

from metamom.theory import checks


class Start(NamedTuple):
    """The initial errors of EF21-SGDM's estimates.

    Attributes:
        message: ``1/n sum ||g_i - v_i||^2``.
        mean: ``||1/n sum v_i - grad f(x_0)||^2``.
        worker: ``1/n sum ||v_i - grad f_i(x_0)||^2``.
    """

    message: float = 0.0
    mean: float = 0.0
    worker: float = 0.0


@checks.as_stated
def ef21_sgdm_step(alpha_c: float, eta: float, L: float, L_tilde: float) -> float:
    """The largest step size of EF21-SGDM: ``2 / (L + sqrt(L^2 + 4 kappa))``.

    ``kappa = 2 (X L_tilde^2 + R L^2 + X R L_tilde^2)``, ``X = 2 a^2 eta^2/(1-a)^2``, ``R = (r/(1-r))^2``,
    ``r = sqrt(1-eta)``. Assumed: as for `bound_ef21_sgdm`.

    Args:
        alpha_c: contraction, in (0, 1].
        eta: the workers' weight of a new gradient, in (0, 1].
        L, L_tilde: as for `ef21_step`.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(ef21_sgdm_step(alpha_c=0.25, eta=0.1, L=1.0, L_tilde=1.5), 9)
        0.022263812

    Reference: docs/theory/operators.md, "EF21-SGDM"; the method is Fatkhullin, Tyurin and Richtárik's (2023), whose
    constants differ.
    """
    checks.weight(alpha_c=alpha_c, eta=eta)
    checks.positive(L=L, L_tilde=L_tilde)
    a, r = sqrt(1 - alpha_c), sqrt(1 - eta)
    X, R = 2 * (a * eta / (1 - a)) ** 2, (r / (1 - r)) ** 2
    kappa = 2 * (X * L_tilde**2 + R * L**2 + X * R * L_tilde**2)
    return 2 / (L + sqrt(L**2 + 4 * kappa))


@checks.as_stated
def bound_ef21_sgdm(
    alpha_c: float,
    eta: float,
    L: float,
    L_tilde: float,
    gamma: float,
    delta0: float,
    K: float,
    sigma_w2: float,
    workers: int = 1,
    start: Start | None = None,
) -> float:
    """EF21-SGDM: ``2 phi0/(gamma K)`` plus a floor that goes to 0 with eta, however much the workers differ.

    Floor: ``2 sigma_w2 [a^2 eta^2/(1-a) + eta^2/((1-r) n) + 2 eta^4 a^2/((1-a)^2 (1-r))]``, ``r = sqrt(1-eta)``.
    Assumed: unbiased gradients with noise that is independent between workers.

    Args:
        alpha_c, eta, L, L_tilde: as for `ef21_sgdm_step`.
        gamma: step size, in (0, `ef21_sgdm_step`].
        delta0: ``f(x_0) - f*``, >= 0.
        K: number of steps, >= 1; ``math.inf`` gives the floor.
        sigma_w2: variance of one worker's gradient, >= 0.
        workers: n.
        start: the initial errors of the estimates; zero by default.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> floor = bound_ef21_sgdm(0.25, 0.1, 1.0, 1.5, 0.02, 1.0, float("inf"), sigma_w2=0.5, workers=4)
        >>> round(floor, 9)
        0.267547787

    Reference: docs/theory/operators.md, "EF21-SGDM".
    """
    limit = ef21_sgdm_step(alpha_c, eta, L, L_tilde)
    checks.step(gamma, limit, f"EF21-SGDM (alpha_c={alpha_c}, eta={eta}, L={L}, L_tilde={L_tilde})")
    checks.not_negative(delta0=delta0, sigma_w2=sigma_w2)
    checks.horizon(K)
    checks.counts(workers=workers)
    start = start or Start()
    checks.not_negative(**start._asdict())
    a, r = sqrt(1 - alpha_c), sqrt(1 - eta)
    message, mean = gamma / (1 - a), gamma / (1 - r)  # weights of the three errors next to f - f*
    worker = 2 * message * (eta * a) ** 2 / ((1 - a) * (1 - r))
    phi0 = delta0 + message * a * start.message + 2 * message * (eta * a) ** 2 / (1 - a) * start.worker
    phi0 += mean * r * start.mean + worker * r * start.worker
    noise = (a * eta) ** 2 / (1 - a) + eta**2 / ((1 - r) * workers) + 2 * eta**4 * a**2 / ((1 - a) ** 2 * (1 - r))
    return 2 * phi0 / (gamma * K) + 2 * sigma_w2 * noise
