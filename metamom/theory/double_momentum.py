"""EF21-SGD2M: the workers average their gradients twice before they compress the change.

Legend as in feedback_momentum.py; each worker keeps ``v_i <- (1 - eta) v_i + eta grad f_i`` and ``u_i <- (1 - eta) u_i
+ eta v_i`` and sends ``C(u_i - g_i)``, which is added to its ``g_i``. ``r = sqrt(1 - eta)``.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

from metamom.theory import checks


class DoubleStart(NamedTuple):
    """The errors of EF21-SGD2M's estimates at ``x_0``, after the first message.

    Attributes:
        message: ``1/n sum ||g_i - u_i||^2``.
        mean: ``||1/n sum v_i - grad f(x_0)||^2``.
        worker: ``1/n sum ||v_i - grad f_i(x_0)||^2``.
        mean_lag: ``||1/n sum (u_i - v_i)||^2``.
        worker_lag: ``1/n sum ||u_i - v_i||^2``.
    """

    message: float = 0.0
    mean: float = 0.0
    worker: float = 0.0
    mean_lag: float = 0.0
    worker_lag: float = 0.0


class _Weights(NamedTuple):
    """What each error weighs next to ``f - f*``, in units of gamma; in the order of `DoubleStart`."""

    message: float
    mean: float
    worker: float
    mean_lag: float
    worker_lag: float


def _weights(alpha_c: float, eta: float) -> _Weights:
    """The weights that close the recursion of the five errors."""
    a, r = sqrt(1 - alpha_c), sqrt(1 - eta)
    lag = 2 * r**2 * eta**2 / (1 - r)  # how far a worker's error moves its lag
    message, mean_lag = 1.5 / (1 - a), 1.5 / (1 - r)
    compressed = 3 * message * a**2 * eta**2 / (1 - a)
    worker_lag = compressed / (1 - r)
    mean = (1.5 + mean_lag * lag) / (1 - r)
    worker = (compressed * eta**2 + worker_lag * lag) / (1 - r)
    return _Weights(message, mean, worker, mean_lag, worker_lag)


@checks.as_stated
def ef21_sgd2m_step(alpha_c: float, eta: float, L: float, L_tilde: float) -> float:
    """A step size at which EF21-SGD2M converges: ``2 / (L + sqrt(L^2 + 4 kappa))``.

    kappa adds up what a step moves each error, times its weight: docs/theory/operators.md has it. `averaged_limit` is
    the exact limit on a quadratic, which is larger.

    Args:
        alpha_c: contraction, in (0, 1].
        eta: weight of the new value in both averages, in (0, 1].
        L, L_tilde: as for `ef21_step`.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(ef21_sgd2m_step(alpha_c=1.0, eta=1.0, L=2.0, L_tilde=3.0), 9)
        0.5

    Reference: docs/theory/operators.md, "EF21-SGD2M"; the method is Fatkhullin, Tyurin and Richtárik's (2023), whose
    constants differ.
    """
    checks.weight(alpha_c=alpha_c, eta=eta)
    checks.positive(L=L, L_tilde=L_tilde)
    a, r, w = sqrt(1 - alpha_c), sqrt(1 - eta), _weights(alpha_c, eta)
    keep, lag = r**2 / (1 - r), 2 * r**2 * eta**2 / (1 - r)
    of_mean = (w.mean * keep + w.mean_lag * lag) * L**2
    of_workers = w.worker * keep + w.worker_lag * lag + 3 * w.message * a**2 * eta**4 / (1 - a)
    kappa = 2 * (of_mean + of_workers * L_tilde**2)
    return 2 / (L + sqrt(L**2 + 4 * kappa))


@checks.as_stated
def bound_ef21_sgd2m(
    alpha_c: float,
    eta: float,
    L: float,
    L_tilde: float,
    gamma: float,
    delta0: float,
    K: float,
    sigma_w2: float,
    workers: int = 1,
    start: DoubleStart | None = None,
) -> float:
    """EF21-SGD2M: ``2 phi0/(gamma K)`` plus a floor that goes to 0 with eta, however much the workers differ.

    The noise enters the message's error as ``eta^4 sigma_w2``, where EF21-SGDM has ``eta^2 sigma_w2``. Assumed:
    unbiased gradients with noise that is independent between workers.

    Args:
        alpha_c, eta, L, L_tilde: as for `ef21_sgd2m_step`.
        gamma: step size, in (0, `ef21_sgd2m_step`].
        delta0: ``f(x_0) - f*``, >= 0.
        K: number of steps, >= 1; ``math.inf`` gives the floor.
        sigma_w2: variance of one worker's gradient, >= 0.
        workers: n.
        start: the initial errors of the estimates; zero by default.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> bound_ef21_sgd2m(1.0, 1.0, 1.0, 1.0, 0.5, 1.0, K=100, sigma_w2=0.0)
        0.04

    Reference: docs/theory/operators.md, "EF21-SGD2M".
    """
    limit = ef21_sgd2m_step(alpha_c, eta, L, L_tilde)
    checks.step(gamma, limit, f"EF21-SGD2M (alpha_c={alpha_c}, eta={eta}, L={L}, L_tilde={L_tilde})")
    checks.not_negative(delta0=delta0, sigma_w2=sigma_w2)
    checks.horizon(K)
    checks.counts(workers=workers)
    start = start or DoubleStart()
    checks.not_negative(**start._asdict())
    a, w = sqrt(1 - alpha_c), _weights(alpha_c, eta)
    phi0 = delta0 + gamma * sum(weight * error for weight, error in zip(w, start, strict=True))
    kept = (1 - eta) ** 2  # the share of a gradient's noise that enters the lag
    noise = w.message * a**2 * eta**4 + eta**2 * (w.worker + kept * w.worker_lag)
    noise += eta**2 * (w.mean + kept * w.mean_lag) / workers
    return 2 * phi0 / (gamma * K) + 2 * sigma_w2 * noise
