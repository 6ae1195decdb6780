"""One inner step: the update rule, and its gradient with the derivatives that an estimator asks for.

Legend: T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from metamom.maml.finite_differences import Losses, Params, gradient_by_differences

Derivatives = Literal["none", "exact", "differences"]


def inner_gradient(
    along: Losses, hessian: Losses | None, own: Params, others: Params, derivatives: Derivatives, precision: float
) -> dict[str, Tensor | None]:
    """Compute the gradient of each task's loss in its own parameters, for one inner step.

    Its value comes from one batch (A) and its derivatives from the batch that gives the Hessian (B). Differentiating
    through J steps gives ``prod_j (I - alpha H_B(u_j)) grad L(u_J)`` at the points u_j that batch A leads to.

    Args:
        along: ``(own, others) -> [T]``, the losses that give the gradient's value.
        hessian: the losses that give the Hessian; ``None`` to use ``along``.
        own: the adapted parameters, ``[T, *shape]``, which require gradients.
        others: the other parameters, ``[T, *shape]`` or ``[*shape]``.
        derivatives: ``"none"``, ``"exact"``, or ``"differences"`` of the Hessian batch's gradients.
        precision: for differences, see `metamom.maml.finite_differences.difference`.

    Returns:
        ``[T, *shape]`` with the names of ``own``; ``None`` for parameters that the losses do not depend on.

    Reference:
        Fallah, Mokhtari, Ozdaglar (2020), where the Hessian has a separate batch.
    """
    if derivatives == "differences":
        return {**gradient_by_differences(along, hessian or along, own, others, precision)}
    coupled = derivatives == "exact" and hessian is None
    value = _gradient(along, own, others, create_graph=coupled)
    if derivatives == "none" or hessian is None:
        return value
    derivative = _gradient(hessian, own, others, create_graph=True)
    return {
        name: g if g is None or (d := derivative[name]) is None else straight_through(g, d) for name, g in value.items()
    }


def gradients(output: Tensor, inputs: Sequence[Tensor], create_graph: bool = False) -> list[Tensor | None]:
    """The gradient of a scalar in each input; ``None`` if the graph does not connect them."""
    if not output.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(output, list(inputs), create_graph=create_graph, allow_unused=True))


def inner_step(w: Tensor, alpha: float | Tensor, grad: Tensor) -> Tensor:
    """``u_{j+1} = u_j - alpha grad L(u_j)`` for one parameter, computed in its memory order.

    Compilers lay out an elementwise result in index order. Permuting the operands to their memory order first avoids a
    copy.

    Args:
        w: u_j, ``[T, *shape]``.
        alpha: a number, or a tensor that broadcasts with ``grad``.
        grad: ``[T, *shape]``.

    Returns:
        ``[T, *shape]``.
    """
    order = _memory_order(w)
    if not isinstance(alpha, Tensor) and order is None:  # one pass over the weights, and one in each derivative
        return torch.add(w, grad, alpha=-alpha)
    if order is None:
        return w - alpha * grad
    if isinstance(alpha, Tensor):
        alpha = alpha.expand_as(w).permute(order)
    back = sorted(range(w.dim()), key=order.__getitem__)
    return (w.permute(order) - alpha * grad.permute(order)).permute(back)


def straight_through(value: Tensor, derivative: Tensor) -> Tensor:
    """The value of one tensor with the derivatives of another: ``value.detach() + (derivative - derivative.detach())``.

    Unlike that sum, it does not round and does not turn infinities into NaN, and a compiler can see that the value of
    ``derivative`` is not needed.

    Args:
        value: any shape.
        derivative: of the same shape.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> y = straight_through(x + 100, x**2)
        >>> y.backward()
        >>> y.item(), x.grad.item()
        (103.0, 6.0)
    """
    result: Tensor = _StraightThrough.apply(value.detach(), derivative)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, derivative: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, Tensor]:
        return None, cotangents[0]


def _gradient(losses: Losses, own: Params, others: Params, create_graph: bool) -> dict[str, Tensor | None]:
    found = gradients(losses(own, others).sum(), list(own.values()), create_graph)
    return dict(zip(own, found, strict=True))


def _memory_order(w: Tensor) -> list[int] | None:
    """The axes of ``[T, *shape]`` from longest to shortest stride; ``None`` if they already have this order."""
    strides = w.stride()
    order = [0, *sorted(range(1, w.dim()), key=lambda axis: -strides[axis])]
    return None if order == list(range(w.dim())) else order
