"""The exact stationary law of momentum on a quadratic, the reference for every noise and bias experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.theory import checks

Numbers = float | Sequence[float] | Tensor


class Stationary(NamedTuple):
    """The law of ``(x, v)`` in the limit of many steps.

    Attributes:
        mean: ``E[x - x*]`` ``[d]``, where x* is the minimum.
        variance: of each coordinate of x, ``[d]``.
        grad_sq: ``E ||grad f(x)||^2``.
        gap: ``E[f(x) - f*]``.
        v_sq: ``E ||v||^2``.
        deviation_sq: ``E ||v_k - grad f(x_k)||^2``.
    """

    mean: Tensor
    variance: Tensor
    grad_sq: float
    gap: float
    v_sq: float
    deviation_sq: float


@checks.as_stated
def stationary(lam: Numbers, sigma2: Numbers, bias: Numbers, beta: float, gamma: float) -> Stationary:
    """The stationary law of momentum on ``f(x) = 1/2 sum_j lam_j (x_j - x*_j)^2`` under constant bias and noise.

    ``v <- (1 - beta) v + beta (grad f(x) + bias + xi)``, ``x <- x - gamma v``: with
    ``D_j = 2 (2 - beta) - gamma beta lam_j``, ``E[x - x*] = -bias / lam`` and
    ``Var(x_j) = gamma sigma_j^2 (2 - beta) / (lam_j D_j)``. It is exact, for noise of any distribution.

    At a fixed step size the noise in ``E ||grad f||^2`` hardly depends on beta (about ``gamma lam sigma^2 / 2``), but
    ``deviation_sq`` decreases with beta.

    Args:
        lam: curvatures ``[d]``, > 0, along any orthogonal axes. A single number means all axes, here and below.
        sigma2: variances of the noise along these axes ``[d]``, >= 0; independent from step to step.
        bias: constant bias along these axes ``[d]``.
        beta: in (0, 1].
        gamma: step size, in ``(0, 2 (2 - beta) / (beta max lam))``; otherwise there is no stationary law.

    Returns:
        Means and expected squares, in float64.

    Raises:
        ValueError: for a number out of its range, lengths that differ, or a step size at or above the limit.

    Example:
        >>> law = stationary([1.0, 0.25], [0.3, 0.7], [0.1, -0.2], beta=0.2, gamma=0.5)
        >>> round(law.grad_sq, 6), round(law.deviation_sq, 6)
        (0.171199, 0.256873)

    Reference: docs/theory/quadratics.md, "Stationary law on quadratics"; the variance of an AR(2) process.
    """
    lam, sigma2, bias = _vectors(lam, sigma2, bias)
    _check(lam, sigma2, bias, beta, gamma)
    keep = 1 - beta
    step = gamma * lam
    D = 2 * (2 - beta) - beta * step
    variance = gamma * sigma2 * (2 - beta) / (lam * D)
    noise = (lam**2 * variance).sum()  # of the gradient
    deviation = sigma2 * (keep**2 * (2 * beta * (1 + step) + step * (2 - beta)) / D + beta**2)
    bias_sq = (bias**2).sum()
    return Stationary(
        mean=-bias / lam,
        variance=variance,
        grad_sq=float(bias_sq + noise),
        gap=float((bias**2 / lam).sum() + (lam * variance).sum()) / 2,
        v_sq=float((2 * beta * sigma2 / D).sum()),
        deviation_sq=float(bias_sq + deviation.sum()),
    )


@checks.as_stated
def stable_limit(lam_max: float, beta: float) -> float:
    """The step size below which momentum is stable on a quadratic: ``2 (2 - beta) / (beta lam_max)``.

    It is ``2 (2 - beta)^2 / beta^2`` times `max_step`, which holds for every smooth function and every bias.

    Args:
        lam_max: the largest curvature, > 0.
        beta: in (0, 1].

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> stable_limit(1.0, beta=1.0)
        2.0

    Reference: docs/theory/quadratics.md, "Stationary law on quadratics"; the Jury conditions of an AR(2) process.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"beta must be in (0, 1]; got {beta!r}. beta=1 is plain SGD.")
    if not 0 < lam_max < float("inf"):
        raise ValueError(f"lam_max must be > 0 and finite; got {lam_max!r}.")
    return 2 * (2 - beta) / (beta * lam_max)


def _vectors(*numbers: Numbers) -> tuple[Tensor, ...]:
    """Convert all to float64 vectors of the same length ``[d]``."""
    vectors = [torch.as_tensor(n, dtype=torch.float64).detach() for n in numbers]
    lengths = {v.shape for v in vectors if v.dim() > 0}
    if len(lengths) > 1 or any(len(shape) != 1 for shape in lengths):
        shapes = ", ".join(str(tuple(v.shape)) for v in vectors)
        raise ValueError(f"lam, sigma2 and bias must be numbers or vectors of one length [d]; got shapes {shapes}.")
    d = next(iter(lengths))[0] if lengths else 1
    return tuple(v.expand(d) for v in vectors)


def _check(lam: Tensor, sigma2: Tensor, bias: Tensor, beta: float, gamma: float) -> None:
    """Refuse arguments without a stationary law."""
    if lam.numel() == 0 or not bool(((lam > 0) & lam.isfinite()).all()):
        raise ValueError(f"the curvatures lam must be > 0 and finite; got {lam.tolist()}. A flat axis has no limit.")
    if not bool(((sigma2 >= 0) & sigma2.isfinite()).all()):
        raise ValueError(f"the variances sigma2 must be >= 0 and finite; got {sigma2.tolist()}.")
    if not bool(bias.isfinite().all()):
        raise ValueError(f"bias must be finite; got {bias.tolist()}.")
    limit = stable_limit(float(lam.max()), beta)
    if not 0 < gamma < limit:
        raise ValueError(
            f"momentum with beta={beta} is stable on curvatures up to {float(lam.max())} only for "
            f"0 < gamma < 2(2-beta)/(beta lam) = {limit:.6g}; got gamma={gamma}. Lower gamma or beta."
        )
