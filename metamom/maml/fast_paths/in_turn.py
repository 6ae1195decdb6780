"""The meta-gradient of a chunk of tasks by a plain loop: each task is adapted, judged and differentiated in turn.

`metamom.maml.running.run_by_task` calls a model for task after task too, for all that is computed from predictions. It
hands over the tasks' weights as one tensor, and looks at each call for what tasks might pass on to each other. Here
each task has tensors of its own, of which only the gradient outlives the task, once the model and the loss are known;
see `metamom.maml.fast_paths.settled`.

Legend: T tasks, n workers with T/n tasks each, J inner steps, N points of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from metamom.common.modules import named_buffers_of
from metamom.common.trees import count
from metamom.maml.estimators import ESTIMATORS, Adaptations, InnerBatch
from metamom.maml.fast_paths.settled import (
    Computed,
    Draws,
    FastPath,
    Unconnected,
    UnsuitableError,
    after_step,
    as_settled,
    is_settled,
    labels,
    sets_of,
)
from metamom.maml.inner_step import gradients
from metamom.maml.inner_updates import Moments
from metamom.maml.problem import Problem, names_in_loss
from metamom.maml.running.plain_autograd import differentiable_twice, warm_starts
from metamom.maml.running.swapping import Slots, in_mode, locked, slots, swapped
from metamom.maml.task_weights import Params

Forward = Callable[[Params, Tensor], Tensor]


def runs_in_turn(problem: Problem, term: Adaptations) -> bool:
    """Whether the model runs in a loop, and has done so before."""
    run, model, vectorization = problem.run, problem.model, problem.vectorization
    if not is_settled(run, model, problem.norm, count(term.query_x), loop=True):
        return False
    if not vectorization.loops(problem.parts()[0]):
        first_order, adapted = ESTIMATORS[problem.estimator].derivatives == "none", dict.fromkeys(problem.adapted)
        if vectorization.vectorize != "auto" or not all(
            run.prefers_a_loop(model, adapted, x, first_order=first_order) for x, _ in sets_of(term)
        ):
            return False
    loss = problem.loss_fn
    if isinstance(loss, nn.Module) and (named_buffers_of(loss) or names_in_loss(model, loss)):
        return False
    return not (named_buffers_of(model) and warm_starts(model))


def in_turn(problem: Problem, weights: Params, term: Adaptations, workers: int, scale: float) -> Computed:
    """Query losses, predictions, and each worker's gradient of ``scale`` times the sum of losses.

    Args:
        problem: the model and loss, for which `runs_in_turn` holds.
        weights: the meta-parameters by name, which are the model's.
        term: T adaptations.
        workers: n.
        scale: a number.

    Raises:
        UnsuitableError: for a model or a loss that needs more care than this loop takes.
        ValueError: as `metamom.MAML.meta_gradient`.
    """
    model, loss, steps = problem.model, problem.loss_fn, len(term.steps)
    tasks = count(term.query_x)
    keep_graph = ESTIMATORS[problem.estimator].derivatives != "none"
    moved = _step if keep_graph else _step_to_leaf
    at = {name: w.detach().requires_grad_() for name, w in weights.items()}
    sets = sets_of(term)
    rows = [list(zip(x.unbind(), _labels(y, tasks), strict=True)) for x, y in sets]
    inner = [Unconnected(problem, problem.adapted, derivable=keep_graph) for _ in range(steps)]
    outer = Unconnected(problem, [*at], derivable=False)
    judged: list[tuple[Tensor, Tensor]] = []
    totals: list[dict[str, Tensor | None]] = []
    with (
        locked(model),
        in_mode(model),
        differentiable_twice(model),
        differentiable_twice(loss) if isinstance(loss, nn.Module) else nullcontext(),
    ):
        draws = Draws(problem, tasks, len(sets), term.query_x.device, loop=True)
        forwards = _forwards(problem, at, draws, tasks)
        losses = [problem.readings.watched(loss, once=True) for _ in sets]

        def lossed(number: int, task: int, own: Params) -> tuple[Tensor, Tensor]:
            x, y = rows[number][task]
            predicted = forwards[number](own, x)
            value = losses[number](predicted, *y)
            if not isinstance(predicted, Tensor) or not isinstance(value, Tensor) or value.dim() != 0:
                raise UnsuitableError("a model and a loss must return one tensor here, and the loss a number")
            return value, predicted

        for task in range(tasks):
            own, moments = at, dict[str, Moments | None]()
            for number in range(steps):
                value, _ = lossed(number, task, own)
                adapting = [own[name] for name in problem.adapted]
                grads = dict(zip(problem.adapted, gradients(value, adapting, create_graph=keep_graph), strict=True))
                inner[number].see(grads)
                own = after_step(problem, own, grads, moments, moved)
            value, predicted = lossed(steps, task, own)
            ends = at if keep_graph else own
            new = gradients(value * scale, [*ends.values(), *weights.values()])
            if any(grad is not None for grad in new[len(ends) :]):
                raise UnsuitableError("the loss depends on the original parameters")
            found = dict(zip(ends, new, strict=False))
            outer.see(found)
            judged.append((value.detach(), predicted.detach()))
            fresh = task % (tasks // workers) == 0
            totals = [*totals, found] if fresh else [*totals[:-1], _added(totals[-1], found)]
        draws.check()
    for step, seen in zip(term.steps, inner, strict=True):
        seen.check(problem.adapted, step)
    outer.check([*at], InnerBatch(term.query_x, term.query_y))
    return Computed(
        torch.stack([value for value, _ in judged]),
        torch.stack([predicted for _, predicted in judged]),
        {name: _stacked([total[name] for total in totals], w) for name, w in at.items()},
    )


def _labels(y: Tensor | None, tasks: int) -> Sequence[tuple[Tensor, ...]]:
    """The targets of each task as arguments of the loss."""
    return [(each,) for each in labels(y)[0].unbind()] if y is not None else [()] * tasks


def _forwards(problem: Problem, at: Params, draws: Draws, tasks: int) -> list[Forward]:
    """For each call of a task, a function of the task's weights and inputs; they are called for task after task."""
    model = problem.model
    found = slots(model)
    if not found.places.keys() >= at.keys():
        raise UnsuitableError("a parameter is not registered under its name")
    buffers = {name: b.clone() for name, b in named_buffers_of(model).items() if name in found.places}
    run = as_settled(problem.run, model, problem.norm, tasks, loop=True)
    forward = partial(_forward, run, found, buffers)
    if not draws.of_call:
        return [forward] * draws.calls
    return [each.each(forward, draws.functions(number)) for number, each in enumerate(draws.of_call)]


