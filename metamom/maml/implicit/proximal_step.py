"""One proximal step, ``u = argmin_v L_s(v) + lambda/2 |v - w|^2`` for each task, and its derivatives.

Legend: T tasks, A of them, d adapted entries, ``own`` the adapted parameters ``[T, *shape]``, ``others`` the remaining
parameters that the losses depend on, for each task or for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from metamom.maml.finite_differences import Losses, Params
from metamom.maml.implicit.conjugate_gradients import conjugate_gradients
from metamom.maml.implicit.lbfgs import Objective, minimise
from metamom.maml.implicit.proximal import Proximal
from metamom.maml.implicit.solves import Solves
from metamom.maml.inner_step import gradients


class InnerProblem(NamedTuple):
    """The support losses of T tasks, and how to solve the proximal problem with them.

    Attributes:
        losses: makes the losses of the tasks with some numbers ``[A]``, or of all; ``own`` are those of these tasks,
            and ``others`` those of all. If they are constant (the second argument), what depends on them alone is
            computed once.
        attempt: runs a computation on all tasks at once, or again in a loop over them.
        check_cut: refuses adapted parameters, by name, that have no gradient although the loss depends on them.
        check_constant: refuses those with gradients that have no derivative although they depend on the weights.
        settings: of the solver.
        tolerance: of the solver.
        solves: where it notes how it went.
        eps: relative rounding of the losses.
    """

    losses: Callable[[Tensor | None, bool], Losses]
    attempt: Callable[[Callable[[], Any]], Any]
    check_cut: Callable[[Sequence[str]], None]
    check_constant: Callable[[Sequence[str]], None]
    settings: Proximal
    tolerance: float
    solves: Solves
    eps: float


def proximal_step(inner: InnerProblem, own: Params, others: Params, keep_graph: bool) -> Params:
    """The solution, ``[T, *shape]`` by name: differentiable once in ``own`` and ``others`` if ``keep_graph``.

    Its derivatives are those of the exact solution: ``du/dw = (I + H/lambda)^-1``, with H the Hessian of the support
    loss at u. So they cost the same, and keep the same, however many evaluations the solve takes.

    Reference:
        Rajeswaran, Finn, Kakade, Levine, "Meta-learning with implicit gradients" (2019), lemma 1.
    """
    if not keep_graph:
        return {n: w.detach() for n, w in solution(inner, own, others).items()}
    found = _Implicit.apply(inner, tuple(own), tuple(others), *own.values(), *others.values())  # type: ignore[no-untyped-call]
    return dict(zip(own, found, strict=True))


def solution(inner: InnerProblem, own: Params, others: Params) -> Params:
    """The solution without a graph, ``[T, *shape]`` by name."""
    own, others = ({name: w.detach() for name, w in each.items()} for each in (own, others))
    start = flat(own.values())
    checked: list[Sequence[str]] = []

    def objective_of(some: Tensor | None) -> Objective:
        losses = inner.losses(some, True)

        def objective(points: Tensor) -> tuple[Tensor, Tensor]:
            at = unflattened(points, own)
            values, grads = values_and_gradients(inner, losses, at, others)
            if not checked:
                checked.append([name for name, g in grads.items() if g is None])
                inner.check_cut(checked[0])
            return with_proximal_term(values, filled(grads, at), points, start, some, inner.settings.strength)

        return objective

    found = minimise(
        objective_of,
        start,
        tolerance=inner.tolerance,
        iterations=inner.solves.most(inner.settings.iterations),
        eps=inner.eps,
        curvature=inner.settings.strength,
    )
    inner.solves.note(found, torch.linalg.vector_norm(found.point - start, dim=1), inner.settings)
    return unflattened(found.point, own)


def with_proximal_term(
    values: Tensor, grads: Tensor, points: Tensor, start: Tensor, some: Tensor | None, strength: float
) -> tuple[Tensor, Tensor]:
    """Add ``lambda/2 |u - w|^2`` to values ``[A]`` and gradients ``[A, d]`` at ``points``; ``start`` is w of all."""
    away = points - (start if some is None else start[some])
    return values + strength / 2 * torch.linalg.vecdot(away, away), torch.add(grads, away, alpha=strength)


def values_and_gradients(
    inner: InnerProblem, losses: Losses, own: Params, others: Params
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The losses ``[A]`` and their gradients in ``own``, without a graph."""

    def compute() -> tuple[Tensor, dict[str, Tensor | None]]:
        with torch.enable_grad():
            at = {name: w.detach().requires_grad_() for name, w in own.items()}
            values = losses(at, others)
            found = gradients(values.sum(), list(at.values()))
        return values.detach(), dict(zip(at, found, strict=True))

    result: tuple[Tensor, dict[str, Tensor | None]] = inner.attempt(compute)
    return result


