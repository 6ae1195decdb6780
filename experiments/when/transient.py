"""Mean and variance of momentum at every step on a quadratic, exactly: where `metamom.theory.stationary` is the limit.

Along an axis of curvature lam, in units of the gradient, u = lam x, with c = gamma lam and h = 1 + i turn:

    v <- (1 - beta) v + beta (h u + b + xi),    u <- u - c v,    v_{-1} = 0.

Both are linear. The mean of u is ``u_0 p - b/h (1 - p)``, with p the trajectory from 1 without bias and noise; the
variance is the noise's variance times another such sequence. A turn is a bias proportional to the gradient and
orthogonal to it, ``turn J grad f`` with J a quarter turn in a plane of two equal curvatures: u is a complex number, the
two entries of the gradient in that plane, and ``B = turn^2``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Moments of u_k and v_k at one step, for a first gradient of 1 and noise of variance 1.

    Attributes:
        left: p_k, the factor on the first gradient in u_k.
        momentum: q_k, the factor on it in v_k.
        variance: of u_k.
        deviation: variance of ``v_k - u_k``.
    """

    left: Tensor
    momentum: Tensor
    variance: Tensor
    deviation: Tensor


def moments(step: Tensor, beta: Tensor, turn: float = 0.0) -> Iterator[Moments]:
    """Yield the moments at k = 0, 1, 2, ..., in float64.

    Args:
        step: c = gamma lam of each axis, > 0.
        beta: in (0, 1]; the two broadcast against each other.
        turn: of the bias proportional to the gradient.

    Returns:
        `Moments` of the broadcast shape; complex where there is a turn.
    """
    c = step.double() + 0 * beta
    beta = beta.double() + 0 * c
    keep = 1 - beta
    h: complex | float = complex(1, turn) if turn else 1.0
    h_sq = abs(h) ** 2
    p = torch.ones_like(c, dtype=torch.complex128 if turn else torch.float64)
    q = torch.zeros_like(p)
    of_u, of_v, both = torch.zeros_like(c), torch.zeros_like(c), torch.zeros_like(p)  # both: E[u conj(v)]
    while True:
        of_v = keep**2 * of_v + 2 * keep * beta * (h * both).real + beta**2 * (h_sq * of_u + 1)
        both = keep * both + beta * complex(h).conjugate() * of_u if turn else keep * both + beta * of_u
        q = keep * q + beta * h * p
        yield Moments(p, q, of_u, of_v - 2 * both.real + of_u)
        p = p - c * q
        of_u = of_u - 2 * c * both.real + c**2 * of_v
        both = both - c * of_v


def turning_limit(B: float, beta: float) -> float:
    """The gamma L below which momentum is stable under a turn: ``2 (2 - beta) beta / (beta^2 + (2 - beta)^2 B)``.

    ``2/(1 + B)`` for SGD; over all beta it is largest, ``1/sqrt(B)``, at ``beta = 2 sqrt(B) / (1 + sqrt(B))``: a bias
    that turns leaves momentum steps at most ``(1 + B) / (2 sqrt(B))`` times as long. From Schur and Cohn's condition on
    ``z^2 - (2 - beta - beta c h) z + (1 - beta)``.
    """
    return 2 * (2 - beta) * beta / (beta**2 + (2 - beta) ** 2 * B)
