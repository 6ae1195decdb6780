"""Exact laws, on quadratics, of steps along gradients that are averaged several times.

The direction is the gradient passed through moving averages in turn, ``m <- (1 - w) m + w input``, with the weights
``w_1, ..., w_q``; the first one's input is the gradient, and the step is ``x <- x - gamma m_q``. Plain momentum has the
weight beta. Error feedback with a linear operator ``C(g) = c g`` is one more average, of weight c:

| method | weights |
|---|---|
| momentum | ``beta`` |
| EF21 of ``C(g) = c g`` | ``c`` |
| EF21-SGDM | ``eta, c`` |
| EF21-SGD2M | ``eta, eta, c`` |
| Clip21-SGD2M, once nothing is clipped | ``eta, server`` |

A contraction has ``1 - a <= c <= 1 + a``, ``a = sqrt(1 - alpha_c)``. No step size above the limit of any of these is
safe for all operators with this contraction, which makes these limits necessary; the bounds of the other modules are
sufficient.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metamom.theory import checks
from metamom.theory.stationary import Numbers

ROUNDING = 1e-9


@checks.as_stated
def averaged_limit(weights: Sequence[float], L: float) -> float:
    """The step size below which steps along averaged gradients are stable on a quadratic; at or above it they are not.

    The transfer from gradient to step is ``gamma prod_j w_j z/(z - (1 - w_j)) / (z - 1)``. At the limit a root
    ``z = e^(i theta)`` is on the unit circle: at ``theta = pi``, or where the imaginary part of
    ``(z - 1) prod_j (z - p_j) z^(-q)``, ``p_j = 1 - w_j``, vanishes, a polynomial in ``cos theta``.

    Args:
        weights: ``w_1, ..., w_q``, each in (0, 2); in any order.
        L: the largest curvature, > 0.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(averaged_limit([0.1], L=1.0), 6)  # momentum: 2 (2 - beta) / beta
        38.0
        >>> round(averaged_limit([0.1, 0.5], L=1.0), 6)
        1.222222

    Reference: docs/theory/operators.md, "Averages in turn"; Jury's conditions.
    """
    checked = _checked(weights)
    checks.positive(L=L)
    poles = 1 - checked
    gain = float(np.prod(checked))
    # F(z) = (z - 1) prod (z - p_j) / z^q = sum_k b_k z^(1 - k); the roots of z^q (F + gamma L gain) are on the circle
    # where -F is real and equals gamma L gain
    b = np.poly(np.concatenate([[1.0], poles]))
    q = len(poles)
    # Im F / sin(theta) = U_0 - sum_{k >= 2} b_k U_{k-2}(cos theta), U Chebyshev's of the second kind
    found = [-1.0]
    if q > 1:
        second = np.polynomial.Polynomial([1.0])
        previous, current = np.polynomial.Polynomial([0.0]), np.polynomial.Polynomial([1.0])
        twice = np.polynomial.Polynomial([0.0, 2.0])
        for k in range(2, q + 2):
            second = second - b[k] * current
            previous, current = current, twice * current - previous
        roots = np.roots(second.coef[::-1])
        found += [float(c.real) for c in roots if abs(c.imag) < ROUNDING and -1 < c.real < 1]
    limits = []
    for cosine in found:
        z = np.exp(1j * np.arccos(cosine))
        value = -float(np.real(sum(b[k] * z ** (1 - k) for k in range(q + 2)))) / (gain * L)
        limits.append(value if value > 0 else inf)
    return min(limits)


@checks.as_stated
def averaged_floor(lam: Numbers, sigma2: Numbers, weights: Sequence[float], gamma: float) -> float:
    """``E ||grad f(x)||^2`` in the limit of many steps, from the noise of the gradients alone: exact on a quadratic.

    Args:
        lam: curvatures ``[d]``, > 0, or a number.
        sigma2: variances of the mean gradient's noise along these axes ``[d]``, or a number, >= 0.
        weights: as for `averaged_limit`.
        gamma: step size, > 0, below `averaged_limit` of the largest curvature.

    Raises:
        ValueError: for a number out of its range, or a step size at or above the limit.

    Example:
        >>> round(averaged_floor(1.0, 0.3, [0.2], 0.5), 9)  # as `stationary` has it
        0.077142857

    Reference: docs/theory/operators.md, "Averages in turn": the covariance solves ``S = A S A^T + Q``.
    """
    axes, noise = (torch.as_tensor(value, dtype=torch.float64).flatten() for value in (lam, sigma2))
    axes, noise = axes + 0 * noise, noise + 0 * axes
    if len(axes) == 0 or not bool(((axes > 0) & axes.isfinite() & (noise >= 0) & noise.isfinite()).all()):
        raise ValueError("curvatures lam must be > 0, variances sigma2 >= 0, all finite; got others, or none.")
    limit = averaged_limit(weights, float(axes.max()))
    if not 0 < gamma < limit:
        raise ValueError(f"steps along these averages are stable for 0 < gamma < {limit:.6g}; got gamma={gamma!r}.")
    total = 0.0
    for curvature, variance in zip(axes.tolist(), noise.tolist(), strict=True):
        A, kick = _recursion(_checked(weights), curvature, gamma)
        size = len(A)
        outer = variance * torch.outer(kick, kick)
        system = torch.eye(size**2, dtype=torch.float64) - torch.kron(A, A)
        solution, info = torch.linalg.solve_ex(system, outer.flatten())
        if int(info):
            raise ZeroDivisionError("the step is too small for 1 - gamma to differ from 1")
        total += curvature**2 * float(solution[0])
    return total


def _recursion(weights: NDArray[np.float64], curvature: float, gamma: float) -> tuple[Tensor, Tensor]:
    """``(x, m_1, ..., m_q) <- A (x, m_1, ..., m_q) + kick * noise`` for one axis with its minimum at 0."""
    q = len(weights)
    A, kick = torch.zeros(q + 1, q + 1, dtype=torch.float64), torch.zeros(q + 1, dtype=torch.float64)
    row, noise = torch.zeros(q + 1, dtype=torch.float64), 1.0  # the input of the next average, in the old state
    row[0] = curvature
    for j, weight in enumerate(weights.tolist(), start=1):
        row = weight * row
        row[j] += 1 - weight
        noise *= weight
        A[j], kick[j] = row, noise
    A[0] = -gamma * row
    A[0, 0] += 1
    kick[0] = -gamma * noise
    return A, kick


def _checked(weights: Sequence[float]) -> NDArray[np.float64]:
    numbers = np.array([float(weight) for weight in weights], dtype=np.float64)
    if len(numbers) == 0 or not bool(((numbers > 0) & (numbers < 2)).all()):
        raise ValueError(f"weights must be one number or more in (0, 2); got {list(weights)}.")
    return numbers
