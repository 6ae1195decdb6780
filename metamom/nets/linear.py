"""`torch.nn.functional.linear` with separate weights for each task, differentiable any number of times.

Legend: T tasks, N points of each, weights ``[out, in]``.

If the tasks have few points, gradients of weights are kept as thin factors (`metamom.nets.low_rank`), and so are the
weights after inner steps. A product with such a weight is one with the weight that all tasks share, and small ones with
the factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.nn import functional as F

from metamom.nets.grouped import Grouped
from metamom.nets.low_rank import LowRank, Term, factors, fits, shared

# Smaller matrices are not worth the Python calls: those of one task, and of all tasks together.
SMALLEST, SMALLEST_OF_ALL = 2**10, 2**18  # entries

_MANY: ContextVar[bool] = ContextVar("many_tasks", default=False)


@contextmanager
def as_of_many_tasks() -> Iterator[None]:
    """Compute a task as if it was one of many."""
    token = _MANY.set(True)
    try:
        yield
    finally:
        _MANY.reset(token)


def are_many() -> bool:
    """Whether the task that is computed counts as one of many."""
    return _MANY.get()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The same as PyTorch's, called inside `torch.func.vmap`; ``None`` where PyTorch's is as fast.

    Args:
        input: ``[..., in]`` of one task.
        weight: ``[out, in]``.
        bias: ``[out]``.
    """
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)) or input.dim() < 2 or weight.dim() != 2:
        return None
    if input.shape[-1] != weight.shape[1]:
        return None  # PyTorch raises its error
    thin = _is_thin(input, weight)
    if not thin and (input.dim() == 2 or input.is_contiguous()):
        return None
    rows = input.flatten(0, -2)  # with more axes, vmap copies the weight for each entry of the first
    out: Tensor
    if thin:
        out = _Product.run(rows, weight, False)
        out = out if bias is None else out + bias
    else:
        out = F.linear(rows, weight, bias)
    return out if input.dim() == 2 else out.reshape(*input.shape[:-1], weight.shape[0])


def bilinear(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same as `torch.nn.functional.bilinear`, which vmap computes task by task: ``a^T W_k b + bias_k``.

    Args:
        a: ``[..., in_a]`` of one task.
        b: ``[..., in_b]``.
        weight: ``[out, in_a, in_b]``.
        bias: ``[out]``.
    """
    out, fan_a, fan_b = weight.shape
    fits_together = a.shape[:-1] == b.shape[:-1] and (a.shape[-1], b.shape[-1]) == (fan_a, fan_b)
    if not fits_together or a.dim() < 2 or a.dtype != b.dtype or a.dtype != weight.dtype:
        return F.bilinear(a, b, weight, bias)  # or PyTorch's error
    rows = a.flatten(0, -2) @ weight.transpose(0, 1).reshape(fan_a, out * fan_b)
    found: Tensor = (rows.view(-1, out, fan_b) @ b.flatten(0, -2).unsqueeze(-1)).squeeze(-1)
    found = found.reshape(*a.shape[:-1], out)
    return found if bias is None else found + bias


def _is_thin(input: Tensor, weight: Tensor) -> bool:
    """Whether the weight is kept as thin factors, or its gradient will be."""
    if not (functorch.is_batchedtensor(weight) and functorch.is_batchedtensor(input)):
        return False
    if input.dtype != weight.dtype or input.dtype not in (torch.float32, torch.float64):
        return False
    matrices, points = functorch.get_unwrapped(weight), functorch.get_unwrapped(input)
    if functorch.maybe_get_bdim(weight) != 0 or functorch.is_functorch_wrapped_tensor(matrices):
        return False
    if functorch.is_functorch_wrapped_tensor(points) or torch.is_autocast_enabled(input.device.type):
        return False
    if torch._C._len_torch_dispatch_stack():  # a graph is being traced
        return False
    if isinstance(matrices, LowRank):
        return matrices.is_thin()
    out, fan_in = weight.shape
    return is_large(matrices) and matrices.requires_grad and fits(input.numel() // max(fan_in, 1), out, fan_in)


def is_large(matrices: Tensor) -> bool:
    """Whether matrices ``[T, out, in]`` are worth the Python calls that parts of them take."""
    return matrices.shape[1:].numel() >= SMALLEST and (are_many() or matrices.numel() >= SMALLEST_OF_ALL)


class OfTasks(Grouped):
    """An operator on ``[T, ...]`` that vmap hands all tasks' arguments as they are."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Put the tasks first."""

        def first(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor) or dim == 0:
                return x
            return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

        out = cls.run(*(first(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        return out, 0 if isinstance(out, Tensor) else (0,) * len(out)


class _Product(OfTasks):
    """``x W^T``, or ``x W`` if ``flipped``: ``[T, N, in]`` and ``[T, out, in]`` to ``[T, N, out]``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, flipped: bool) -> Tensor:
        base, scale, terms = factors(weight)
        total = None
        if base is not None and flipped:
            total = times(x if scale is None else x * scale.mT, base)
        elif base is not None:
            total = times(x, base.mT)
            total = total if scale is None else total.mul_(scale.mT)
        for left, right in terms:
            inner, outer = (left, right) if flipped else (right, left)
            weights = torch.bmm(x, inner.mT)
            total = torch.bmm(weights, outer) if total is None else total.baddbmm_(weights, outer)
        assert total is not None
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, ctx.flipped = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x = _Product.run(c, weight, not ctx.flipped) if ctx.needs_input_grad[0] else None
        pair = (x, c) if ctx.flipped else (c, x)
        return to_x, _Gradient.run(*pair) if ctx.needs_input_grad[1] else None, None


class _Gradient(OfTasks):
    """``left^T right``: ``[T, N, out]`` and ``[T, N, in]`` to ``[T, out, in]``, as factors if these are thin."""

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        if fits(left.shape[1], left.shape[2], right.shape[2]):
            return LowRank(None, (Term(left, right),))
        return torch.bmm(left.mT, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        to_left = _Product.run(right, c, False) if ctx.needs_input_grad[0] else None
        return to_left, _Product.run(left, c, True) if ctx.needs_input_grad[1] else None


def times(x: Tensor, matrices: Tensor) -> Tensor:
    """``[T, N, a]`` times ``[T, a, b]``: one product if all tasks share the matrix."""
    if not shared(matrices):
        return torch.bmm(x, matrices)
    return torch.mm(x.reshape(-1, x.shape[2]), matrices[0]).view(*x.shape[:2], matrices[0].shape[-1])
