"""The fast path of a meta-gradient, once a model and a loss are known.

The first meta-gradients look at every call of the model and the loss (`metamom.maml.episodes`): for draws, functions to
replace, tensors left in attributes, writes in place. For a small network that takes as long as the network.
Once nothing more is to be found, two fast paths skip that and compute the same: `metamom.maml.fast_paths.at_once` on
all tasks by vmap, and `metamom.maml.fast_paths.in_turn` on one task after the other. The general path computes, or
explains, what fails there.

Legend: T tasks, n workers with T/n tasks each, J inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from metamom.common.trees import count
from metamom.compile.tracing import is_tracing
from metamom.maml.checks.hooks import is_of_pytorch
from metamom.maml.estimators import ESTIMATORS, Adaptations, InnerBatch
from metamom.maml.inner_updates import Moments, direction
from metamom.maml.normalisation.norm_modes import AnyNorm, normalising
from metamom.maml.problem import PLAIN, Problem
from metamom.maml.running.run_by_task import RunByTask
from metamom.maml.running.swapping import is_training, tensors_left
from metamom.maml.step_gradients import check_constant, check_cut
from metamom.maml.task_weights import Params
from metamom.maml.under_vmap.drawing_functions import DrawingFunctions, Places
from metamom.maml.under_vmap.draws import DrawsByTask, generator_states, rewinder
from metamom.maml.under_vmap.functions_by_task import FunctionsByTask, checked
from metamom.nets.linear import are_many

Result = TypeVar("Result")

# Errors after which the general path is tried.
ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)


class UnsuitableError(RuntimeError):
    """Something that only the general path can compute or refuse."""


class Computed(NamedTuple):
    """The results of a chunk of tasks.

    Attributes:
        losses: query losses ``[T]``.
        predictions: on the query sets, ``[T, Q, ...]``.
        gradients: each worker's, ``[n, *shape]``, by parameter.
    """

    losses: Tensor
    predictions: Tensor
    gradients: Params


class FastPath(NamedTuple):
    """A fast path.

    Attributes:
        suits: whether it can take these adaptations, which `is_plain` holds for.
        compute: the results, from the problem, the meta-parameters by name, T adaptations, n, and the number that the
            sum of losses is multiplied with.
    """

    suits: Callable[[Problem, Adaptations], bool]
    compute: Callable[[Problem, Params, Adaptations, int, float], Computed]


class Unconnected:
    """The parameters that gradients have not reached so far.

    Args:
        problem: the model and loss.
        names: the parameters.
        derivable: whether their gradients must have derivatives.

    Attributes:
        missing: those without a gradient.
        constant: those with one that cannot be differentiated, although it should be.
    """

    def __init__(self, problem: Problem, names: Sequence[str], *, derivable: bool) -> None:
        self._problem = problem
        self.missing, self.constant = set(names), set(names) if derivable else set()

    def see(self, found: dict[str, Tensor | None]) -> None:
        """Leave out the parameters with a gradient."""
        self.missing.difference_update(name for name, grad in found.items() if grad is not None)
        if self.constant:
            self.constant.difference_update(
                name for name, grad in found.items() if grad is not None and grad.requires_grad
            )

    def check(self, names: Sequence[str], batch: InnerBatch) -> None:
        """Refuse those that something in the model or the loss has cut off; ``names`` gives their order."""
        if self.missing:
            check_cut(self._problem, [name for name in names if name in self.missing], *batch.points())
        constant = self.constant - self.missing
        if constant:
            check_constant(self._problem, [name for name in names if name in constant], batch)


def by_fast_path_or(
    paths: Sequence[FastPath],
    problem: Problem,
    weights: Params,
    term: Adaptations,
    workers: int,
    scale: float,
    *,
    otherwise: Callable[[], Result],
    finish: Callable[[Computed], Result],
) -> Result:
    """The result of the first path that suits, passed to ``finish``. If it fails or none suits, that of ``otherwise``.

    A path that has failed where ``otherwise`` has not is not tried again for such tasks.
    """
    if is_tracing() or not is_plain(problem, term):
        return otherwise()
    state = is_training(problem.model), problem.norm, count(term.query_x), problem.estimator
    for number, path in enumerate(paths):
        kind = number, *state
        if kind not in problem.run.unsuitable and path.suits(problem, term):
            break
    else:
        return otherwise()
    rewind = rewinder()
    try:
        found = path.compute(problem, weights, term, workers, scale)
    except ERRORS:
        rewind()
        other = otherwise()
        problem.run.unsuitable.add(kind)
        return other
    return finish(found)


def is_plain(problem: Problem, term: Adaptations) -> bool:
    """Whether these adaptations are steps of numbers on whole sets of tensors, as most are."""
    record = ESTIMATORS[problem.estimator]
    fixed = problem.step_sizes.fixed
    return (
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
        and all(isinstance(x, Tensor) and (y is None or isinstance(y, Tensor)) for x, y in sets_of(term))
        and all(isinstance(fixed.get(name), float) for name in problem.adapted)
    )


def sets_of(term: Adaptations) -> list[tuple[Any, Any]]:
    """Inputs and targets of each call of the model: those of the inner steps, and the query sets."""
    return [*[(step.x, step.y) for step in term.steps], (term.query_x, term.query_y)]


def labels(y: Tensor | None) -> tuple[Tensor, ...]:
    """Targets as arguments of the loss. Bytes are labels, as elsewhere."""
    return () if y is None else (y.long() if y.dtype == torch.uint8 else y,)


def is_settled(run: RunByTask, model: nn.Module, norm: AnyNorm | None, tasks: int, *, loop: bool) -> bool:
    """Whether the model has run on this many tasks, so that nothing new is to be found when it does again."""
    mode = is_training(model)
    if run.shortens(model):
        return False
    if mode in run.draws and run.places.get((mode, loop)) != Places():
        return False
    return mode in run.leaves and (mode, norm, tasks, are_many(), not loop) in run.calls


def as_settled(
    run: RunByTask, model: nn.Module, norm: AnyNorm | None, tasks: int, *, loop: bool
) -> Callable[[Tensor], Any]:
    """The model as a function of one task's inputs, which `is_settled` holds for."""
    kind = model.training, norm, tasks, are_many(), not loop
    replaces, leaves = run.calls[kind], run.leaves[model.training]
    if norm is None and not replaces and not leaves:
        return model
    waits = replaces and not loop and is_of_pytorch(model)

    def call(x: Tensor) -> Any:
        with (
            FunctionsByTask(fast=not loop, waits=waits) if replaces else nullcontext(),
            normalising(model, norm) as over_sets,
            tensors_left(leaves) if leaves else nullcontext(),
        ):
            return checked(partial(over_sets, model, (x,)))

    return call


