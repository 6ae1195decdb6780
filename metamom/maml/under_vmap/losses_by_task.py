"""Losses that run for each task under `torch.func.vmap`.

vmap does not support how torch checks the variances in `torch.nn.functional.gaussian_nll_loss`, or how it sums the
label weights in `torch.nn.functional.cross_entropy` with label smoothing. Of a plain cross entropy it makes ten small
operations, in Python; here it is PyTorch's own, on the points of all tasks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.nn import functional as F

from metamom.compile.tracing import is_tracing
from metamom.maml.under_vmap.batched import on_all_tasks
from metamom.maml.under_vmap.embeddings_by_task import within


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.gaussian_nll_loss`, written out.

    Raises:
        ValueError: for negative variances, and as torch's.
    """
    if not isinstance(var, Tensor) and var < 0:
        return F.gaussian_nll_loss(input, target, var, full, eps, reduction)  # raises torch's own error
    var = _not_negative(var) if isinstance(var, Tensor) else input.new_full(input.shape, var)
    if var.shape != input.shape:
        if input.shape[:-1] == var.shape:
            var = var.unsqueeze(-1)
        elif input.dim() != var.dim() or sum(v for n, v in zip(input.shape, var.shape, strict=True) if n != v) != 1:
            raise ValueError(
                f"gaussian_nll_loss needs a variance for each prediction {list(input.shape)}, or that shape with an "
                f"axis of size 1; got {list(var.shape)}."
            )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"the reduction of gaussian_nll_loss must be none, mean or sum; got {reduction!r}.")
    var = torch.where(var < eps, var + (eps - var).detach(), var)  # torch clamps the value, not the derivative
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _not_negative(var: Tensor) -> Tensor:
    """Return the variances unchanged.

    Raises:
        ValueError: for negative ones (in a compiled graph, torch's RuntimeError).
    """
    negative = var < 0
    if is_tracing():
        return var + within(negative.long(), 1).to(var.dtype)
    while torch._C._functorch.is_functorch_wrapped_tensor(negative):
        negative = torch._C._functorch.get_unwrapped(negative)
    if negative.any():
        raise ValueError(
            "gaussian_nll_loss needs variances >= 0; got negative ones. Make them positive, for example by exp() or "
            "F.softplus() of the model's output."
        )
    return var


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`. A weighted mean is the weighted sum over the weights of counted labels."""
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if weight is None and label_smoothing == 0 and reduction == "mean":
        mean = _mean_of_all_tasks(input, target, ignore_index)
        if mean is not None:
            return mean
    smoothed = weight is not None and label_smoothing > 0 and not target.is_floating_point()
    if weight is None or not smoothed or reduction != "mean":
        return F.cross_entropy(
            input, target, weight, None, ignore_index, None, reduction=reduction, label_smoothing=label_smoothing
        )
    total = F.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    counted = target != ignore_index
    weights = weight.gather(0, torch.where(counted, target, 0).flatten()).reshape(target.shape)
    return total / torch.where(counted, weights, 0.0).sum()


def _mean_of_all_tasks(input: Tensor, target: Tensor, ignore_index: int) -> Tensor | None:
    """Each task's mean cross entropy of scores ``[N, C]`` and labels ``[N]`` under vmap, computed without it.

    ``None`` for a call that vmap must make.
    """
    plain = input.dim() == 2 and target.dim() == 1 and target.dtype == torch.int64
    if not plain or input.dtype not in (torch.float32, torch.float64) or len(input) != len(target):
        return None

    def means(scores: Tensor, labels: Tensor) -> Tensor:
        counted = labels != ignore_index
        each = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=ignore_index, reduction="none")
        return each.view_as(labels).sum(1) / counted.sum(1)

    return on_all_tasks(means, input, target)


def linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` (recent PyTorch only), by way of `cross_entropy` above."""
    weight, smoothing = options.get("weight"), options.get("label_smoothing", 0.0)
    if weight is None or smoothing == 0 or options.get("reduction", "mean") != "mean" or target.is_floating_point():
        loss: Tensor = F.linear_cross_entropy(input, linear_weight, target, **options)
        return loss
    scores = F.linear(input, linear_weight, options.get("linear_bias"))
    ignored = options.get("ignore_index")
    return cross_entropy(
        scores.reshape(-1, scores.shape[-1]),
        target.reshape(-1),
        weight,
        ignore_index=-100 if ignored is None else ignored,
        label_smoothing=smoothing,
    )
