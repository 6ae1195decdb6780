"""Euclidean norms without overflow or underflow."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_norm(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide each row by its largest magnitude; return the quotient, that magnitude, and the quotient's norm.

    Squares of the quotient cannot overflow or all vanish, even in 16 bits. ``||g||`` is ``scale * norm``.

    Args:
        rows: ``[..., d]``.

    Returns:
        ``(g / scale [..., d], scale [..., 1], norm [..., 1])``; a row of zeros has scale 1 and norm 0.
    """
    largest = rows.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    scaled = rows / scale
    return scaled, scale, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
