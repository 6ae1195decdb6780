"""What a parameter group brings to a step: its parameters with a gradient, checked, and its options as values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamom.common.sharded import placed_as
from metamom.optim.checks import check_beta, check_gradients, check_not_averaged
from metamom.optim.fused import check_fused
from metamom.optim.groups import take_scheduled_momentum
from metamom.optim.sharded import check_norm_is_known


class Pending(NamedTuple):
    """A group's parameters that have a gradient, and these gradients."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]


def pending_of(group: dict[str, Any]) -> Pending:
    """The group's parameters that have a gradient, checked."""
    take_scheduled_momentum(group)
    check_beta(group["beta"])  # it may have been scheduled or changed by hand
    params: list[Tensor] = []
    grads: list[Tensor] = []
    for p in group["params"]:
        if (g := p.grad) is not None:
            params.append(p)
            grads.append(g if type(g) is Tensor else placed_as(g, p))
    check_gradients(params, grads)
    if group["fused"]:
        check_fused(params)
    if group["normalize"] and not torch.compiler.is_compiling():
        check_norm_is_known(params)  # a loaded state may have set this
    if isinstance(group["beta"], Tensor) or group["beta"] != 1:
        check_not_averaged(params, group["beta"])
    return Pending(group, params, grads)


def value_of(group: dict[str, Any], name: str) -> float | Tensor:
    """An option as a number, or as a tensor if it is one that autograd or torch.compile must see."""
    value = group[name]
    if isinstance(value, Tensor) and not (group["differentiable"] or torch.compiler.is_compiling()):
        return float(value.detach())
    return value  # type: ignore[no-any-return]


def decays(group: dict[str, Any], *, decoupled: bool) -> bool:
    """Whether the group has weight decay of this kind. One in a tensor counts as some: its value is not asked for."""
    decay = group["weight_decay"]
    return group["decoupled_weight_decay"] is decoupled and (isinstance(decay, Tensor) or decay != 0)


def descent_gradient(p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
    """The gradient to average, with sign and weight decay applied. ``p.grad`` itself does not change."""
    if group["maximize"]:
        grad = -grad
    if decays(group, decoupled=False):
        decay = value_of(group, "weight_decay")
        if isinstance(decay, Tensor):
            return grad + p.clone() * decay.to(p.dtype)  # autograd needs p as it was before the step
        grad = grad.add(p, alpha=decay)
    return grad
