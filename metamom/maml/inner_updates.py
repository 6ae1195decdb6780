"""The directions of inner steps from their gradients: plain, with momentum, or Adam's, all differentiable.

Legend: T tasks, j the number of the step, from 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metamom.maml.inner_optimizer import InnerAdam, InnerOptimizer, InnerSGD
from metamom.nets.low_rank import plain


class Moments(NamedTuple):
    """What an inner optimizer keeps of one parameter between the steps of an adaptation.

    Attributes:
        steps: how many there were.
        first: SGD's buffer b, or Adam's m; ``[T, *shape]``.
        second: Adam's v; ``None`` for SGD.
    """

    steps: int
    first: Tensor
    second: Tensor | None = None


def direction(optimizer: InnerOptimizer, moments: Moments | None, grad: Tensor) -> tuple[Tensor, Moments | None]:
    """d_j of ``u_j = u_{j-1} - alpha d_j``, and what the next step needs.

    Args:
        optimizer: which update.
        moments: from the step before; ``None`` in the first.
        grad: g_j, ``[T, *shape]``.

    Example:
        >>> g = torch.tensor([1.0])
        >>> first, moments = direction(InnerSGD(0.5), None, g)
        >>> direction(InnerSGD(0.5), moments, g)[0]
        tensor([1.5000])
    """
    if isinstance(optimizer, InnerAdam):
        return adam_direction(optimizer, moments, plain(grad))
    if optimizer.plain:
        return grad, None
    return momentum_direction(optimizer, moments, grad)


def momentum_direction(optimizer: InnerSGD, moments: Moments | None, grad: Tensor) -> tuple[Tensor, Moments]:
    """``b_j``, or ``g_j + momentum * b_j`` in Nesterov's form, with ``b_1 = g_1`` and ``b_j = momentum b_{j-1} + g_j``.

    Args and returns as of `direction`.

    Reference:
        `torch.optim.SGD`, without dampening.
    """
    buffer = grad if moments is None else optimizer.momentum * moments.first + grad
    taken = grad + optimizer.momentum * buffer if optimizer.nesterov else buffer
    return taken, Moments(1 if moments is None else moments.steps + 1, buffer)


def adam_direction(optimizer: InnerAdam, moments: Moments | None, grad: Tensor) -> tuple[Tensor, Moments]:
    """``m_j / (1 - beta1^j) / (sqrt(v_j / (1 - beta2^j) + eps_root) + eps)``, see `InnerAdam`.

    Args and returns as of `direction`.

    Reference:
        `torch.optim.Adam`.
    """
    step = 1 if moments is None else moments.steps + 1
    m, v = (1 - optimizer.beta1) * grad, (1 - optimizer.beta2) * grad * grad
    if moments is not None:
        assert moments.second is not None
        m, v = optimizer.beta1 * moments.first + m, optimizer.beta2 * moments.second + v
    unbiased = v / (1 - optimizer.beta2**step) + optimizer.eps_root
    return m / (1 - optimizer.beta1**step) / (root(unbiased) + optimizer.eps), Moments(step, m, v)


def root(x: Tensor) -> Tensor:
    """``sqrt(x)`` with derivative 0 where x is 0, in place of infinity.

    In Adam's update, v is 0 only where all gradients of an entry were 0. There m is 0 too, so m times the derivative of
    the root, which is bounded in the gradients, is 0: this choice gives the update's exact derivative.

    Args:
        x: entries >= 0, any shape.

    Example:
        >>> g = torch.zeros(1, requires_grad=True)
        >>> (g / (root(g**2) + 0.01)).backward()
        >>> g.grad
        tensor([100.])
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