def _forward(run: Callable[[Tensor], Tensor], found: Slots, buffers: Params, own: Params, x: Tensor) -> Tensor:
    """The predictions ``[N, ...]`` of one task with its weights, on its own copy of the inputs."""
    places = {**buffers, **own} if buffers else own
    versions = [w._version for w in places.values()]
    with swapped(found, places):
        out = run(x.clone())
    if versions != [w._version for w in places.values()]:
        raise UnsuitableError("the model changes parameters or buffers in place")
    return out


def _step(w: Tensor, step_size: float, taken: Tensor) -> Tensor:
    """One task's weight after an inner step, ``w - step_size * taken``."""
    return torch.add(w, taken, alpha=-step_size)


def _step_to_leaf(w: Tensor, step_size: float, taken: Tensor) -> Tensor:
    """The same as a new leaf, for first order: the query loss is then differentiated in the adapted weights."""
    return _step(w.detach(), step_size, taken).requires_grad_()


def _added(total: dict[str, Tensor | None], new: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The sum of two gradients by name, of which any may be absent."""
    pairs = [(name, a, b) for name, b in new.items() if b is not None and (a := total[name]) is not None]
    names = [name for name, _, _ in pairs]
    sums = torch._foreach_add([a for _, a, _ in pairs], [b for _, _, b in pairs]) if pairs else []
    both: dict[str, Tensor | None] = dict(zip(names, sums, strict=True))
    return {name: both.get(name, grad if grad is not None else total[name]) for name, grad in new.items()}


def _stacked(grads: list[Tensor | None], like: Tensor) -> Tensor:
    """The gradients of all workers ``[n, *shape]``, zero where there is none."""
    if len(grads) == 1 and grads[0] is not None:
        return grads[0].unsqueeze(0)
    return torch.stack([torch.zeros_like(like, requires_grad=False) if grad is None else grad for grad in grads])


IN_TURN = FastPath(runs_in_turn, in_turn)
