"""What a prediction is worth, task by task."""

from __future__ import annotations

from torch import Tensor


def accuracy(predictions: Tensor, targets: Tensor) -> Tensor | None:
    """Share of right answers in each task.

    Args:
        predictions: class scores ``[T, Q, N]``.
        targets: class indices ``[T, Q]``; anything else is no classification.

    Returns:
        ``[T]`` in [0, 1]; ``None`` where targets are no class indices.
    """
    if targets.is_floating_point() or predictions.dim() != targets.dim() + 1:
        return None
    return (predictions.argmax(-1) == targets).to(predictions.dtype).flatten(1).mean(1)
