"""Hessian-vector products without second derivatives: two-sided differences of gradients.

Legend: T tasks. ``own`` are the parameters to differentiate, ``[T, *shape]``; ``others`` are the remaining ones that
the losses depend on, for each task or for all. Losses are a function ``(own, others) -> [T]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Params = dict[str, Tensor]
Losses = Callable[[Params, Params], Tensor]


def difference(
    losses: Losses, own: Params, others: Params, direction: Params, precision: float
) -> tuple[Params, Params]:
    """Differentiate the gradients of the losses along a direction, task by task.

    ``[grad L(u + d v) - grad L(u - d v)] / (2 d)``, which is ``H v`` in ``own`` and the mixed derivatives times v in
    ``others``. ``d = r/|v|`` with ``r = precision^(1/3) max(1, |u|)``, which balances the truncation error, O(r^2),
    and the rounding error, O(1/r). The result is exact on quadratics up to rounding, and zero where v is zero. A kink
    between the two points, such as a ReLU's, adds its jump over 2 d, which second derivatives do not see.

    Args:
        losses: ``(own, others) -> [T]``; the loss of task t depends on its own parameters alone.
        own: u, ``[T, *shape]``.
        others: ``[T, *shape]`` or ``[*shape]``.
        direction: v, with the names of ``own``.
        precision: the relative rounding error of the losses' gradients, such as ``torch.finfo(dtype).eps``.

    Returns:
        Two dicts: one with the names of ``own``, ``[T, *shape]``; one with the names and shapes of ``others`` (summed
        over the tasks if they share one).

    Example:
        >>> half_square = lambda own, others: 2 * own["u"] ** 2
        >>> along, _ = difference(half_square, {"u": torch.ones(3)}, {}, {"u": torch.tensor([0.0, 1.0, 2.0])}, 1e-7)
        >>> along["u"].round(decimals=2)
        tensor([0., 4., 8.])

    Reference:
        Fallah, Mokhtari, Ozdaglar, "On the convergence theory of gradient-based model-agnostic meta-learning
        algorithms" (2020), HF-MAML; the error is at most ``rho d |v|^2 / 2`` for a rho-Lipschitz Hessian.
    """
    length = _norm(direction)
    radius = precision ** (1 / 3) * _norm(own).clamp(min=1)
    shift = radius / torch.where(length > 0, length, 1)
    total: list[Tensor] = []
    for sign in (1, -1):
        with torch.enable_grad():
            at = {n: (w + _tasks(sign * shift, w) * direction[n]).detach().requires_grad_() for n, w in own.items()}
            rest = {n: w.detach().requires_grad_() for n, w in others.items()}
            # scale before the sum over tasks, which the gradient of shared parameters takes
            scaled = (losses(at, rest) * (sign * length / (2 * radius))).sum()
            grads = torch.autograd.grad(
                scaled, [*at.values(), *rest.values()], allow_unused=True, materialize_grads=True
            )
        total = [a + b for a, b in zip(total, grads, strict=True)] if total else list(grads)
    return dict(zip(own, total[: len(own)], strict=True)), dict(zip(others, total[len(own) :], strict=True))


def gradient_by_differences(gradient: Losses, hessian: Losses, own: Params, others: Params, precision: float) -> Params:
    """The gradient in ``own`` of the losses ``gradient``, differentiated by `difference` of the losses ``hessian``.

    Args:
        gradient: the losses that give the value of the gradient.
        hessian: the losses that give its derivative; must be the same function when called again.
        own: ``[T, *shape]``.
        others: ``[T, *shape]`` or ``[*shape]``.
        precision: as for `difference`.

    Returns:
        ``[T, *shape]`` by the names of ``own``; differentiable once, in ``own`` and ``others``.
    """
    tensors = [*own.values(), *others.values()]
    grads = _ByDifferences.apply(gradient, hessian, tuple(own), tuple(others), precision, *tensors)  # type: ignore[no-untyped-call]
    return dict(zip(own, grads, strict=True))


class _ByDifferences(Function):
    @staticmethod
    def forward(
        ctx: Any,
        gradient: Losses,
        hessian: Losses,
        own: tuple[str, ...],
        others: tuple[str, ...],
        precision: float,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.hessian, ctx.own, ctx.others, ctx.precision = hessian, own, others, precision
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            at = [w.detach().requires_grad_() for w in tensors[: len(own)]]
            rest = [w.detach() for w in tensors[len(own) :]]
            losses = gradient(dict(zip(own, at, strict=True)), dict(zip(others, rest, strict=True)))
            return torch.autograd.grad(losses.sum(), at, allow_unused=True, materialize_grads=True)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.own)
        own = dict(zip(ctx.own, ctx.saved_tensors[:n], strict=True))
        others = dict(zip(ctx.others, ctx.saved_tensors[n:], strict=True))
        direction = dict(zip(ctx.own, cotangents, strict=True))
        along, mixed = difference(ctx.hessian, own, others, direction, ctx.precision)
        return None, None, None, None, None, *along.values(), *mixed.values()


_ESTIMATOR: ContextVar[str] = ContextVar("estimator", default="hessian-free")
_WHY = {
    "hessian-free": "takes differences between two calls of the model",
}


@contextmanager
def drawing_refused() -> Iterator[None]:
    """Explain vmap's refusal to draw random numbers: calls that are compared must use the same function.

    Raises:
        ValueError: in place of that RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if "randomness" not in str(error):
            raise
        name = _ESTIMATOR.get()
        why = _WHY.get(name, "compares many calls of the model to solve its inner problem")
        raise ValueError(
            f"estimator {name!r} {why}, so the model must not draw random numbers, such as dropout masks. Call "
            "model.eval(), or use estimator 'independent'."
        ) from error


@contextmanager
def drawing_refused_for(estimator: str) -> Iterator[None]:
    """Name this estimator in the errors of `drawing_refused`."""
    token = _ESTIMATOR.set(estimator)
    try:
        yield
    finally:
        _ESTIMATOR.reset(token)


def _norm(params: Params) -> Tensor:
    """Each task's norm over all its parameters, ``[T]``."""
    each = [torch.linalg.vector_norm(w.reshape(w.shape[0], -1), dim=1) for w in params.values()]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(each), dim=0)
    return norms


def _tasks(numbers: Tensor, like: Tensor) -> Tensor:
    """Reshape ``[T]`` so that it multiplies ``[T, *shape]``."""
    return numbers.reshape(-1, *[1] * (like.dim() - 1))
