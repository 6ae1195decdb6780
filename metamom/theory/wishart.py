"""Linear regression on inputs ``phi ~ N(0, I)``: moments of their sample covariance, exact means and variances.

Legend: S the mean of ``phi phi^T`` over m samples in d dimensions, ``P = I - alpha S``, loss 1/2 (phi^T w - y)^2, label
noise of variance sigma2, ``delta = w - theta``. All moments ``E[S^k] = c_k I``.
"""

from __future__ import annotations

from math import comb

from metamom.theory import checks

# c_k m^(k-1), by decreasing powers of m; each is a polynomial in d by decreasing powers
_POLYNOMIALS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((1,),),
    ((1,), (1, 1)),
    ((1,), (3, 3), (1, 3, 4)),
    ((1,), (6, 6), (6, 17, 21), (1, 6, 21, 20)),
    ((1,), (10, 10), (20, 55, 65), (10, 55, 175, 160), (1, 10, 65, 160, 148)),
    (
        (1,),
        (15, 15),
        (50, 135, 155),
        (50, 262, 787, 701),
        (15, 135, 787, 1827, 1620),
        (1, 15, 155, 701, 1620, 1348),
    ),
)


@checks.as_stated
def moment(k: int, d: int, m: int) -> float:
    """``c_k`` with ``E[S^k] = c_k I``, k = 0 to 6.

    Args:
        k: the power.
        d: dimensions.
        m: samples.

    Raises:
        ValueError: for k outside 0..6.

    Example:
        >>> [moment(k, d=3, m=5) for k in (1, 2, 3)]
        [1.0, 1.8, 4.28]

    Reference: docs/theory/maml.md, "Gaussian inputs"; from the pairings of Isserlis' theorem.
    """
    checks.counts(d=d, m=m)
    if not 0 <= k <= len(_POLYNOMIALS) or k != int(k):
        raise ValueError(f"moments of the sample covariance are known here for k = 0 to 6; got k={k!r}.")
    total = 0
    for row in _POLYNOMIALS[k - 1] if k else ((1,),):  # stay with integers as long as possible
        total = total * m + sum(c * d**i for i, c in enumerate(reversed(row)))
    return float(total / m ** max(k - 1, 0))


def _power(k: int, d: int, m: int, alpha: float) -> float:
    """``p_k`` with ``E[P^k] = p_k I``."""
    return sum(comb(k, j) * (-alpha) ** j * moment(j, d, m) for j in range(k + 1))


@checks.as_stated
def same_batch(alpha: float, d: int, m: int, steps: int = 1) -> float:
    """J steps on one batch, and a fresh outer batch: ``E[g] = p_{2J} delta``.

    Args:
        alpha: inner step size, >= 0.
        d: dimensions.
        m: inner batch.
        steps: J, 1 to 3.

    Returns:
        The coefficient ``p_{2J} = sum_j C(2J, j) (-alpha)^j c_j``.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(same_batch(alpha=0.1, d=3, m=5, steps=2), 7)
        0.6920952

    Reference: docs/theory/maml.md, "Gaussian inputs".
    """
    checks.not_negative(alpha=alpha)
    checks.counts(steps=steps)
    return _power(2 * steps, d, m, alpha)


@checks.as_stated
def full_reuse(alpha: float, d: int, m: int, steps: int = 1) -> float:
    """J steps and the outer loss on one batch: ``E[S P^{2J}] delta``.

    For J = 1 the coefficient is ``1 - 2 alpha c_2 + alpha^2 c_3``.

    Args:
        alpha, d, m: as for `same_batch`.
        steps: J, 1 or 2.

    Returns:
        The coefficient.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(full_reuse(alpha=0.1, d=3, m=5), 6)
        0.6828

    Reference: docs/theory/maml.md, "Gaussian inputs".
    """
    checks.not_negative(alpha=alpha)
    checks.counts(steps=steps)
    return sum(comb(2 * steps, j) * (-alpha) ** j * moment(j + 1, d, m) for j in range(2 * steps + 1))


@checks.as_stated
def variance_independent(
    alpha: float, d: int, delta_sq: float, sigma2: float, *, m_in: int, m_h: int, m_out: int
) -> float:
    """``tr Cov g`` of one-step MAML with independent Hessian, inner and outer batches.

    Args:
        alpha: inner step size, >= 0.
        d: dimensions.
        delta_sq: ``||w - theta||^2``, >= 0.
        sigma2: variance of the label noise, >= 0.
        m_in, m_h, m_out: sizes of the batches.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(variance_independent(0.1, 3, 5.25, 0.25, m_in=5, m_h=5, m_out=7), 9)
        2.165319

    Reference: docs/theory/maml.md, "Gaussian inputs".
    """
    checks.not_negative(alpha=alpha, delta_sq=delta_sq, sigma2=sigma2)
    checks.counts(m_out=m_out)
    distance = _power(2, d, m_in, alpha) * delta_sq + alpha**2 * sigma2 * d / m_in  # E ||u - theta||^2
    outer = (1 + (d + 1) / m_out) * distance + sigma2 * d / m_out
    return _power(2, d, m_h, alpha) * outer - (1 - alpha) ** 4 * delta_sq


@checks.as_stated
def variance_coupled(alpha: float, d: int, delta_sq: float, sigma2: float, *, m: int, m_out: int) -> float:
    """``tr Cov g`` of the usual one-step MAML, with the Hessian on the inner batch.

    Args:
        alpha, d, delta_sq, sigma2: as for `variance_independent`.
        m, m_out: sizes of the inner and the outer batch.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(variance_coupled(0.1, 3, 5.25, 0.25, m=5, m_out=7), 9)
        2.242655571

    Reference: docs/theory/maml.md, "Gaussian inputs".
    """
    checks.not_negative(alpha=alpha, delta_sq=delta_sq, sigma2=sigma2)
    checks.counts(d=d, m=m, m_out=m_out)
    c2, c3 = moment(2, d, m), moment(3, d, m)
    t11 = d * (d * m + 2) / m  # E t_1^2 with t_k = tr S^k, then E t_1 t_2 and E t_2^2
    t12 = d * (d * m + 4) * (m + d + 1) / m**2
    rest = d**3 * m + 2 * d**2 * m**2 + 2 * d**2 * m + 8 * d**2 + d * m**3 + 2 * d * m**2 + 21 * d * m + 20 * d
    t22 = d * (rest + 8 * m**2 + 20 * m + 20) / m**3
    p2 = d - 2 * alpha * d + alpha**2 * d * c2  # E tr P^2
    p2s = d * (1 - 2 * alpha * c2 + alpha**2 * c3)  # E tr P^2 S
    t1p2 = d**2 - 2 * alpha * t11 + alpha**2 * t12  # E t_1 tr P^2
    p2p2 = d**2 - 4 * alpha * d**2 + 2 * alpha**2 * d**2 * c2 + 4 * alpha**2 * t11 - 4 * alpha**3 * t12 + alpha**4 * t22
    label = alpha**2 * sigma2 / m
    square = (1 + 1 / m_out) * (_power(4, d, m, alpha) * delta_sq + label * p2s)
    square += (delta_sq / d * p2p2 + label * t1p2 + sigma2 * p2) / m_out
    return square - _power(2, d, m, alpha) ** 2 * delta_sq
