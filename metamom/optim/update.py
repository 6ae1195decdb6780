"""The momentum update as a pure function, in place, and for many tensors at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from metamom.common.sharded import is_sharded
from metamom.optim.checks import check_beta

Number = float | Tensor
PLAIN = (Tensor, torch.nn.Parameter)


def momentum_update(buf: Tensor, grad: Tensor, beta: Number) -> Tensor:
    """Update the momentum once: ``v_k = (1 - beta) v_{k-1} + beta g_k``.

    This recurrence is an exponential moving average of gradients. `torch.optim.SGD`'s
    ``v <- mu v + (1 - dampening) g`` is the same with ``mu = dampening = 1 - beta``, except for its first value (see
    `CompositeMomentum`).

    Args:
        buf: ``v_{k-1}``, any shape. Left unchanged.
        grad: ``g_k``, same shape.
        beta: weight of the new gradient, 0 < beta <= 1; 1 discards the past. As a 0-d tensor, it can be differentiated.

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
    check_beta(beta)
    return momentum_update_(buf.clone(), grad, beta)


def momentum_update_(buf: Tensor, grad: Tensor, beta: Number) -> Tensor:
    """`momentum_update` in place: ``buf`` becomes ``v_k`` and is returned. Beta is not checked."""
    if isinstance(beta, Tensor):
        return buf.mul_(1 - beta).add_(grad * beta)
    if beta == 1:  # 0 * v would keep past infinities and NaN
        return buf.copy_(grad)
    return buf.mul_(1 - beta).add_(grad, alpha=beta)


def momentum_updates_(bufs: list[Tensor], grads: list[Tensor], beta: Number) -> None:
    """`momentum_update_` of many tensors at once, with the same results. A tensor beta is for torch.compile."""
    for vs, gs in by_kind(bufs, grads):
        if isinstance(beta, Tensor):
            torch._foreach_mul_(vs, 1 - beta)
            torch._foreach_add_(vs, torch._foreach_mul(gs, beta))
        elif beta == 1 and not is_sharded(vs[0]):
            torch._foreach_copy_(vs, gs)
        elif beta == 1 or _rounds_factors(vs[0]):  # _foreach_copy_ knows no DTensors
            for v, g in zip(vs, gs, strict=True):
                momentum_update_(v, g, beta)
        else:
            torch._foreach_mul_(vs, 1 - beta)
            torch._foreach_add_(vs, gs, alpha=beta)


def look_ahead(bufs: list[Tensor], grads: list[Tensor], beta: Number, foreach: bool | None) -> list[Tensor]:
    """Nesterov's direction: one more update with the same gradient, ``(1 - beta) v_k + beta g_k``."""
    ahead = [v.clone() for v in bufs]
    if together(foreach, bufs):
        momentum_updates_(ahead, grads, beta)
        return ahead
    return [momentum_update_(v, g, beta) for v, g in zip(ahead, grads, strict=True)]


def move_(params: list[Tensor], directions: list[Tensor], lr: Number, foreach: bool | None) -> None:
    """``w <- w - lr v``."""
    if isinstance(lr, Tensor):  # to be differentiated, or while torch.compile traces
        for p, v in zip(params, directions, strict=True):
            p.addcmul_(v, lr.to(v.dtype), value=-1)
    elif together(foreach, params):
        for ps, vs in by_kind(params, directions):
            torch._foreach_add_(ps, vs, alpha=-lr)
    else:
        for p, v in zip(params, directions, strict=True):
            p.add_(v, alpha=-lr)


def shrink_(params: list[Tensor], factor: Number, foreach: bool | None, *, unless: Tensor | None = None) -> None:
    """``w <- factor w``: weight decay that does not pass through the average. A non-zero ``unless`` prevents it."""
    if unless is not None:
        for p in params:
            p.copy_(torch.where(unless.to(p.device).reshape(()) == 0, p * factor, p))
    elif together(foreach, params) and not isinstance(factor, Tensor):
        for (ps,) in by_kind(params):
            if _rounds_factors(ps[0]):
                for p in ps:
                    p.mul_(factor)
            else:
                torch._foreach_mul_(ps, factor)
    else:
        for p in params:
            p.mul_(factor)


def of_unit_length(bufs: list[Tensor], norm: Tensor) -> list[Tensor]:
    """``v / norm``, and v itself if it is zero. A NaN reaches the weights, where it shows."""
    norm = torch.where(norm == 0, 1.0, norm)
    # divided in 32 bits or more: the norm of 16-bit numbers need not be one
    return [(v.to(torch.promote_types(v.dtype, torch.float32)) / norm).to(v.dtype) for v in bufs]


def together(foreach: bool | None, params: list[Tensor]) -> bool:
    """Whether to update all tensors at once. ``None`` means yes if all of them are plain ones."""
    if foreach is None:
        return all(type(p) in PLAIN for p in params)
    return foreach


def by_kind(*lists: list[Tensor]) -> Iterable[tuple[list[Tensor], ...]]:
    """Split the lists into groups of one device, dtype and mesh, as torch's multi-tensor functions need them."""
    first = lists[0]
    if not first:
        return ()
    device, dtype = first[0].device, first[0].dtype
    if all(type(x) in PLAIN and x.dtype is dtype and x.device == device for x in first):  # the usual case
        return (lists,)
    kinds: dict[object, list[tuple[Tensor, ...]]] = {}
    for row in zip(*lists, strict=True):
        kinds.setdefault(_kind(row[0]), []).append(row)
    return [tuple([row[i] for row in rows] for i in range(len(lists))) for rows in kinds.values()]


def _rounds_factors(x: Tensor) -> bool:
    """Whether ``_foreach_mul_`` would round a factor to 16 bits: in bfloat16, 0.99 becomes 0.988, a beta of 0.012."""
    return x.is_cpu and x.element_size() == 2


def _kind(x: Tensor) -> tuple[object, ...]:
    mesh = cast(object, x.device_mesh) if is_sharded(x) else None  # type: ignore[attr-defined]
    return x.device, x.dtype, mesh
