"""The inner loop: the adapted weights after each step.

Legend: T tasks, J inner steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from metamom.maml.estimators import ESTIMATORS, InnerBatch
from metamom.maml.implicit.proximal_adaptation import proximal_trajectory
from metamom.maml.inner_step import inner_step, straight_through
from metamom.maml.inner_updates import Moments, direction
from metamom.maml.modes import out_of_inference
from metamom.maml.problem import Problem
from metamom.maml.step_gradients import check_constant, check_cut, features_of, step_gradient
from metamom.maml.task_weights import Params, Start
from metamom.nets.low_rank import plain


def trajectory(
    problem: Problem, start: Start, steps: Iterable[InnerBatch], keep_graph: bool, *, thin: bool = False
) -> Iterator[Params]:
    """Yield the adapted parameters after 0, 1, ..., J inner steps, ``[T, *shape]``.

    ``u_0 = w, u_{j+1} = u_j - alpha * grad L_j(u_j)``, or the update of another inner optimizer, with the derivatives
    that the estimator asks for. They are plain tensors, unless they may be thin factors (`metamom.nets.low_rank`).
    """
    if ESTIMATORS[problem.estimator].proximal:
        yield from proximal_trajectory(problem, start, steps, keep_graph)
        return
    steps, own = list(steps), start.own
    features = features_of(problem, steps, keep_graph)
    moments: dict[str, Moments | None] = {}
    yield own
    for number, batch in enumerate(steps):
        with out_of_inference(), torch.enable_grad():
            at = own if keep_graph else {name: w.detach().requires_grad_() for name, w in own.items()}
            grads = step_gradient(problem, start.at(number), at, batch, keep_graph, features)
            check_cut(problem, [name for name, grad in grads.items() if grad is None], *batch.points())
            if keep_graph and ESTIMATORS[problem.estimator].derivatives != "none":
                flat = [name for name, grad in grads.items() if grad is not None and not grad.requires_grad]
                check_constant(problem, flat, batch)
            own = {}
            for name, w in _shortened(problem, at).items():
                grad = grads[name]
                if grad is None:
                    own[name] = w
                    continue
                taken, moments[name] = direction(problem.inner_optimizer, moments.get(name), grad)
                own[name] = inner_step(w, _alpha(problem, name, start, w, number), taken)
        if not thin:
            own = {name: plain(w) for name, w in own.items()}
        if not keep_graph:
            own = {name: w.detach() for name, w in own.items()}
        yield own


def _shortened(problem: Problem, weights: Params) -> Params:
    """The weights that the model has just run with, with the rows that it has shortened in place."""
    found = problem.run.shortened
    return {name: straight_through(found[name], w) if name in found else w for name, w in weights.items()}


def _alpha(problem: Problem, name: str, start: Start, weight: Tensor, step: int) -> float | Tensor:
    return problem.step_sizes.of(name, start.step_sizes, weight.dim(), step)