def after_step(
    problem: Problem,
    own: Params,
    grads: dict[str, Tensor | None],
    moments: dict[str, Moments | None],
    moved: Callable[[Tensor, float, Tensor], Tensor],
) -> Params:
    """The weights after one more inner step.

    Args:
        problem: the step sizes, which are numbers, and the inner optimizer.
        own: the weights before the step, by name.
        grads: of those that are adapted; ``None`` leaves a weight where it is.
        moments: what the inner optimizer keeps between steps; updated in place.
        moved: a weight after its step, from the weight, its step size and its direction.
    """
    after = dict(own)
    for name, grad in grads.items():
        if grad is not None:
            taken, moments[name] = direction(problem.inner_optimizer, moments.get(name), grad)
            after[name] = moved(own[name], problem.step_sizes.fixed[name], taken)
    return after


class Draws:
    """The draws of a chunk's calls of a model that is settled, each task's its own.

    They depend on the task's number and on that of the call, as elsewhere.

    Args:
        problem: the model.
        tasks: T.
        calls: how often each task calls the model.
        device: where it runs.
        loop: whether it runs task by task.
    """

    def __init__(self, problem: Problem, tasks: int, calls: int, device: torch.device, *, loop: bool) -> None:
        self.calls = calls
        drawing = is_training(problem.model) in problem.run.draws
        self.of_call = [DrawsByTask(tasks) for _ in range(calls)] if drawing else []
        # by vmap, a model that is not known to draw cannot
        self._before = generator_states(device) if loop or drawing else None
        self._device = device

    def functions(self, call: int) -> Callable[[], DrawingFunctions]:
        """What makes the context in which this call draws."""
        return partial(DrawingFunctions, self.of_call[call], everywhere=False)

    def check(self) -> None:
        """Refuse draws outside of the functions that draw, after all calls."""
        if self._before is None:
            return
        if not all(torch.equal(a, b) for a, b in zip(self._before, generator_states(self._device), strict=True)):
            raise UnsuitableError("something draws at random outside of the functions that draw")
