"""The meta-gradient of a chunk of tasks by a plain loop: each task is adapted, judged and differentiated in turn.

`metamom.maml.run_by_task` calls a model for task after task too, for all that is computed from predictions. It hands
over the tasks' weights as one tensor, and looks at each call for what tasks might pass on to each other. Here each task
has tensors of its own, of which only the gradient outlives the task. That takes what a loop in a script takes, once the
other loop has seen the model and the loss and has found no more to look after than draws of the functions that draw,
functions to replace, and tensors left in attributes. What fails here is computed, or explained, by the other loop.

Legend: T tasks, n workers with T/n tasks each, J inner steps, N points of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from metamom.common.modules import named_buffers_of
from metamom.common.trees import count
from metamom.compile.tracing import is_tracing
from metamom.maml.drawing_functions import DrawingFunctions
from metamom.maml.draws import DrawsByTask, generator_states, rewinder
from metamom.maml.estimators import ESTIMATORS, Adaptations, InnerBatch
from metamom.maml.inner_step import gradients
from metamom.maml.inner_updates import Moments, direction
from metamom.maml.plain_autograd import differentiable_twice, warm_starts
from metamom.maml.problem import Problem, names_in_loss
from metamom.maml.rules import PLAIN
from metamom.maml.step_gradients import check_constant, check_cut
from metamom.maml.swapping import Slots, alone, in_mode, is_training, slots, swapped
from metamom.maml.task_weights import Params

Result = TypeVar("Result")
Forward = Callable[[Params, Tensor], Tensor]

# What the other loop explains, or computes in spite of.
ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)


class UnsuitableError(RuntimeError):
    """Something that the other loop must compute, or refuse."""


class Unconnected(NamedTuple):
    """The parameters that a gradient has not reached in any task so far.

    Attributes:
        missing: those without a gradient.
        constant: those with one that cannot be differentiated, although it should be.
    """

    missing: set[str]
    constant: set[str]

    def see(self, found: dict[str, Tensor | None], *, keep_graph: bool = False) -> None:
        """Leave out the parameters with a gradient in one more task."""
        self.missing.difference_update(name for name, grad in found.items() if grad is not None)
        if keep_graph:
            self.constant.difference_update(
                name for name, grad in found.items() if grad is not None and grad.requires_grad
            )


class InTurn(NamedTuple):
    """The results of a chunk of tasks.

    Attributes:
        losses: query losses ``[T]``.
        predictions: on the query sets, ``[T, Q, ...]``.
        gradients: each worker's, ``[n, *shape]``, by parameter.
    """

    losses: Tensor
    predictions: Tensor
    gradients: Params


def runs_in_turn(problem: Problem, term: Adaptations) -> bool:
    """Whether these adaptations can be computed by `in_turn`, and the model runs in a loop anyway."""
    record, sets = ESTIMATORS[problem.estimator], [*term.steps, InnerBatch(term.query_x, term.query_y, None)]
    plain = (
        problem.rule is PLAIN
        and problem.objective is None
        and problem.step_norms is None
        and problem.autocast is None
        and problem.norm != "support"
        and record.derivatives != "differences"
        and record.averages is None
        and not record.proximal
        and term.copies == 1
        and term.query_mask is None
        and all(step.hessian is None and step.mask is None for step in term.steps)
        and all(isinstance(each.x, Tensor) and (each.y is None or isinstance(each.y, Tensor)) for each in sets)
        and all(isinstance(problem.step_sizes.fixed.get(name), float) for name in problem.adapted)
    )
    if not plain or is_tracing():
        return False
    tasks, vectorization = count(term.query_x), problem.vectorization
    if not problem.run.is_settled(problem.model, problem.norm, tasks):
        return False
    if not vectorization.loops(problem.parts()[0]):
        first_order, adapted = record.derivatives == "none", dict.fromkeys(problem.adapted)
        if vectorization.vectorize != "auto" or not all(
            problem.run.prefers_a_loop(problem.model, adapted, each.x, first_order=first_order) for each in sets
        ):
            return False
    loss = problem.loss_fn
    if isinstance(loss, nn.Module) and (named_buffers_of(loss) or names_in_loss(problem.model, loss)):
        return False
    return not (named_buffers_of(problem.model) and warm_starts(problem.model))


def in_turn_or(
    problem: Problem,
    term: Adaptations,
    compute: Callable[[], InTurn],
    otherwise: Callable[[], Result],
    finish: Callable[[InTurn], Result],
) -> Result:
    """What ``compute`` finds, handed to ``finish``; if it fails, what ``otherwise`` finds or raises.

    Once that has found something, such tasks are not computed in turn again.
    """
    kind = is_training(problem.model), problem.norm, count(term.query_x), problem.estimator
    if kind in problem.run.unsuitable or not runs_in_turn(problem, term):
        return otherwise()
    rewind = rewinder()
    try:
        found = compute()
    except ERRORS:
        rewind()
        other = otherwise()
        problem.run.unsuitable.add(kind)
        return other
    return finish(found)


def in_turn(problem: Problem, weights: Params, term: Adaptations, workers: int, scale: float) -> InTurn:
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
    tasks, device = count(term.query_x), term.query_x.device
    keep_graph = ESTIMATORS[problem.estimator].derivatives != "none"
    at = {name: w.detach().requires_grad_() for name, w in weights.items()}
    sets = [*((step.x, step.y) for step in term.steps), (term.query_x, term.query_y)]
    rows = [list(zip(x.unbind(), _labels(y, tasks), strict=True)) for x, y in sets]
    inner = [Unconnected(set(problem.adapted), set(problem.adapted) if keep_graph else set()) for _ in range(steps)]
    outer = Unconnected(set(at), set())
    judged: list[tuple[Tensor, Tensor]] = []
    totals: list[dict[str, Tensor | None]] = []
    with (
        alone(model),
        in_mode(model),
        differentiable_twice(model),
        differentiable_twice(loss) if isinstance(loss, nn.Module) else nullcontext(),
    ):
        forwards = _forwards(problem, at, steps + 1, tasks)
        losses = [problem.readings.watched(loss, once=True) for _ in sets]
        before = generator_states(device)

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
                moved = [own[name] for name in problem.adapted]
                grads = dict(zip(problem.adapted, gradients(value, moved, create_graph=keep_graph), strict=True))
                inner[number].see(grads, keep_graph=keep_graph)
                own = _moved(problem, own, grads, moments, keep_graph)
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
        if not all(torch.equal(a, b) for a, b in zip(before, generator_states(device), strict=True)):
            raise UnsuitableError("something draws at random outside of the functions that draw")
    for step, seen in zip(term.steps, inner, strict=True):
        check_cut(problem, [name for name in problem.adapted if name in seen.missing], *step.points())
        constant = seen.constant - seen.missing
        check_constant(problem, [name for name in problem.adapted if name in constant], step)
    check_cut(problem, [name for name in at if name in outer.missing], *term.query())
    return InTurn(
        torch.stack([value for value, _ in judged]),
        torch.stack([predicted for _, predicted in judged]),
        {name: _stacked([total[name] for total in totals], w) for name, w in at.items()},
    )


def _labels(y: Tensor | None, tasks: int) -> Sequence[tuple[Tensor, ...]]:
    """The targets of each task as arguments of the loss. Bytes are labels, as elsewhere."""
    if y is None:
        return [()] * tasks
    return [(each,) for each in (y.long() if y.dtype == torch.uint8 else y).unbind()]


def _forwards(problem: Problem, at: Params, calls: int, tasks: int) -> list[Forward]:
    """For each call of a task, a function of the task's weights and inputs; they are called for task after task.

    Draws depend on the task's number and on that of the call, as in `metamom.maml.run_by_task`.
    """
    model = problem.model
    found = slots(model)
    if not found.places.keys() >= at.keys():
        raise UnsuitableError("a parameter is not registered under its name")
    buffers = {name: b.clone() for name, b in named_buffers_of(model).items() if name in found.places}
    run = partial(problem.run.of_one, model, problem.norm, tasks)
    forward = partial(_forward, run, found, buffers)
    if is_training(model) not in problem.run.draws:
        return [forward] * calls
    draws = [DrawsByTask(tasks) for _ in range(calls)]
    return [each.each(forward, partial(DrawingFunctions, each, everywhere=False)) for each in draws]


def _forward(run: Callable[[Tensor], Tensor], found: Slots, buffers: Params, own: Params, x: Tensor) -> Tensor:
    """The predictions ``[N, ...]`` of one task with its weights, on its own copy of the inputs."""
    places = {**buffers, **own} if buffers else own
    versions = [w._version for w in places.values()]
    with swapped(found, places):
        out = run(x.clone())
    if versions != [w._version for w in places.values()]:
        raise UnsuitableError("the model changes parameters or buffers in place")
    return out


def _moved(
    problem: Problem,
    own: Params,
    grads: dict[str, Tensor | None],
    moments: dict[str, Moments | None],
    keep_graph: bool,
) -> Params:
    """The weights of a task after one more inner step; without a graph, new leaves for those that are moved."""
    moved = dict(own)
    for name, grad in grads.items():
        if grad is None:
            continue
        taken, moments[name] = direction(problem.inner_optimizer, moments.get(name), grad)
        w = own[name] if keep_graph else own[name].detach()
        moved[name] = torch.add(w, taken, alpha=-problem.step_sizes.fixed[name])
        if not keep_graph:
            moved[name].requires_grad_()
    return moved


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