def implicit_gradients(
    inner: InnerProblem, own: Params, others: Params, cotangents: Params
) -> tuple[Params, list[Tensor | None]]:
    """The derivatives of the solution ``own`` along ``cotangents``: in w by name, and in each of ``others``.

    With ``z = (I + H/lambda)^-1 g``, they are z and ``-1/lambda d<grad L_s(u), z>/d others``.
    """
    strength = inner.settings.strength
    tolerance = inner.settings.cg_tolerance_of(inner.eps)

    def compute() -> tuple[Params, list[Tensor | None]]:
        with torch.enable_grad():
            at = {name: w.detach().requires_grad_() for name, w in own.items()}
            rest = [w.detach().requires_grad_() for w in others.values()]
            losses = inner.losses(None, False)(at, dict(zip(others, rest, strict=True)))
            grads = dict(zip(at, gradients(losses.sum(), list(at.values()), create_graph=True), strict=True))
        present = {name: g for name, g in grads.items() if g is not None}
        inner.check_constant([name for name, g in present.items() if not g.requires_grad])
        curved = {name: g for name, g in present.items() if g.requires_grad}

        def derivatives(v: Params, of: list[Tensor]) -> list[Tensor | None]:
            """Of ``<grad L_s, v>``."""
            if not curved or not of:
                return [None] * len(of)
            along = [v[name] for name in curved]
            return list(torch.autograd.grad([*curved.values()], of, along, retain_graph=True, allow_unused=True))

        def product(v: Tensor) -> Tensor:
            found = dict(zip(at, derivatives(unflattened(v, own), list(at.values())), strict=True))
            return torch.add(v, filled(found, own), alpha=1 / strength)

        b = flat(cotangents.values())
        iterations = inner.solves.most(inner.settings.cg_iterations)
        solved = conjugate_gradients(product, b, tolerance=tolerance, iterations=iterations)
        inner.solves.note_implicit(solved, tolerance, inner.settings)
        z = unflattened(solved.x, own)
        mixed = derivatives({name: v / -strength for name, v in z.items()}, rest)
        return z, mixed

    result: tuple[Params, list[Tensor | None]] = inner.attempt(compute)
    return result


class _Implicit(Function):
    @staticmethod
    def forward(ctx: Any, inner: InnerProblem, own: tuple[str, ...], others: tuple[str, ...], *tensors: Tensor) -> Any:
        at, rest = (
            dict(zip(names, part, strict=True))
            for names, part in ((own, tensors[: len(own)]), (others, tensors[len(own) :]))
        )
        found = solution(inner, at, rest)
        ctx.inner, ctx.own, ctx.others = inner, own, others
        ctx.save_for_backward(*found.values(), *rest.values())
        return tuple(found.values())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        own = dict(zip(ctx.own, saved[: len(ctx.own)], strict=True))
        others = dict(zip(ctx.others, saved[len(ctx.own) :], strict=True))
        along = dict(zip(ctx.own, cotangents, strict=True))
        in_start, in_others = implicit_gradients(ctx.inner, own, others, along)
        return None, None, None, *in_start.values(), *in_others


def flat(params: Iterable[Tensor]) -> Tensor:
    """Tensors ``[T, *shape]`` as ``[T, d]``."""
    return torch.cat([w.flatten(1) if w.dim() > 1 else w.unsqueeze(1) for w in params], 1)


def unflattened(points: Tensor, like: Params) -> Params:
    """The parts ``[A, *shape]`` of ``[A, d]`` by name."""
    sizes = [w[0].numel() for w in like.values()]
    parts = torch.split(points, sizes, 1)
    return {n: part.reshape(len(points), *w.shape[1:]) for (n, w), part in zip(like.items(), parts, strict=True)}


def filled(grads: dict[str, Tensor | None], like: Params) -> Tensor:
    """Gradients as ``[A, d]``, with zeros for those that are ``None``."""
    return flat([torch.zeros_like(like[name]) if g is None else g for name, g in grads.items()])
