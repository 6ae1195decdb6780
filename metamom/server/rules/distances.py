"""Distances between the workers' vectors, without overflow."""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.bias.norms import scaled_norm


def widened(vectors: Tensor) -> Tensor:
    """The vectors in at least float32."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def norms(away: Tensor) -> Tensor:
    """Norms ``[n]`` of ``[n, d]``."""
    _, scale, norm = scaled_norm(away)
    return (scale * norm).squeeze(-1)


def pairwise(vectors: Tensor) -> Tensor:
    """Distances ``[n, n]`` in float64 between ``[n, d]``; one row at a time, which takes memory for n d numbers."""
    half = widened(vectors) * 0.5  # so that no difference overflows
    return 2 * torch.stack([norms(half - each) for each in half]).double()
