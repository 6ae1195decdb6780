"""Losses of `torch.nn.functional`, written out, that `torch.func.vmap` runs in a loop with a warning.

Legend: N points of one task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.nn import functional as F


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """`torch.nn.functional.kl_div`: ``t (log t - x)`` of log-probabilities x and probabilities t.

    Example:
        >>> x, t = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]])
        >>> kl_div(x, t, reduction="batchmean"), F.kl_div(x, t, reduction="batchmean")
        (tensor(0.6931), tensor(0.6931))
    """
    each = target.exp() * (target - input) if log_target else torch.xlogy(target, target) - target * input
    reduction = _named(size_average, reduce, reduction)
    if reduction == "batchmean":
        return each.sum() / input.shape[0]
    return _reduced(each, reduction)


def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.margin_ranking_loss`: ``max(0, -y (a - b) + margin)``."""
    if not input1.dim() == input2.dim() == target.dim():
        return F.margin_ranking_loss(input1, input2, target, margin)  # raises torch's own error
    each = (-target * (input1 - input2) + margin).clamp_min(0)
    return _reduced(each, _named(size_average, reduce, reduction))


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.soft_margin_loss`: ``log(1 + exp(-y x))``."""
    return _reduced((-target * input).exp().log1p(), _named(size_average, reduce, reduction))


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.triplet_margin_loss`: ``max(0, d(a, b) - d(a, c) + margin)``."""
    if margin <= 0 or not anchor.dim() == positive.dim() == negative.dim():
        return F.triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, reduction=reduction)
    near, far = (F.pairwise_distance(anchor, other, p, eps) for other in (positive, negative))
    if swap:
        far = torch.minimum(far, F.pairwise_distance(positive, negative, p, eps))
    return _reduced((margin + near - far).clamp_min(0), _named(size_average, reduce, reduction))


WRITTEN: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.kl_div: kl_div,
    F.margin_ranking_loss: margin_ranking_loss,
    F.soft_margin_loss: soft_margin_loss,
    F.triplet_margin_loss: triplet_margin_loss,
}


def _named(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction, by its name or by the two flags of before."""
    if size_average is None and reduce is None:
        return reduction
    name: str = _Reduction.legacy_get_string(size_average, reduce)
    return name


def _reduced(each: Tensor, reduction: str) -> Tensor:
    """The mean, the sum, or all.

    Raises:
        ValueError: for another reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()
