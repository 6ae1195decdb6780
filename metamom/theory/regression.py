"""Closed forms for the mean of every meta-gradient estimator in linear regression. The tests use them as oracles.

``y = phi^T theta + residual``, **loss 1/2 (phi^T w - y)^2**, ``delta = w - theta``. `torch.nn.MSELoss` lacks the 1/2:
for it, pass 2 alpha as alpha and double the result. Outer batches are fresh, and steps are deterministic given their
batches. Means are `AffineMean`: ``coupled(design, alpha, m).at(delta)``.

Legend: Sigma, K as in designs.py; m inner batch, J steps; ``T(Q) = E[(I - alpha S) Q (I - alpha S)]``, S the mean of
``phi phi^T`` over a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.theory import checks
from metamom.theory.designs import Design
from metamom.theory.fixed_points import AffineMean, linear


@checks.as_stated
def population(design: Design, alpha: float, steps: int = 1) -> AffineMean:
    """The gradient of f itself, ``(I - alpha Sigma)^J Sigma (I - alpha Sigma)^J delta``.

    It is also the mean of the estimators that are unbiased here: independent Hessian batch, cross-fit, Richardson
    (J = 1).

    Args:
        design: the inputs.
        alpha: inner step size, >= 0.
        steps: J.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> from metamom.theory.designs import Gaussian
        >>> population(Gaussian(torch.eye(1)), alpha=0.1).gain
        tensor([[0.8100]], dtype=torch.float64)

    Reference: docs/theory/maml.md, "Linear regression".
    """
    checks.not_negative(alpha=alpha)
    checks.counts(steps=steps)
    S = design.covariance
    adapt = torch.linalg.matrix_power(_identity(S) - alpha * S, steps)
    return linear(adapt @ S @ adapt)


@checks.as_stated
def coupled(
    design: Design, alpha: float, m: int, *, skew: Tensor | None = None, points: int | None = None, share: float = 1.0
) -> AffineMean:
    """The usual MAML, one step: ``grad f + alpha^2/m [(K(Sigma) - Sigma^3) delta - c]``.

    Assumed: residuals uncorrelated with phi (theta is the best fit); inner batches drawn independently of each other.

    Args:
        design: the inputs.
        alpha: inner step size, >= 0.
        m: inner batch.
        skew: ``c = E[(phi^T Sigma phi) phi residual]``, ``[d]`` (`Points.skew`); None if residuals do not
            depend on phi.
        points: N, if batches are drawn without replacement from N points: the bias gets a factor (N-m)/(N-1).
        share: a factor on the bias: b_u for MOML with the Hessian on the tracking batch, at frozen weights.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> from metamom.theory.designs import Gaussian
        >>> coupled(Gaussian(torch.eye(3)), alpha=0.1, m=5).gain.diagonal()
        tensor([0.8180, 0.8180, 0.8180], dtype=torch.float64)

    Reference: docs/theory/maml.md, "Linear regression".
    """
    checks.counts(m=m)
    checks.not_negative(share=share)
    exact = population(design, alpha)
    factor = share * alpha**2 / m
    if points is not None:
        if not m <= points:
            raise ValueError(f"a batch without replacement needs m <= points={points}; got m={m}.")
        factor *= (points - m) / (points - 1) if points > 1 else 0.0
    S = design.covariance
    gain = exact.gain + factor * (design.fourth(S) - S @ S @ S)
    return AffineMean(gain, exact.offset if skew is None else -factor * skew.to(gain.dtype))


@checks.as_stated
def first_order(design: Design, alpha: float, steps: int = 1) -> AffineMean:
    """First-order MAML: ``Sigma (I - alpha Sigma)^J delta``, whatever the batch; fresh batches for J > 1.

    Args:
        design, alpha, steps: as for `population`.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> from metamom.theory.designs import Gaussian
        >>> first_order(Gaussian(torch.eye(1)), alpha=0.1).gain
        tensor([[0.9000]], dtype=torch.float64)

    Reference: docs/theory/maml.md, "Linear regression".
    """
    checks.not_negative(alpha=alpha)
    checks.counts(steps=steps)
    S = design.covariance
    return linear(S @ torch.linalg.matrix_power(_identity(S) - alpha * S, steps))


@checks.as_stated
def fresh_batches(design: Design, alpha: float, m: int, steps: int) -> AffineMean:
    """J steps, each with its own batch for gradient and Hessian: ``T^J(Sigma) delta``.

    ``T(Q) = Q - alpha (Sigma Q + Q Sigma) + alpha^2 [Sigma Q Sigma + (K(Q) - Sigma Q Sigma)/m]``. Assumed: residuals
    that do not depend on phi.

    Args:
        design: the inputs.
        alpha: inner step size, >= 0.
        m: size of each batch.
        steps: J.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> from metamom.theory.designs import Gaussian
        >>> fresh_batches(Gaussian(torch.eye(3)), alpha=0.1, m=5, steps=2).gain[0, 0].item()
        0.669124

    Reference: docs/theory/maml.md, "Linear regression".
    """
    checks.not_negative(alpha=alpha)
    checks.counts(m=m, steps=steps)
    S = design.covariance
    Q = S
    for _ in range(steps):
        both = S @ Q @ S
        Q = Q - alpha * (S @ Q + Q @ S) + alpha**2 * (both + (design.fourth(Q) - both) / m)
    return linear(Q)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype)
