"""Matrices of many tasks, kept as a plain tensor plus products of thin factors: gradients of linear layers.

Legend: T tasks, matrices ``[out, in]``, thin factors of N rows.

The gradient of a weight is ``left^T right`` of N points, so a weight after a few inner steps is the shared weight plus
a few such products. As long as N is small, the factors take less memory and time than the T matrices. Weight norm
multiplies each row by a number of the task (`metamom.nets.rows`), so the shared weight may have a factor for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

aten = torch.ops.aten

# Factors may take up this share of the matrix. Beyond, plain matrices are as fast.
SHARE = 0.5


class Term(NamedTuple):
    """A product ``left^T right`` for each task.

    Attributes:
        left: ``[*tasks, N, out]``.
        right: ``[*tasks, N, in]``.
    """

    left: Tensor
    right: Tensor


class LowRank(Tensor):
    """A tensor ``[*tasks, out, in]`` equal to ``scale * base + sum of terms``; see `low_rank`.

    For autograd and for callers it is a tensor like any other. Sums, multiples and sums over tasks stay in this form.
    Any other operation computes the entries, and from then on they are kept instead of the terms.

    Attributes:
        base: ``[*tasks, out, in]``, or ``None`` for zero.
        terms: the products.
        scale: a factor for each row of the base, ``[*tasks, out, 1]``; ``None`` for 1.
    """

    base: Tensor | None
    terms: tuple[Term, ...]
    scale: Tensor | None
    _versions: list[int]

    @staticmethod
    def __new__(cls, base: Tensor | None, terms: tuple[Term, ...], scale: Tensor | None = None) -> LowRank:
        """Wrap these parts, whose own graphs play no role."""
        like = terms[0].left if base is None else base
        shape = base.shape if base is not None else (*like.shape[:-2], like.shape[-1], terms[0].right.shape[-1])
        made: LowRank = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.base = base  # the same tensor, which counts its changes in place
        made.terms = tuple(Term(*map(_without_graph, term)) for term in terms)
        made.scale = None if scale is None else _without_graph(scale)
        made._versions = made._written()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as PyTorch wants it
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply a rule of this form if there is one; else compute the entries."""
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None:
            for each in args[:2]:
                if isinstance(each, LowRank):
                    each.check()
            found = rule(*args, **kwargs)
            if found is not None:
                return found
        plain_args, plain_kwargs = pytree.tree_map_only(LowRank, LowRank.entries, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        # an operation in place has changed the entries, and returns its own argument
        return args[0] if isinstance(args[0], LowRank) and out is plain_args[0] else out

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        """The parts; entries are not computed."""
        base = self.base is not None if self.scale is None else "scaled"
        return f"LowRank(shape={list(self.shape)}, base={base}, terms={len(self.terms)})"

    def is_thin(self) -> bool:
        """Whether it has parts, or only entries."""
        return bool(self.terms) or self.scale is not None

    def check(self) -> None:
        """Refuse to use factors that were changed in place since.

        Raises:
            RuntimeError: as autograd does for a tensor that it has saved.
        """
        if self.is_thin() and self._written() != self._versions:
            raise RuntimeError(
                "a tensor that a gradient was computed from has been modified by an inplace operation, and is still "
                "needed. Change a copy of it instead: tensor.clone()."
            )

    def _written(self) -> list[int]:
        """How often each part has been written to."""
        return [0 if part.is_inference() else part._version for part in parts(self)]

    def entries(self) -> Tensor:
        """The plain tensor, which is kept instead of the terms."""
        if self.is_thin():
            self.check()
            total = self.base
            if total is not None and self.scale is not None:
                total = total * self.scale
            for left, right in self.terms:
                a, b = left.flatten(0, -3).mT, right.flatten(0, -3)
                if total is None:
                    total = torch.bmm(a, b).view(self.shape)
                else:
                    total = torch.baddbmm(total.reshape(-1, *self.shape[-2:]), a, b).view(self.shape)
            self.base, self.terms, self.scale = total, (), None
        assert self.base is not None
        return self.base


def fits(rank: int, out: int, fan_in: int) -> bool:
    """Whether factors of this many rows are much smaller than the matrix."""
    return rank * (out + fan_in) <= SHARE * out * fan_in


def _without_graph(part: Tensor) -> Tensor:
    return part.detach() if part.requires_grad else part


def parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold its values."""
    if not isinstance(tensor, LowRank):
        return [tensor]
    whole = [x for x in (tensor.base, tensor.scale) if x is not None]
    return [*whole, *(x for term in tensor.terms for x in term)]


def factors(matrices: Tensor) -> tuple[Tensor | None, Tensor | None, tuple[Term, ...]]:
    """Base, its scale and terms; a plain tensor is its own base."""
    if not isinstance(matrices, LowRank):
        return matrices, None, ()
    matrices.check()
    return matrices.base, matrices.scale, matrices.terms


def plain(tensor: Tensor) -> Tensor:
    """The same tensor, with its graph, as a plain one."""
    return _Plain.apply(tensor) if isinstance(tensor, LowRank) else tensor  # type: ignore[no-untyped-call]


def shared(matrices: Tensor) -> bool:
    """Whether all tasks' matrices ``[T, out, in]`` are one in memory."""
    return matrices.shape[0] == 1 or matrices.stride(0) == 0


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two plain tensors are the same entries in memory."""
    return a is b or (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: LowRank) -> Tensor:
        entries = tensor.entries()
        return entries.view_as(entries)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0]


def _add(a: Any, b: Any, alpha: float = 1) -> LowRank | Tensor | None:
    """``a + alpha b``."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or a.dtype != b.dtype:
        return None
    first, second = (x if isinstance(x, LowRank) else LowRank(x, ()) for x in (a, b))
    terms = _merged(first.terms, _scaled_terms(second.terms, alpha))
    scaled = first.scale is not None or second.scale is not None
    if not (terms or scaled) or not fits(sum(term.left.shape[-2] for term in terms), *a.shape[-2:]):
        return None
    if second.base is None:
        return LowRank(first.base, terms, first.scale)
    if first.base is None:
        if second.scale is not None:
            return LowRank(second.base, terms, second.scale * alpha)
        return LowRank(second.base, terms) if alpha == 1 else None
    if not scaled or not same(first.base, second.base):
        return None
    return LowRank(first.base, terms, _sum_of_scales(first.scale, second.scale, alpha))


def _merged(first: tuple[Term, ...], second: tuple[Term, ...]) -> tuple[Term, ...]:
    """The products of both; those with a factor in common (a layer's inputs, in every step) become one."""
    terms = list(first)
    for left, right in second:
        for i, term in enumerate(first):
            if same(term.right, right):
                terms[i] = Term(terms[i].left + left, right)
                break
        else:
            terms.append(Term(left, right))
    return tuple(terms)


def _sum_of_scales(a: Tensor | None, b: Tensor | None, alpha: float) -> Tensor:
    """``a + alpha b`` where ``None`` is 1, and one of them is not."""
    if a is None:
        assert b is not None
        return b * alpha + 1
    return a + alpha if b is None else torch.add(a, b, alpha=alpha)


def _sub(a: Any, b: Any, alpha: float = 1) -> LowRank | Tensor | None:
    return _add(a, b, -alpha)


def _mul(a: Any, b: Any) -> LowRank | None:
    matrices, factor = (a, b) if isinstance(a, LowRank) else (b, a)
    if isinstance(factor, (LowRank, complex)) or (matrices.base is not None and matrices.scale is None):
        return None
    if isinstance(factor, Tensor):
        one_each = factor.dim() == 0 or (factor.dim() == matrices.dim() and factor.shape[-2:] == (1, 1))
        if not one_each or factor.dtype != matrices.dtype:
            return None
    return _scaled(matrices, factor)


def _scaled(matrices: LowRank, factor: float | Tensor) -> LowRank:
    """The parts, times a number, or one for each task."""
    scale = None if matrices.scale is None else matrices.scale * factor
    return LowRank(matrices.base, _scaled_terms(matrices.terms, factor), scale)


def _scaled_terms(terms: tuple[Term, ...], factor: float | Tensor) -> tuple[Term, ...]:
    if isinstance(factor, (int, float)) and factor == 1:
        return terms
    return tuple(Term(left * factor, right) for left, right in terms)


def _neg(a: LowRank) -> LowRank | None:
    return _mul(a, -1)


def _same(a: LowRank) -> LowRank:
    return LowRank(a.base, a.terms, a.scale)


def _clone(a: LowRank, memory_format: Any = None) -> LowRank | None:
    return _same(a) if a.is_thin() else None


def _view(a: LowRank, size: Sequence[int]) -> LowRank | None:
    """Other axes of tasks."""
    if tuple(size[-2:]) != a.shape[-2:] or len(size) < 3 or not _sums_of_tasks(a):
        return None
    tasks = size[:-2]
    base = None if a.base is None else _lone(a.base).expand(*tasks, *a.shape[-2:])
    scale = None if a.scale is None else a.scale.reshape(*tasks, *a.scale.shape[-2:])
    return LowRank(base, tuple(Term(*(x.reshape(*tasks, *x.shape[-2:]) for x in term)) for term in a.terms), scale)


def _sum(a: LowRank, dim: Sequence[int] | None, keepdim: bool = False, dtype: Any = None) -> Tensor | None:
    """The sum over the last axes of tasks: one product for each term."""
    if not dim or not _sums_of_tasks(a) or dtype not in (None, a.dtype):
        return None
    dims = sorted(d % a.dim() for d in dim)
    if dims != list(range(a.dim() - 2 - len(dims), a.dim() - 2)):
        return None
    kept = a.shape[: dims[0]]
    total = None
    if a.base is not None and a.scale is not None:
        scale = a.scale.expand(*a.shape[:-1], 1)
        total = (scale.sum(dims) * _lone(a.base)).reshape(kept.numel(), *a.shape[-2:])
    for left, right in a.terms:
        rows = [x.reshape(kept.numel(), -1, x.shape[-1]) for x in (left, right)]
        if total is None:
            total = torch.bmm(rows[0].mT, rows[1])
        else:
            total.baddbmm_(rows[0].mT, rows[1])
    assert total is not None
    return total.view(*kept, *([1] * len(dims) if keepdim else []), *a.shape[-2:])


def _sums_of_tasks(a: LowRank) -> bool:
    """Whether the tasks' axes can be merged or summed: a base must be one matrix for all, with factors for each."""
    if a.base is None:
        return True
    tasks = zip(a.base.shape[:-2], a.base.stride()[:-2], strict=True)
    return a.scale is not None and all(size == 1 or stride == 0 for size, stride in tasks)


def _lone(base: Tensor) -> Tensor:
    """The matrix ``[out, in]`` of a base that all tasks share."""
    return base[(0,) * (base.dim() - 2)]


_RULES: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.neg.default: _neg,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.sum.dim_IntList: _sum,
}
