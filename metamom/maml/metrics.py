"""Metrics of predictions, one value a task.

Legend: T tasks, Q query points a task, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.maml.checks.class_scores import Reading, class_axes


def accuracy(
    predictions: Tensor, targets: Tensor, reading: Reading | None = None, mask: Tensor | None = None
) -> Tensor | None:
    """The fraction of correct predictions in each task, interpreted as the loss function interprets them.

    The predicted class of a point (or of each pixel or token) is the one with the largest score. With one logit a
    point it is 1 if the logit is > 0. Targets outside the classes (such as torch's ``ignore_index=-100``) and targets
    equal to the loss's own ``ignore_index`` are skipped. A task with no remaining target gets NaN. A NaN prediction is
    wrong.

    Args:
        predictions: scores ``[T, Q, C]`` or ``[T, Q, C, ...]``; for two classes also one logit a point, ``[T, Q]`` or
            ``[T, Q, 1]``.
        targets: class indices ``[T, Q]`` or ``[T, Q, ...]``, whole numbers or booleans.
        reading: how the loss function was seen to interpret them, see `LossReadings`. Without a reading, scores must
            have one axis more than targets, the class axis, and the shapes must determine which axis it is.
        mask: the points that count, ``[T, Q]``; all by default.

    Returns:
        ``[T]`` in [0, 1] or NaN; ``None`` for targets that are not class indices (values, class probabilities,
        floating-point labels), and if nothing determines what the predictions mean.
    """
    if targets.is_floating_point() or targets.is_complex():
        return None
    targets = targets.long()
    if reading is None:
        axes = class_axes(predictions.shape[1:], targets.shape[1:])
        if len(axes) != 1 or predictions.shape[1 + axes[0]] < 2:
            return None
        reading = Reading("classes", axes[0])
    if reading.kind == "unknown":
        return None
    if reading.kind == "classes":
        classes = predictions.shape[1 + reading.axis]
        best, found = predictions.max(1 + reading.axis)
        if found.shape != targets.shape:  # the loss drops an axis of one label
            if found.numel() != targets.numel() or found.shape[:2] != targets.shape[:2]:
                return None
            targets = targets.reshape(found.shape)
    else:
        classes, best = 2, predictions.reshape(targets.shape)
        found = (best > (0 if reading.kind == "logit" else 0.5)).long()
    counted = targets.clamp(0, classes - 1) == targets
    if reading.ignored is not None and 0 <= reading.ignored < classes:
        counted &= targets != reading.ignored
    if mask is not None:
        counted &= mask.view(*mask.shape, *[1] * (counted.dim() - 2))
    right = (found == targets) & counted & (best == best)  # not NaN
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    hits, of = (each.flatten(1).sum(1, dtype=dtype) for each in (right, counted))
    return hits / of
