"""A loss for other people's training loops: its backward pass gives the meta-gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metamom.bias import BiasOperator
from metamom.common.averaged import note
from metamom.maml.task_weights import Params


def with_gradient(loss: Tensor, gradient: Params, weights: Params, operator: BiasOperator | None) -> Tensor:
    """The value of ``loss``, with a backward pass that gives every weight its gradient, times the cotangent.

    Args:
        loss: a 0-d tensor without a graph.
        gradient: of each weight, of its shape and dtype.
        weights: leaf tensors, some of which may not require gradients.
        operator: what has been done to the gradient.
    """
    given: Tensor = _Given.apply(loss, operator, *gradient.values(), *weights.values())  # type: ignore[no-untyped-call]
    return given


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, operator: BiasOperator | None, *tensors: Tensor) -> Tensor:
        count = len(tensors) // 2
        ctx.save_for_backward(*tensors[:count])
        ctx.operator, ctx.weights = operator, tensors[count:]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, ...] = ctx.saved_tensors
        if ctx.operator is not None and ctx.operator.carries_momentum:
            for weight in ctx.weights:
                note(weight, ctx.operator.spec)
        found = torch._foreach_mul(gradients, cotangent.to(gradients[0].device))
        return None, None, *(None for _ in gradients), *found
