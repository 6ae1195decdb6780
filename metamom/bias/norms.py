"""Euclidean norms that neither overflow nor vanish."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_norm(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row over its largest magnitude, that magnitude, and the norm of the quotient.

    Squares of the quotient can neither overflow nor all vanish, in 16 bits either; ``||g||`` is ``scale * norm``.

    Args:
        rows: ``[..., d]``.

    Returns:
        ``(g / scale [..., d], scale [..., 1], norm [..., 1])``; a row of zeros has scale 1 and norm 0.
    """
    largest = rows.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    scaled = rows / scale
    return scaled, scale, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
