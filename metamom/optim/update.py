"""The momentum update as a pure function, in place, and for many tensors at once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from metamom.optim.checks import check_beta


def momentum_update(buf: Tensor, grad: Tensor, beta: float) -> Tensor:
    """Update the momentum once: ``v_k = (1 - beta) v_{k-1} + beta g_k``.

    This recurrence is an exponential moving average of gradients. `torch.optim.SGD`'s
    ``v <- mu v + (1 - dampening) g`` is the same with ``mu = dampening = 1 - beta``, except for its first value (see
    `CompositeMomentum`).

    Args:
        buf: ``v_{k-1}``, any shape. Left unchanged.
        grad: ``g_k``, same shape.
        beta: weight of the new gradient, 0 < beta <= 1; 1 discards the past.

    Returns:
        ``v_k``, a new tensor.

    Raises:
        ValueError: if beta is outside (0, 1].

    Example:
        >>> momentum_update(torch.tensor([1.0]), torch.tensor([3.0]), beta=0.5)
        tensor([2.])

    Reference:
        arXiv 2403.00853, the momentum step of the algorithm.
    """
    return momentum_update_(buf.clone(), grad, check_beta(beta))


def momentum_update_(buf: Tensor, grad: Tensor, beta: float) -> Tensor:
    """`momentum_update` in place: ``buf`` becomes ``v_k`` and is returned. Beta is not checked."""
    if beta == 1:  # 0 * v would keep past infinities and NaN
        return buf.copy_(grad)
    return buf.mul_(1 - beta).add_(grad, alpha=beta)


def momentum_updates_(bufs: list[Tensor], grads: list[Tensor], beta: float) -> None:
    """`momentum_update_` of many tensors at once, with the same results."""
    for vs, gs in by_kind(bufs, grads):
        if beta == 1:
            torch._foreach_copy_(vs, gs)
        elif vs[0].is_cpu and vs[0].element_size() == 2:
            # _foreach_mul_ would round 1 - beta to 16 bits: in bfloat16, 0.99 becomes 0.988, a beta of 0.012
            for v, g in zip(vs, gs, strict=True):
                momentum_update_(v, g, beta)
        else:
            torch._foreach_mul_(vs, 1 - beta)
            torch._foreach_add_(vs, gs, alpha=beta)


def move_(params: list[Tensor], bufs: list[Tensor], lr: float, foreach: bool | None) -> None:
    """``w <- w - lr v``."""
    if together(foreach, params):
        for ps, vs in by_kind(params, bufs):
            torch._foreach_add_(ps, vs, alpha=-lr)
    else:
        for p, v in zip(params, bufs, strict=True):
            p.add_(v, alpha=-lr)


def total_norm(bufs: list[Tensor]) -> float:
    """The norm of the whole of v. It is wider than 16 bits, in which squares would overflow or vanish."""
    parts = [torch.linalg.vector_norm(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in bufs]
    return math.hypot(*map(float, parts))


def together(foreach: bool | None, params: list[Tensor]) -> bool:
    """Whether to update all tensors at once. ``None`` means yes if all of them are plain ones."""
    if foreach is None:
        return all(type(p) in (Tensor, torch.nn.Parameter) for p in params)
    return foreach


def by_kind(*lists: list[Tensor]) -> Iterable[tuple[list[Tensor], ...]]:
    """Split the lists into groups of one device and dtype, as torch's multi-tensor functions need them."""
    if len({(x.device, x.dtype) for x in lists[0]}) <= 1:
        return (lists,) if lists[0] else ()
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for row in zip(*lists, strict=True):
        kinds.setdefault((row[0].device, row[0].dtype), []).append(row)
    return [tuple([row[i] for row in rows] for i in range(len(lists))) for rows in kinds.values()]
