"""Rows of matrices of many tasks, multiplied by numbers: weight norm with separate weights for each task.

Legend: T tasks, matrices ``[T, out, in]``, numbers of each row ``[T, out, 1]``.

Weight norm makes a weight ``w = g v / |v|`` of a direction v and a length g for each row. Under `torch.func.vmap`
PyTorch computes it task by task. Here it is one operator for all tasks, and if v is kept as thin factors
(`metamom.nets.low_rank`), so are w and all derivatives: no task gets a matrix of its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from metamom.nets.linear import OfTasks, is_large, times
from metamom.nets.low_rank import LowRank, Term, factors, shared


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor | None:
    """The same as `torch._weight_norm`, called inside `torch.func.vmap`; ``None`` where PyTorch must do it.

    Args:
        v: the weight's direction, of any shape.
        g: its length for each index of the axis ``dim``, of the same number of axes.
        dim: the first or the last axis.
    """
    if not (functorch.is_batchedtensor(v) or functorch.is_batchedtensor(g)) or v.dim() < 2:
        return None
    if dim not in (0, v.dim() - 1) or g.shape != tuple(n if i == dim else 1 for i, n in enumerate(v.shape)):
        return None
    if dim == 0 and v.dim() == 2:  # any view would compute the entries of thin factors
        return _WeightNorm.run(v, g)[0]  # type: ignore[no-any-return]
    rows = v.movedim(dim, 0)
    found: Tensor = _WeightNorm.run(rows.flatten(1), g.reshape(-1, 1))[0]
    return found.view(rows.shape).movedim(0, dim)


@cache
def norms_are_constant() -> bool:
    """Whether this version of PyTorch leaves the derivatives of ``|v|`` out of weight norm's second derivatives.

    It does so in torch 2.13, where `torch.autograd.gradgradcheck` of `torch._weight_norm` fails. Meta-gradients are
    those of a loop with the same PyTorch, so they follow it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        v = torch.tensor([[3.0, 4.0]], requires_grad=True)
        w = torch._weight_norm(v, torch.ones(1, 1), 0)
        (first,) = torch.autograd.grad(w[0, 0], v, create_graph=True)  # 16 / 125 and -12 / 125
        (second,) = torch.autograd.grad(first[0, 0], v)
    return abs(second[0, 0].item() + 3 * 3 * 16 / 5**5) > 1e-3


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """The product of each row of one with the same row of the other, ``[T, out, 1]``."""
    if in_parts(a) or in_parts(b):
        found: Tensor = _Dots.run(a, b)
        return found
    return (a * b).sum(-1, keepdim=True)


def scale_rows(matrices: Tensor, factor: Tensor) -> Tensor:
    """Each row times a number."""
    if in_parts(matrices):
        found: Tensor = _Scaled.run(matrices, factor)
        return found
    return matrices * factor


def in_parts(matrices: Tensor) -> bool:
    """Whether the matrices are thin factors, or one large matrix of all tasks that can be the base of such."""
    if isinstance(matrices, LowRank):
        return matrices.is_thin()
    return is_large(matrices) and shared(matrices) and not torch._C._len_torch_dispatch_stack()


class _Dots(OfTasks):
    """`row_dots` of matrices in parts."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _dots(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        to_a, to_b = ctx.needs_input_grad
        return scale_rows(b, c) if to_a else None, scale_rows(a, c) if to_b else None


class _Scaled(OfTasks):
    """`scale_rows` of matrices in parts."""

    @staticmethod
    def forward(matrices: Tensor, factor: Tensor) -> Tensor:
        return _scaled(matrices, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        matrices, factor = ctx.saved_tensors
        to_matrices, to_factor = ctx.needs_input_grad
        return scale_rows(c, factor) if to_matrices else None, row_dots(c, matrices) if to_factor else None


class _WeightNorm(OfTasks):
    """``(g v / |v|, |v|)``; the norms are for the derivatives of the first alone."""

    @staticmethod
    def forward(v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(v, LowRank):
            norms = _dots(v, v).sqrt_()
            return _scaled(v, g / norms), norms
        if shared(v) and shared(g):
            norms = torch.linalg.vector_norm(v[0], dim=-1, keepdim=True)
            return (v[0] * (g[0] / norms)).expand(v.shape), norms.expand(g.shape)
        norms = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        return (_scaled(v, g / norms) if in_parts(v) else v * (g / norms)), norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, c: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        v, g, norms = ctx.saved_tensors
        if torch.is_grad_enabled() and not norms_are_constant():
            norms = row_dots(v, v).sqrt()
        to_v, to_g = ctx.needs_input_grad
        along = row_dots(c, v) / norms
        if not to_v:
            return None, along if to_g else None
        ratio = g / norms
        turned = scale_rows(c, ratio) - scale_rows(v, ratio * along / norms)
        return turned, along if to_g else None


def _dots(a: Tensor, b: Tensor) -> Tensor:
    base_a, scale_a, of_a = factors(a)
    base_b, scale_b, of_b = factors(b)
    terms_a, terms_b = _joined(of_a), _joined(of_b)
    total = torch.zeros((), dtype=a.dtype, device=a.device)
    if base_a is not None and base_b is not None:
        both = shared(base_a) and shared(base_b)
        product = (base_a[:1] * base_b[:1] if both else base_a * base_b).sum(-1, keepdim=True)
        total = total + _times(_times(product, scale_a), scale_b)
    if a is b:
        if base_a is not None and terms_a is not None:
            total = total + _times(_with_base(base_a, terms_a), scale_a) * 2
    else:
        for base, scale, term in ((base_a, scale_a, terms_b), (base_b, scale_b, terms_a)):
            if base is not None and term is not None:
                total = total + _times(_with_base(base, term), scale)
    if terms_a is not None and terms_b is not None:
        weights = torch.bmm(terms_a.right, terms_b.right.mT)
        total = total + (terms_a.left * torch.bmm(weights, terms_b.left)).sum(1).unsqueeze(-1)
    return total.expand(*a.shape[:-1], 1).contiguous()


def _with_base(base: Tensor, term: Term) -> Tensor:
    """Products of rows of a plain tensor with those of a thin product."""
    return (term.left * times(term.right, base.mT)).sum(1).unsqueeze(-1)


def _scaled(matrices: Tensor, factor: Tensor) -> LowRank:
    base, scale, terms = factors(matrices)
    own = None if base is None else _times(factor, scale)
    return LowRank(base, tuple(Term(left * factor.mT, right) for left, right in terms), own)


def _times(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a * b


def _joined(terms: tuple[Term, ...]) -> Term | None:
    """All products as one."""
    if len(terms) < 2:
        return terms[0] if terms else None
    return Term(torch.cat([t.left for t in terms], 1), torch.cat([t.right for t in terms], 1))
