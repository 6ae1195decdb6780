"""Momenta that follow the weights: the rules as pure functions, and what they need from a closure.

All are ``v <- (1 - beta)(v + c) + beta g``. They differ in the change c that is added to the past, and in where g is
taken. Let w be the weights, ``w_prev`` those of the last step, and xi the data of this one:

| variant | c | g |
|---|---|---|
| ``"heavy-ball"`` | 0 | ``grad(w; xi)`` |
| ``"igt"`` | 0 | ``grad(w + (1 - beta)/beta (w - w_prev); xi)`` |
| ``"storm"`` | ``grad(w; xi) - grad(w_prev; xi)`` | ``grad(w; xi)`` |
| ``"hessian"`` | ``hessian(w; xi) (w - w_prev)`` | ``grad(w; xi)`` |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from metamom.common.choices import Variant
from metamom.common.sharded import placed_as
from metamom.optim.update import by_kind, momentum_update, together

Changes = dict[Tensor, Tensor]  # c of each parameter; what is missing is zero
R = TypeVar("R")


def extrapolated(w: Tensor, previous: Tensor, beta: float | Tensor) -> Tensor:
    """The point at which implicit gradient transport takes its gradient: ``w + (1 - beta)/beta (w - w_prev)``.

    For a quadratic, the average of such gradients is the average of the same gradients at w: its lag vanishes.

    Args:
        w: the weights, any shape. Left unchanged.
        previous: the weights of the last step, same shape.
        beta: weight of the new gradient, 0 < beta <= 1; 1 gives w itself.

    Returns:
        A new tensor.

    Example:
        >>> extrapolated(torch.tensor([1.0]), torch.tensor([2.0]), beta=0.25)
        tensor([-2.])

    Reference:
        Arnold, Manzagol, Babanezhad, Mitliagkas, Le Roux (2019); Cutkosky, Mehta (2020).
    """
    return w + (w - previous) * ((1 - beta) / beta)


def transported_update(buf: Tensor, grad: Tensor, beta: float | Tensor, change: Tensor) -> Tensor:
    """Update a momentum that follows the weights: ``v_k = (1 - beta)(v_{k-1} + c) + beta g_k``.

    With ``c = grad(w; xi) - grad(w_prev; xi)`` it is STORM, ``g + (1 - beta)(v - grad(w_prev; xi))``; with
    ``c = hessian(w; xi)(w - w_prev)`` the Hessian-corrected momentum. With c = 0 it is `momentum_update`.

    Args:
        buf: ``v_{k-1}``, any shape. Left unchanged.
        grad: ``g_k``, same shape.
        beta: weight of the new gradient, 0 < beta <= 1; 1 discards the past, and so the change.
        change: c, same shape.

    Returns:
        ``v_k``, a new tensor.

    Raises:
        ValueError: if beta is outside (0, 1].

    Example:
        >>> transported_update(torch.tensor([1.0]), torch.tensor([3.0]), beta=0.5, change=torch.tensor([2.0]))
        tensor([3.])

    Reference:
        Cutkosky, Orabona (2019), STORM; Tran, Cutkosky (2022), the Hessian-corrected momentum; both with EF21 and
        normalised steps: Sadiev et al., arXiv 2511.14501.
    """
    return momentum_update(buf + change, grad, beta)


def transport_(bufs: list[Tensor], changes: list[Tensor], foreach: bool | None) -> None:
    """``v <- v + c``."""
    if together(foreach, bufs):
        for vs, cs in by_kind(bufs, changes):
            torch._foreach_add_(vs, cs)
    else:
        for v, c in zip(bufs, changes, strict=True):
            v.add_(c)


def variant_of(groups: Iterable[Mapping[str, Any]]) -> Variant | None:
    """The variant of all parameter groups.

    Raises:
        ValueError: if they differ: the gradient is taken at one point for all parameters.
    """
    found = [group["variant"] for group in groups]
    if len(found) > 1 and len({*found}) > 1:
        raise ValueError(f"all parameter groups take their gradient at one point, so variant is one; got {set(found)}.")
    variant: Variant | None = found[0]
    return variant


def keep_previous(state: MutableMapping[Tensor, Any], params: Iterable[Tensor]) -> None:
    """Keep the weights of this step, before they move, as ``"previous"``."""
    for p in params:
        mine = state[p]
        if "previous" in mine:
            mine["previous"].copy_(p)
        else:
            mine["previous"] = p.detach().clone()


@contextmanager
def at(points: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Set parameters to other values, and back to the same bits at the end."""
    with torch.no_grad():
        own = {p: p.detach().clone() for p in points}
        try:
            for p, point in points.items():
                p.copy_(point)
            with torch.enable_grad():
                yield
        finally:
            for p, value in own.items():
                p.copy_(value)


