"""Theorem M: tracked inner models (MOML, SCSC). Their inner bias decreases with b_u, even with small batches.

Legend: each task keeps ``u_i``, an average with weight b_u of its noisy inner steps; ``Y = mean E ||u_i - (w - alpha
grad L_i(w))||^2``; L is the smoothness of f, ``L_g >= ||I - alpha H_i||``, ``Lambda = (L_g times the smoothness of
L_i)^2``; sigma_g2 and sigma_h2 are per-sample variances of gradient and Hessian, m the inner batch, sigma2 the variance
of the mean meta-gradient given the u_i. Every step updates all tasks; Hessian and outer batches are independent of the
inner.
"""

from __future__ import annotations

from math import sqrt
from typing import Literal

from metamom.theory import checks

Method = Literal["moml", "scsc"]


@checks.as_stated
def moml_kappa(Lambda: float, L_g: float, b_u: float) -> float:
    """The cost of the weights' motion for MOML: ``Lambda L_g^2 (1 - b_u) / (1 - sqrt(1 - b_u))^2``.

    Args:
        Lambda: as in the legend, > 0.
        L_g: as in the legend, > 0.
        b_u: weight of a new inner step, in (0, 1].

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(moml_kappa(Lambda=2.25, L_g=1.5, b_u=0.2), 6)
        363.371506

    Reference: docs/theory/maml.md, Theorem M.
    """
    checks.positive(Lambda=Lambda, L_g=L_g)
    checks.weight(b_u=b_u)
    return Lambda * L_g**2 * (1 - b_u) / (1 - sqrt(1 - b_u)) ** 2


@checks.as_stated
def scsc_kappa(Lambda: float, b_u: float, alpha: float, sigma_h2: float, m: int) -> float:
    """The same cost for SCSC: ``2 Lambda alpha^2 sigma_h2 (1 - b_u)^2 / (m b_u (2 - b_u))``; 0 without Hessian noise.

    Args:
        Lambda: as in the legend, > 0.
        b_u: weight of a new inner step, in (0, 1].
        alpha: inner step size, > 0.
        sigma_h2: variance of one sample's Hessian, >= 0.
        m: inner batch.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> scsc_kappa(Lambda=1.0, b_u=1.0, alpha=0.1, sigma_h2=1.0, m=5)
        0.0

    Reference: docs/theory/maml.md, Theorem M.
    """
    checks.positive(Lambda=Lambda, alpha=alpha)
    checks.weight(b_u=b_u)
    checks.not_negative(sigma_h2=sigma_h2)
    checks.counts(m=m)
    return 2 * Lambda * alpha**2 * sigma_h2 * (1 - b_u) ** 2 / (m * b_u * (2 - b_u))


@checks.as_stated
def tracking_step(L: float, beta: float, kappa: float) -> float:
    """The largest step size of Theorem M: ``2 / (c + sqrt(c^2 + 4 kappa))``, ``c = L (2 - beta)/beta``.

    Assumed: as for `bound_tracking`.

    Args:
        L: smoothness of f, > 0.
        beta: in (0, 1].
        kappa: from `moml_kappa` or `scsc_kappa`, >= 0; 0 gives `max_step`.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(tracking_step(L=2.25, beta=0.1, kappa=moml_kappa(2.25, 1.5, 0.2)), 9)
        0.019993914

    Reference: docs/theory/maml.md, Theorem M.
    """
    checks.positive(L=L)
    checks.weight(beta=beta)
    checks.not_negative(kappa=kappa)
    c = L * (2 - beta) / beta
    return 2 / (c + sqrt(c**2 + 4 * kappa))


@checks.as_stated
def inner_floor(
    method: Method, Lambda: float, b_u: float, alpha: float, sigma_g2: float, m: int, *, additive: bool = False
) -> float:
    """The floor of the inner batches in the mean of ``||grad f||^2``; it vanishes with b_u.

    MOML: ``Lambda (1 + sqrt(1-b_u)) b_u alpha^2 sigma_g2 / m``; SCSC: ``2 Lambda b_u/(2-b_u) alpha^2 sigma_g2 / m``, or
    half of that if the noise is additive (sigma_h2 = 0). Assumed: as for `bound_tracking`.

    Args:
        method: "moml" or "scsc".
        Lambda, b_u, alpha, m: as for `scsc_kappa`.
        sigma_g2: variance of one sample's gradient, >= 0.
        additive: whether samples have the same Hessian.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(inner_floor("moml", Lambda=2.25, b_u=0.2, alpha=0.5, sigma_g2=1.0, m=5), 9)
        0.042624612

    Reference: docs/theory/maml.md, Theorem M.
    """
    checks.positive(Lambda=Lambda, alpha=alpha)
    checks.weight(b_u=b_u)
    checks.not_negative(sigma_g2=sigma_g2)
    checks.counts(m=m)
    inner = Lambda * alpha**2 * sigma_g2 / m
    if method == "moml":
        return inner * (1 + sqrt(1 - b_u)) * b_u
    return inner * (1 if additive else 2) * b_u / (2 - b_u)


@checks.as_stated
def bound_tracking(
    method: Method,
    L: float,
    beta: float,
    gamma: float,
    delta0: float,
    K: float,
    kappa: float,
    floor: float,
    sigma2: float,
    *,
    Lambda: float,
    b_u: float,
    start_error_sq: float,
) -> float:
    """The bound of Theorem M on ``1/K sum_{k<K} E ||grad f(x_k)||^2``.

    ``2 delta0/(gamma K) + Lambda s start_error_sq / K + floor + [(2-beta) L gamma + beta kappa gamma^2] sigma2`` with
    ``s = r/(1-r)``, ``r = sqrt(1-b_u)``, for MOML and ``s = 1/(b_u (2-b_u))`` for SCSC. Assumed: f is L-smooth and
    bounded below, ``v_{-1} = 0``, one inner step, all tasks in each step, and Hessian and outer batches independent of
    the inner ones and of each other.

    Args:
        method: "moml" or "scsc".
        L, beta, delta0, sigma2: as for `bound_1a`.
        gamma: step size, in (0, `tracking_step`].
        K: number of steps, >= 1; ``math.inf`` gives the limit.
        kappa: from `moml_kappa` or `scsc_kappa`; 0 for SCSC with additive noise.
        floor: from `inner_floor`.
        Lambda, b_u: as for `inner_floor`.
        start_error_sq: Y before the first step, >= 0.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> bound_tracking("scsc", 1.0, 1.0, 1.0, 1.0, 100, 0.0, 0.0, 0.0, Lambda=1.0, b_u=1.0, start_error_sq=1.0)
        0.03

    Reference: docs/theory/maml.md, Theorem M. MOML is Wang et al.'s (2021), SCSC Chen, Sun and Yin's.
    """
    checks.step(gamma, tracking_step(L, beta, kappa), f"Theorem M (L={L}, beta={beta}, kappa={kappa:.6g})")
    checks.positive(Lambda=Lambda)
    checks.weight(b_u=b_u)
    checks.not_negative(delta0=delta0, floor=floor, sigma2=sigma2, start_error_sq=start_error_sq)
    checks.horizon(K)
    r = sqrt(1 - b_u)
    memory = r / (1 - r) if method == "moml" else 1 / (b_u * (2 - b_u))
    noise = ((2 - beta) * L * gamma + beta * kappa * gamma**2) * sigma2
    return 2 * delta0 / (gamma * K) + Lambda * memory * start_error_sq / K + floor + noise
