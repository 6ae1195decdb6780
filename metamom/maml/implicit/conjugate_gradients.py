"""Conjugate gradients for several symmetric systems at once, one a task.

Legend: T tasks, d unknowns of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Solved(NamedTuple):
    """Solutions of T systems.

    Attributes:
        x: ``[T, d]``.
        residual: ``|b - A x| / |b|`` of each task, ``[T]``; 0 where b is 0. If all eigenvalues of A are at least 1, the
            error ``|x - A^-1 b|`` is at most this times ``|b|``.
        products: the products with A that a task took, ``[T]``.
        negative: the tasks in which A has a direction of no positive curvature, ``[T]`` booleans.
    """

    x: Tensor
    residual: Tensor
    products: Tensor
    negative: Tensor


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, *, tolerance: float, iterations: int) -> Solved:
    """Solve ``A_t x_t = b_t`` for each task t, with A symmetric and positive definite.

    Tasks stop one by one: at the tolerance, after ``iterations``, or on a direction p with ``p'Ap <= 0``. A task that
    has stopped does not change any more. On such a direction, its x is that of the iterations before, or b if there are
    none.

    Args:
        product: A times each task's vector, ``[T, d] -> [T, d]``.
        b: ``[T, d]``.
        tolerance: on the residual relative to ``|b|``.
        iterations: the most products of a task.

    Example:
        >>> scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> conjugate_gradients(lambda v: scales * v, torch.ones(2, 2), tolerance=1e-6, iterations=9).x
        tensor([[1.0000, 0.5000],
                [0.3333, 0.2500]])

    Reference:
        Hestenes, Stiefel (1952); Nocedal, Wright, "Numerical Optimization" (2006), algorithm 5.2.
    """
    r, p, size, rr = b.clone(), b.clone(), torch.linalg.vector_norm(b, dim=1), _dot(b, b)
    x = torch.where(rr.isfinite().unsqueeze(1), 0, b)  # what is not finite stays so
    products = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    negative = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    for _ in range(iterations):
        active = (rr.sqrt() > tolerance * size) & ~negative
        if not bool(active.any()):
            break
        ap = product(p)
        curvature = _dot(p, ap)
        products += active
        bad = active & (curvature <= 0)
        x = torch.where((bad & (products == 1)).unsqueeze(1), b, x)
        negative |= bad
        active &= ~bad
        alpha = torch.where(active, rr / torch.where(active, curvature, 1), 0)
        x = torch.addcmul(x, alpha.unsqueeze(1), p)
        r = torch.addcmul(r, -alpha.unsqueeze(1), ap)
        now = torch.where(active, _dot(r, r), rr)
        beta = torch.where(active, now / torch.where(active, rr, 1), 0)
        p = torch.where(active.unsqueeze(1), torch.addcmul(r, beta.unsqueeze(1), p), p)
        rr = now
    return Solved(x, rr.sqrt() / torch.where(size > 0, size, 1), products, negative)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(a, b)
    return products
