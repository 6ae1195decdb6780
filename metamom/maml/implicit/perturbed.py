"""The meta-gradient of a proximal problem from gradients alone: perturb it by the query loss, and solve it again.

With ``u_nu = argmin_v L_s(v) + nu L_q(v) + lambda/2 |v - w|^2`` and ``V(nu)`` the minimum, ``dV/dnu = L_q(u_nu)``.
So the meta-gradient, of ``L_q(u_0)`` in w, is the derivative of ``dV/dw = lambda (w - u_nu)`` at nu = 0, and in any
other parameter that of the direct dependence of ``L_s + nu L_q`` at u_nu. Differences in nu take the place of
derivatives.

Legend: T tasks, d adapted entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metamom.maml.finite_differences import Losses, Params
from metamom.maml.implicit.lbfgs import Objective, minimise
from metamom.maml.implicit.proximal_step import (
    InnerProblem,
    filled,
    flat,
    unflattened,
    values_and_gradients,
    with_proximal_term,
)


def perturbed_losses(
    inner: InnerProblem,
    query: Callable[[Tensor | None, bool], Losses],
    own: Params,
    others: Params,
    solved: Params,
) -> Tensor:
    """Tensors ``[T]`` with the derivatives ``lambda (u_-nu - u_nu) / (2 nu)`` in ``own``, and their like in ``others``.

    With forward differences, ``lambda (u_0 - u_nu) / nu``. Their values mean nothing. On a quadratic support and query
    loss, the error is ``O(nu^2)`` and ``O(nu)``.

    Args:
        inner: the support losses and the settings.
        query: makes the query losses, as ``inner.losses`` does.
        own: w, ``[T, *shape]``.
        others: the other parameters of the losses.
        solved: u_0, ``[T, *shape]``, without a graph.

    Reference:
        El Mahdi Chayti, Jaggi, "A new first-order meta-learning algorithm with convergence guarantees" (2024), arXiv
        2409.03682.
    """
    settings, nu = inner.settings, inner.settings.perturbation(inner.eps)
    ends = (nu, -nu) if settings.differences == "symmetric" else (nu, 0.0)
    span = ends[0] - ends[1]
    found = [_solved_at(inner, query, own, others, solved, end) for end in ends]
    points = [point for point, _ in found]
    difference = (flat(points[1].values()) - flat(points[0].values())) * (settings.strength / span)
    error = torch.stack([left for _, left in found]).sum(0) / span
    inner.solves.note_perturbed(error, torch.linalg.vector_norm(difference, dim=1), settings)
    total: Tensor = torch.linalg.vecdot(flat(own.values()), difference)
    if any(w.requires_grad for w in others.values()):

        def direct() -> Tensor:
            """The dependence of ``L_s + nu L_q`` on the other parameters, as a difference between the ends."""
            support, asked = inner.losses(None, False), query(None, False)
            parts = [(support(u, others) + end * asked(u, others)) / span for u, end in zip(points, ends, strict=True)]
            return parts[0] - parts[1]

        total = total + inner.attempt(direct)
    return total


def _solved_at(
    inner: InnerProblem,
    query: Callable[[Tensor | None, bool], Losses],
    own: Params,
    others: Params,
    solved: Params,
    nu: float,
) -> tuple[Params, Tensor]:
    """u_nu, ``[T, *shape]`` by name, found from u_0, and the norm ``[T]`` of its objective's gradient there.

    That norm over lambda bounds the distance to the exact solution, if the losses are convex there. It is solved to
    ``tolerance |grad L_q(u_0)|``, which leaves an error of about ``tolerance |grad L_q(u_0)| / nu`` in the
    meta-gradient.
    """
    settings = inner.settings
    others = {name: w.detach() for name, w in others.items()}
    start, first = flat(w.detach() for w in own.values()), flat(solved.values())
    _, asked = values_and_gradients(inner, query(None, True), solved, others)

    def objective_of(some: Tensor | None) -> Objective:
        support, judged = inner.losses(some, True), query(some, True)

        def both(at: Params, rest: Params) -> Tensor:
            return support(at, rest) + nu * judged(at, rest)

        def objective(points: Tensor) -> tuple[Tensor, Tensor]:
            at = unflattened(points, own)
            values, grads = values_and_gradients(inner, both, at, others)
            return with_proximal_term(values, filled(grads, at), points, start, some, settings.strength)

        return objective

    if nu == 0:
        _, left = objective_of(None)(first)
        return solved, torch.linalg.vector_norm(left, dim=1)
    found = minimise(
        objective_of,
        first,
        tolerance=inner.tolerance,
        iterations=inner.solves.most(settings.iterations),
        eps=inner.eps,
        target=inner.tolerance * torch.linalg.vector_norm(filled(asked, solved), dim=1),
        curvature=settings.strength,
    )
    solved_all = found.solved() | ~found.first.isfinite()
    inner.solves.check(solved_all, found.gradient / found.first.where(found.first > 0, 1), settings)
    return unflattened(found.point, own), found.gradient
