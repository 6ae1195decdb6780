"""Quadratic tasks ``L_i = 1/2 (w - c_i)^T A_i (w - c_i)``, and a quartic one: exact means of noisy meta-gradients.

Legend: ``delta = w - c_i``, ``M = I - alpha A``; stochastic gradients ``A delta + nu``, Hessians ``A + E``. With
independent Hessian batches, or noise in the gradients only, the first-order estimator is the only biased one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.theory import checks
from metamom.theory.fixed_points import AffineMean, linear


@checks.as_stated
def population(A: Tensor, alpha: float, steps: int = 1) -> AffineMean:
    """The task's meta-gradient after J exact steps, ``A M^{2J} delta``.

    Args:
        A: symmetric, ``[d, d]``; made float64.
        alpha: inner step size, >= 0.
        steps: J.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> population(torch.eye(1), alpha=0.5, steps=2).gain
        tensor([[0.0625]], dtype=torch.float64)

    Reference: docs/theory/maml.md, "Quadratic tasks".
    """
    checks.counts(steps=steps)
    A, M = _matrices(A, alpha)
    return linear(A @ torch.linalg.matrix_power(M, 2 * steps))


@checks.as_stated
def first_order(A: Tensor, alpha: float, steps: int = 1) -> AffineMean:
    """First-order MAML, ``A M^J delta``: a bias of ``alpha A^2 M delta`` for J = 1.

    Args:
        A, alpha, steps: as for `population`.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> first_order(torch.eye(1), alpha=0.5).gain
        tensor([[0.5000]], dtype=torch.float64)

    Reference: docs/theory/maml.md, "Quadratic tasks".
    """
    checks.counts(steps=steps)
    A, M = _matrices(A, alpha)
    return linear(A @ torch.linalg.matrix_power(M, steps))


@checks.as_stated
def coupled(A: Tensor, alpha: float, hessian_var: float, m: int) -> AffineMean:
    """The usual one-step MAML under Gaussian Hessian noise: ``A M^2 delta + alpha^2 s^2/m (A + tr(A) I) delta``.

    One sample's noise E is symmetric with variance s^2 off the diagonal and 2 s^2 on it. It enters the gradient as
    ``nu = E delta`` plus an independent term.

    Args:
        A, alpha: as for `population`.
        hessian_var: s^2, >= 0.
        m: inner batch.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> coupled(torch.eye(1), alpha=0.5, hessian_var=1.0, m=2).gain
        tensor([[0.5000]], dtype=torch.float64)

    Reference: docs/theory/maml.md, "Quadratic tasks".
    """
    checks.not_negative(hessian_var=hessian_var)
    checks.counts(m=m)
    exact = population(A, alpha)
    A, _ = _matrices(A, alpha)
    bias = alpha**2 * hessian_var / m * (A + A.trace() * torch.eye(len(A), dtype=A.dtype))
    return linear(exact.gain + bias)


@checks.as_stated
def variance_additive(A: Tensor, alpha: float, noise_var: float, *, m_in: int, m_out: int) -> float:
    """``tr Cov g`` of one-step MAML with noise ``noise_var I`` in one sample's gradient and none in its Hessian.

    ``noise_var [alpha^2 tr(M^2 A^2)/m_in + tr(M^2)/m_out]``.

    Args:
        A, alpha: as for `population`.
        noise_var: >= 0.
        m_in, m_out: sizes of the inner and the outer batch.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> variance_additive(torch.eye(1), alpha=0.5, noise_var=1.0, m_in=1, m_out=1)
        0.3125

    Reference: docs/theory/maml.md, "Quadratic tasks".
    """
    checks.not_negative(noise_var=noise_var)
    checks.counts(m_in=m_in, m_out=m_out)
    A, M = _matrices(A, alpha)
    return noise_var * float(alpha**2 * (M @ A).square().sum() / m_in + M.square().sum() / m_out)


@checks.as_stated
def quartic(a: float, c: float, w: float, alpha: float, noise_var: float, m: int) -> tuple[float, float]:
    """Gradient and (curvature) bias of one-step MAML on ``L(w) = a w^2/2 + c w^4/4``, with independent batches.

    With ``u = w - alpha (a w + c w^3)`` and ``H = a + 3 c w^2``: gradient ``(1 - alpha H)(a u + c u^3)``, bias
    ``(1 - alpha H) 3 c u alpha^2 noise_var / m``.

    Args:
        a, c: coefficients of the loss.
        w: the weight.
        alpha: inner step size, >= 0.
        noise_var: variance of the Gaussian noise in one sample's gradient, >= 0.
        m: inner batch.

    Returns:
        Gradient and bias.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> gradient, bias = quartic(1.0, 0.5, w=1.3, alpha=0.2, noise_var=0.64, m=5)
        >>> round(gradient, 9), round(bias, 9)
        (0.321212, 0.001845872)

    Reference: docs/theory/maml.md, "A quartic task".
    """
    checks.finite(a=a, c=c, w=w)
    checks.not_negative(alpha=alpha, noise_var=noise_var)
    checks.counts(m=m)
    u = w - alpha * (a * w + c * w**3)
    outer = 1 - alpha * (a + 3 * c * w**2)
    return outer * (a * u + c * u**3), outer * 3 * c * u * alpha**2 * noise_var / m


def _matrices(A: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """A in float64, and M."""
    checks.not_negative(alpha=alpha)
    A = A.to(torch.float64)
    if A.dim() != 2 or not torch.allclose(A, A.T):
        raise ValueError(f"A must be a symmetric matrix [d, d]; got shape {tuple(A.shape)}.")
    return A, torch.eye(len(A), dtype=A.dtype) - alpha * A