def gradient_change(
    params: Iterable[Tensor], previous: Mapping[Tensor, Tensor], closure: Callable[[], R]
) -> tuple[R, Changes]:
    """STORM's change: the gradients that a closure computes at w, less those at ``w_prev``.

    ``.grad`` is cleared before each call, and then has the gradients at w.

    Args:
        params: all parameters.
        previous: ``w_prev`` of those that have moved. Without any, the closure is only called at w.
        closure: computes the gradients, of the same data in both calls.

    Returns:
        What the closure returned at w, and the change.
    """
    params = list(params)
    before: dict[Tensor, Tensor | None] = {}
    if previous:
        _clear(params)
        devices = sorted({p.device.index or 0 for p in params if p.is_cuda})
        with at(previous), torch.random.fork_rng(devices):  # the same draws (dropout) at both points
            closure()
        before = {p: p.grad for p in params}
        _clear(params)
    found = closure()
    changes: Changes = {}
    for p, old in before.items():
        if p.grad is not None and p in previous:
            new = _placed(p.grad, p)
            changes[p] = new.detach().clone() if old is None else (new - _placed(old, p)).detach()
    return found, changes


def hessian_change(params: Iterable[Tensor], previous: Mapping[Tensor, Tensor]) -> Changes:
    """The Hessian times ``w - w_prev``, from gradients that have kept their graph. ``.grad`` loses its graph.

    Args:
        params: all parameters.
        previous: ``w_prev`` of those that have moved.

    Raises:
        ValueError: if no gradient has a graph.
    """
    given = [p for p in params if p.grad is not None]
    graphs = [p for p in given if p.grad is not None and p.grad.requires_grad]
    if given and not graphs:
        raise ValueError(
            'variant="hessian" differentiates the gradient once more, and no parameter\'s .grad has a graph: call '
            "loss.backward(create_graph=True), or learner.backward(batch, momentum=optimizer)."
        )
    changes: Changes = {}
    if graphs and previous:
        moved = [p for p in graphs if p in previous]
        along = {p: (p - previous[p]).detach() for p in given if p in previous}
        # H is symmetric: the derivative of g . d in w, with g of all that d moves
        grads = [p.grad for p in moved if p.grad is not None]
        inputs = [p for p in given if p in previous]
        if grads:
            found = torch.autograd.grad(grads, inputs, [along[p] for p in moved], allow_unused=True)
            changes = {p: _placed(h, p).detach() for p, h in zip(inputs, found, strict=True) if h is not None}
    for p in given:
        p.grad = None if p.grad is None else p.grad.detach()
    return changes


def with_decay(changes: Changes, previous: Mapping[Tensor, Tensor], groups: Iterable[Mapping[str, Any]]) -> Changes:
    """The changes of what is averaged: of ``-grad`` if maximised, and of ``grad + weight_decay w`` with weight decay.

    IGT's weight decay at the extrapolated point is, in the average, the same change.
    """
    found: Changes = {}
    for group in groups:
        decay = 0.0 if group["decoupled_weight_decay"] else float(group["weight_decay"])
        for p in group["params"]:
            if p in changes:
                found[p] = -changes[p] if group["maximize"] else changes[p]
            if decay and p in previous:
                found[p] = found.get(p, 0) + (p.detach() - previous[p]) * decay
    return found


def not_evaluated(variant: Variant) -> ValueError:
    """The error for gradients that come from nowhere the optimizer knows."""
    where = "an extrapolated point" if variant == "igt" else "two points"
    return ValueError(
        f"variant={variant!r} takes gradients of the same data at {where}, so it has to call what computes them: use "
        "optimizer.step(closure), or learner.backward(batch, momentum=optimizer) and then optimizer.step()."
    )


def _clear(params: Iterable[Tensor]) -> None:
    for p in params:
        p.grad = None


def _placed(grad: Tensor, p: Tensor) -> Tensor:
    return grad if type(grad) is Tensor else placed_as(grad, p)
