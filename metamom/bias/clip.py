"""Clipping by the Euclidean norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator


def clip(gradient: Tensor, max_norm: float) -> Tensor:
    """Scale each vector to a norm of at most ``max_norm``: ``C(g) = g min(1, tau / ||g||)``.

    A vector within the bound passes bit for bit, and so does one with an infinite or NaN entry, whose norm cannot be
    brought under the bound: it must stay visible to whoever checks that gradients are finite.

    Args:
        gradient: ``[..., d]``.
        max_norm: tau > 0.

    Returns:
        ``[..., d]``.
    """
    # scaled by the largest entry first, so that neither squares nor the norm itself overflow or vanish
    largest = gradient.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    scaled = gradient / scale
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)  # ||g|| / scale, between 1 and sqrt(d)
    return torch.where(norm > max_norm / scale, scaled * (max_norm / norm), gradient)


class Clip(BiasOperator):
    """Clip each worker's gradient to norm tau; biased, and contractive only where norms are bounded.

    Args:
        max_norm: tau > 0, finite.

    Raises:
        ValueError: if tau is not a positive finite number.

    Example:
        >>> Clip(1.0)(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])

    Reference:
        arXiv 2403.00853, the clipping application; ``||C(g) - g|| = (||g|| - tau)_+``.
    """

    def __init__(self, max_norm: float) -> None:
        if not 0 < max_norm < math.inf:
            raise ValueError(f"Clip needs a norm tau with 0 < tau < infinity; got {max_norm}.")
        self.max_norm = float(max_norm)

    def __call__(self, gradient: Tensor) -> Tensor:
        """See `BiasOperator`."""
        return clip(gradient, self.max_norm)

    @property
    def spec(self) -> str:
        """``clip:TAU``."""
        return f"clip:{self.max_norm!r}".removesuffix(".0")
