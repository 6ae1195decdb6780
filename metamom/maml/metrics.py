"""What a prediction is worth, task by task.

Legend: T tasks, Q query points a task, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.maml.class_scores import Reading, class_axes


def accuracy(predictions: Tensor, targets: Tensor, reading: Reading | None = None) -> Tensor | None:
    """Share of right answers in each task, as the loss function means predictions and targets.

    The class of a point, or of each of its pixels or words, is the one of the largest score; with one logit a point,
    1 where the logit is > 0. A target outside the classes (torch's ``ignore_index=-100``, say) and one that equals the
    loss's own ``ignore_index`` count neither as right nor as wrong; a task where none counts has NaN. A prediction of
    NaN is wrong.

    Args:
        predictions: scores ``[T, Q, C]`` or ``[T, Q, C, ...]``; for two classes also one logit a point, ``[T, Q]`` or
            ``[T, Q, 1]``.
        targets: class indices ``[T, Q]`` or ``[T, Q, ...]``, whole numbers or booleans.
        reading: what the loss function was seen to take them for, see `LossReadings`. Without one, scores have an
            axis more than targets, the class axis, which must follow from the shapes.

    Returns:
        ``[T]`` in [0, 1] or NaN; ``None`` for targets that are no class indices, such as values, class probabilities
        and labels in floating point, and where nothing says what the predictions are.
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
    counted = (targets >= 0) & (targets < classes)
    if reading.ignored is not None:
        counted &= targets != reading.ignored
    right = (found == targets) & counted & ~best.isnan()
    each = right.flatten(1).sum(1), counted.flatten(1).sum(1)
    hits, of = (n.to(torch.promote_types(predictions.dtype, torch.float32)) for n in each)
    return hits / of
