"""Metrics of one task's predictions, by name or as functions: ``metric(predictions, targets) -> a number``.

Legend: Q query points of one task, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metamom.bias.function import function_name
from metamom.common.choices import METRICS
from metamom.common.did_you_mean import did_you_mean
from metamom.common.held import held, released
from metamom.common.kinds import named_type
from metamom.common.trees import Tree, count, mapped
from metamom.maml.padding import cut_off

Metric = Callable[[Any, Any], Any]

BINS = 15


def macro_f1(scores: Tensor, targets: Tensor) -> Tensor:
    """The mean over the classes of ``2 TP / (2 TP + FP + FN)``; classes that occur in neither are left out.

    Args:
        scores: ``[Q, C]``; the largest is the prediction.
        targets: class indices ``[Q]``; negative ones are skipped.

    Example:
        >>> macro_f1(torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2]))
        tensor(0.7778)
    """
    scores, targets = _classified("macro-f1", scores, targets)
    found, each = scores.argmax(-1), []
    for label in torch.unique(torch.cat([found, targets])):
        true, positive = targets == label, found == label
        hits = (true & positive).sum()
        each.append(2 * hits / (true.sum() + positive.sum()))
    return torch.stack(each).mean()


def rmse(predictions: Tensor, targets: Tensor) -> Tensor:
    """The root of the mean squared error over all entries of predictions and targets ``[Q, ...]``.

    Example:
        >>> rmse(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]]))
        tensor(1.4142)
    """
    if predictions.numel() != targets.numel() or predictions.shape[:1] != targets.shape[:1]:
        raise ValueError(
            f"rmse compares predictions with targets of the same shape; got {list(predictions.shape)} and "
            f"{list(targets.shape)}."
        )
    return (predictions - targets.reshape(predictions.shape)).square().mean().sqrt()


def calibration_error(scores: Tensor, targets: Tensor, bins: int = BINS) -> Tensor:
    """The expected calibration error: ``sum_b n_b / Q |accuracy_b - confidence_b|`` over bins of equal width.

    With few queries a task it is too large, since each bin's accuracy is noise: use tasks with many.

    Args:
        scores: ``[Q, C]``, before the softmax. A point's confidence is its largest probability.
        targets: class indices ``[Q]``; negative ones are skipped.
        bins: the number of bins in (0, 1].

    Reference:
        Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks" (2017), equation 3.
    """
    scores, targets = _classified("calibration-error", scores, targets)
    confidence, found = scores.softmax(-1).max(-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    index = torch.bucketize(confidence, edges[1:-1])
    gaps = confidence.new_zeros(bins).index_add(0, index, (found == targets).to(confidence.dtype) - confidence)
    return gaps.abs().sum() / len(targets)


NAMED: dict[str, Metric] = {"macro-f1": macro_f1, "rmse": rmse, "calibration-error": calibration_error}


def check_metric(metric: object) -> None:
    """Refuse anything that is not the name of a metric, a function, or ``None``.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else.
    """
    if metric is None or (callable(metric) and not isinstance(metric, (str, type))):
        return
    known = ", ".join(METRICS)
    if not isinstance(metric, str):
        raise TypeError(
            f"metric must be {known}, or a function (predictions [Q, ...], targets [Q, ...]) -> a number of one task; "
            f"got {metric!r:.80}."
        )
    if metric not in METRICS:
        close = did_you_mean([metric], METRICS)
        raise ValueError(f"metric must be {known}, or a function; got {metric!r:.40}{close or '.'}")


def name_of(metric: str | Metric) -> str:
    """The name of a metric, as in results."""
    if isinstance(metric, str):
        return metric
    return function_name(getattr(metric, "func", metric)).rpartition(".")[2]  # of a partial function, its function


def of_tasks(metric: str | Metric, predictions: Tree, targets: Tree, mask: Tensor | None = None) -> Tensor:
    """A metric of each task, ``[T]`` in float64.

    Args:
        metric: a name in `NAMED`, or a function, which is called for each task.
        predictions: ``[T, Q, ...]``, a tensor or a tree.
        targets: the same.
        mask: the points that count, ``[T, Q]``.

    Raises:
        ValueError: for a function that does not return a number.
    """
    function = NAMED[metric] if isinstance(metric, str) else metric
    values = []
    predictions = held(predictions)
    for t in range(count(predictions)):
        own = mapped(lambda x: x[t], (predictions, targets))  # noqa: B023
        if mask is not None:
            own = cut_off(own, mask[t])
        value = function(released(own[0]), own[1])
        if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
            kind = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else named_type(value)
            raise ValueError(f"the metric {name_of(metric)} must return one number for each task; got {kind}.")
        values.append(float(value))
    return torch.tensor(values, dtype=torch.float64)


def _classified(name: str, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and labels of the points that count.

    Raises:
        ValueError: for anything but class scores and indices.
    """
    if targets.is_floating_point() or scores.dim() != 2 or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"{name} takes class scores [Q, C] and class indices [Q]; got {list(scores.shape)} and "
            f"{list(targets.shape)} of {targets.dtype}."
        )
    counted = (targets >= 0) & (targets < scores.shape[1])
    if not bool(counted.any()):
        raise ValueError(f"{name} needs at least one target in 0..{scores.shape[1] - 1}.")
    return scores[counted], targets[counted]
