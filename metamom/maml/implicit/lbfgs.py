"""L-BFGS for several minimisations at once, one a task, without a graph.

Legend: T tasks, A of them still active, d variables of each, m pairs of changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

PAIRS = 8
FIRST_STEP = 0.1  # length of the first trial step at most
BACKTRACKS = 30
IDLE = 12  # evaluations without progress of the gradient, once rounding hides differences of values
STAYS = 25, 1e-4  # so many evaluations without it end at a kink, if the value fell by less than this share of its fall
SUFFICIENT = 1e-4  # share of the predicted decrease that a step must reach
FLATTER = 0.9  # slope at the end of a step, relative to that at its start, that shows a decrease of a parabola
RESOLVED = 100  # predicted decreases below so many roundings of the value are not visible in it

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]  # points [A, d] -> values [A], gradients [A, d]
Ending = Literal["tolerance", "rounding", "iterations", "kink"]
ENDINGS: tuple[Ending, ...] = ("tolerance", "rounding", "iterations", "kink")


class Minimum(NamedTuple):
    """Where T minimisations ended.

    Attributes:
        point: ``[T, d]``; NaN for a task with a value that is not finite at the start.
        gradient: its norm there, ``[T]``.
        first: its norm at the start, ``[T]``.
        evaluations: of each task, ``[T]``.
        ending: an index of `ENDINGS` for each task, ``[T]``: the tolerance was reached; rounding allows no further
            progress; the evaluations are used up; or the value stays while the gradient does not vanish, as at a kink.
    """

    point: Tensor
    gradient: Tensor
    first: Tensor
    evaluations: Tensor
    ending: Tensor

    def solved(self) -> Tensor:
        """The tasks that ended at the tolerance, or as close as rounding allows, ``[T]`` booleans."""
        return self.ending <= ENDINGS.index("rounding")


class _Search(NamedTuple):
    """The state of the active tasks. Replaced, not changed, but for the pairs, which are written in place."""

    number: Tensor  # of the task, [A]
    u: Tensor  # [A, d], as all vectors
    value: Tensor  # [A], as all numbers
    g: Tensor
    direction: Tensor
    slope: Tensor
    step: Tensor
    backtracks: Tensor
    best: Tensor  # the point with the smallest gradient
    norm: Tensor  # of its gradient
    idle: Tensor  # evaluations since it fell by a tenth
    before: Tensor  # the value then
    highest: Tensor  # the value at the start
    target: Tensor
    evaluations: Tensor
    s: Tensor  # changes of points, [A, m, d]
    y: Tensor  # and of gradients
    rho: Tensor  # 1/(s y), [A, m]; 0 for no pair
    scale: Tensor  # of the first approximation of the inverse Hessian, [A]
    newest: Tensor  # index of the newest pair, [A]

    def of(self, some: Tensor) -> _Search:
        """The state of some of the tasks."""
        return _Search(*(each[some] for each in self))


def minimise(
    objective_of: Callable[[Tensor | None], Objective],
    start: Tensor,
    *,
    tolerance: float,
    iterations: int,
    eps: float,
    target: Tensor | None = None,
    curvature: float = 0.0,
) -> Minimum:
    """Descend to a local minimum of each task's objective, with steps that never lead up (but for rounding).

    Tasks stop one by one, and once half of them have, the others are computed alone. A step is accepted if its value is
    low enough, or, where rounding hides differences of values, if its slope is, which says the same of a quadratic.

    Args:
        objective_of: makes the objective of the tasks with these numbers ``[A]``, or of all.
        start: ``[T, d]``.
        tolerance: on the norm of the gradient, relative to that at the start.
        iterations: the most evaluations of a task.
        eps: relative rounding of the values.
        target: norms ``[T]`` at which to end instead.
        curvature: a lower bound of that of the objective, as a guess of the first step's length.

    Example:
        >>> def bowls(points):
        ...     return (points**4).sum(1) / 4 + (points**2).sum(1) / 2, points**3 + points
        >>> found = minimise(lambda some: bowls, torch.ones(2, 3), tolerance=1e-5, iterations=50, eps=1e-7)
        >>> bool((found.point.abs() < 1e-4).all()), found.solved()
        (True, tensor([True, True]))

    Reference:
        Nocedal, Wright, "Numerical Optimization" (2006), algorithm 7.4; Hager, Zhang, "A new conjugate gradient method
        with guaranteed descent and an efficient line search" (2005), the approximate Wolfe condition.
    """
    objective = objective_of(None)
    value, g = objective(start)
    norm = torch.linalg.vector_norm(g, dim=1)
    broken = ~(value.isfinite() & norm.isfinite())
    target = tolerance * norm if target is None else target
    found = Minimum(
        start.clone(),
        norm.clone(),
        norm,
        torch.ones_like(norm).long(),
        torch.full_like(norm, ENDINGS.index("iterations")).long(),
    )
    found.ending[norm <= target] = ENDINGS.index("tolerance")
    state = _started(start, value, g, norm, target, curvature)
    state = state.of((~broken & (norm > target)).nonzero().flatten())
    computed = len(start)
    at_once: Tensor | None = None  # the numbers of the tasks that the objective is of
    while len(state.number):
        if 2 * len(state.number) <= computed:
            at_once, computed = state.number, len(state.number)
            objective = objective_of(at_once)
        trial = torch.addcmul(state.u, state.step.unsqueeze(1), state.direction)
        value, g = _evaluated(objective, trial, state.number, at_once, found.point)
        state = _advanced(state, trial, value, g, eps)
        how = _ending(state, iterations, eps)
        done = how >= 0
        if bool(done.any()):
            over, how = state.of(done), how[done]
            settled = (how <= ENDINGS.index("rounding")).unsqueeze(1)
            found.point[over.number] = torch.where(settled, over.best, over.u)
            found.gradient[over.number] = torch.where(settled[:, 0], over.norm, torch.linalg.vector_norm(over.g, dim=1))
            found.evaluations[over.number], found.ending[over.number] = over.evaluations, how
            state = state.of(~done)
    found.point[broken] = torch.nan
    return found


def _ending(state: _Search, iterations: int, eps: float) -> Tensor:
    """The index of how each task has ended, ``[A]``; -1 for one that goes on."""
    length, size = (torch.linalg.vector_norm(x, dim=1) for x in (state.direction, state.u))
    unresolved = (-state.slope <= RESOLVED * eps * state.value.abs()) | (length <= RESOLVED * eps * size)
    stays = state.before - state.value <= STAYS[1] * (state.highest - state.value)
    idle, no_step = state.idle >= IDLE, state.backtracks > BACKTRACKS
    how = torch.full_like(state.number, -1)
    for ending, holds in (
        ("iterations", state.evaluations >= iterations),
        ("kink", ((state.idle >= STAYS[0]) & stays) | no_step),
        ("rounding", (idle | no_step) & unresolved),
        ("tolerance", state.norm <= state.target),
    ):
        how = torch.where(holds, ENDINGS.index(ending), how)
    return how


def _started(u: Tensor, value: Tensor, g: Tensor, norm: Tensor, target: Tensor, curvature: float) -> _Search:
    zeros, (tasks, size) = torch.zeros_like(norm), u.shape
    whole, pairs = zeros.long(), u.new_zeros(tasks, PAIRS, size)
    scale = FIRST_STEP / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    scale = scale.clamp(max=1 / curvature) if curvature > 0 else scale
    return _Search(
        number=torch.arange(tasks, device=u.device),
        u=u,
        value=value,
        g=g,
        direction=-scale.unsqueeze(1) * g,
        slope=-scale * norm**2,
        step=torch.ones_like(norm),
        backtracks=whole,
        best=u,
        norm=norm,
        idle=whole,
        before=value,
        highest=value,
        target=target,
        evaluations=whole + 1,
        s=pairs,
        y=pairs.clone(),
        rho=u.new_zeros(tasks, PAIRS),
        scale=scale,
        newest=whole,
    )


def _evaluated(
    objective: Objective, trial: Tensor, number: Tensor, at_once: Tensor | None, points: Tensor
) -> tuple[Tensor, Tensor]:
    """The objective at the trial points of the active tasks; for tasks that have stopped, it is computed in vain."""
    of = number if at_once is None else torch.searchsorted(at_once, number)
    if len(of) == len(points if at_once is None else at_once):
        return objective(trial)
    every = points.clone() if at_once is None else points[at_once]
    every[of] = trial
    value, g = objective(every)
    return value[of], g[of]


def _advanced(state: _Search, trial: Tensor, value: Tensor, g: Tensor, eps: float) -> _Search:
    """The state after an evaluation at ``trial``: a new direction where the step is accepted, else a shorter step."""
    norm = torch.linalg.vector_norm(g, dim=1)
    finite = value.isfinite() & norm.isfinite()
    predicted = -state.step * state.slope
    slope = _dot(g, state.direction)
    enough = value <= state.value - SUFFICIENT * predicted
    hidden = predicted <= RESOLVED * eps * torch.maximum(state.value.abs(), value.abs())
    level = value <= state.value + RESOLVED * eps * state.value.abs()
    taken = finite & (enough | (hidden & level & (slope <= -FLATTER * state.slope)))
    better = finite & (norm < state.norm)
    rows = taken.nonzero().flatten()
    _remember(state, rows, trial, g, eps)
    column = taken.unsqueeze(1)
    u, value_now, g_now = (
        torch.where(column, trial, state.u),
        torch.where(taken, value, state.value),
        torch.where(column, g, state.g),
    )
    direction, new_slope = state.direction, state.slope
    if len(rows):
        one = state if len(rows) == len(column) else state.of(rows)
        along = -_times_inverse_hessian(g[rows], one.s, one.y, one.rho, one.scale, one.newest)
        down = _dot(along, g[rows])
        steepest = -one.scale.unsqueeze(1) * g[rows]
        along = torch.where((down < 0).unsqueeze(1), along, steepest)
        direction = direction.index_copy(0, rows, along)
        new_slope = new_slope.index_copy(0, rows, _dot(along, g[rows]))
    rise = value - state.value - state.step * state.slope  # of a parabola through both values and the slope
    shorter = (-state.slope * state.step / (2 * rise)).nan_to_num(0.1).clamp(0.1, 0.5)
    shorter = torch.where(hidden, 0.5, torch.where(finite, shorter, 0.1))
    progress = finite & (norm < 0.9 * state.norm)
    return state._replace(
        u=u,
        value=value_now,
        g=g_now,
        direction=direction,
        slope=new_slope,
        step=torch.where(taken, 1, state.step * shorter),
        backtracks=torch.where(taken, 0, state.backtracks + 1),
        best=torch.where(better.unsqueeze(1), trial, state.best),
        norm=torch.where(better, norm, state.norm),
        idle=torch.where(progress, 0, state.idle + 1),
        before=torch.where(progress, value_now, state.before),
        evaluations=state.evaluations + 1,
    )


def _remember(state: _Search, rows: Tensor, trial: Tensor, g: Tensor, eps: float) -> None:
    """Write the accepted tasks' changes over their oldest pairs, where the curvature along them is positive."""
    s, y = trial[rows] - state.u[rows], g[rows] - state.g[rows]
    sy, yy = _dot(s, y), _dot(y, y)
    curved = sy > eps * torch.linalg.vector_norm(s, dim=1) * yy.sqrt()
    rows, s, y, sy, yy = rows[curved], s[curved], y[curved], sy[curved], yy[curved]
    place = (state.newest[rows] + 1) % PAIRS
    state.s[rows, place], state.y[rows, place], state.rho[rows, place] = s, y, 1 / sy
    state.scale[rows], state.newest[rows] = sy / yy, place


def _times_inverse_hessian(g: Tensor, s: Tensor, y: Tensor, rho: Tensor, scale: Tensor, newest: Tensor) -> Tensor:
    """The approximation of ``H^-1 g`` that the pairs give: the two-loop recursion."""
    rows, q, shares = torch.arange(len(g), device=g.device), g, []
    places = [(newest - back) % PAIRS for back in range(PAIRS)]
    for place in places:
        share = rho[rows, place] * _dot(s[rows, place], q)
        q = torch.addcmul(q, -share.unsqueeze(1), y[rows, place])
        shares.append(share)
    q = scale.unsqueeze(1) * q
    for place, share in zip(reversed(places), reversed(shares), strict=True):
        back = rho[rows, place] * _dot(y[rows, place], q)
        q = torch.addcmul(q, (share - back).unsqueeze(1), s[rows, place])
    return q


def _dot(a: Tensor, b: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(a, b)
    return products
