"""The gradients of inner steps, and the refusal of those that something in the model or the loss has cut off.

Legend: T tasks, N points of a task.

Both the inner and the outer derivative use plain autograd over a forward pass that `torch.func.vmap` batches over
tasks, or that a loop runs for each. (Differentiating from outside vmap over an inner `torch.func.grad` is wrong for
affine normalisation layers in torch 2.13.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from metamom.common.modules import modules_of
from metamom.common.trees import Tree, mapped
from metamom.compile.tracing import is_tracing
from metamom.maml.estimators import ESTIMATORS, InnerBatch
from metamom.maml.features import Features
from metamom.maml.finite_differences import Losses
from metamom.maml.inner_step import Derivatives, inner_gradient
from metamom.maml.predicting import losses, predictions
from metamom.maml.problem import Problem, start_of
from metamom.maml.running.run_by_task import Support
from metamom.maml.task_weights import Params, Start
from metamom.maml.under_vmap.draws import Step
from metamom.maml.vmap_errors import explained


def features_of(problem: Problem, steps: Sequence[InnerBatch], keep_graph: bool) -> Features | None:
    """Where the inner steps of one adaptation keep their features; none if steps differ in more than weights."""
    derivatives = ESTIMATORS[problem.estimator].derivatives if keep_graph else "none"
    if derivatives == "differences" or problem.step_norms is not None:
        return None
    sets = [x for step in steps for x in (step.x, *(() if step.hessian is None else step.hessian[:1]))]
    return Features(sets, graph=derivatives != "none")


def step_gradient(
    problem: Problem,
    start: Start,
    at: Params,
    batch: InnerBatch,
    keep_graph: bool,
    features: Features | None = None,
) -> dict[str, Tensor | None]:
    """The gradient of an inner step at ``at``, with the derivatives that the estimator asks for."""
    derivatives: Derivatives = ESTIMATORS[problem.estimator].derivatives if keep_graph else "none"
    if derivatives == "differences" and batch.hessian is None:
        derivatives = "exact"

    def losses_on(x: Tree, y: Tree, mask: Tensor | None = None, draws: bool = True) -> Losses:
        def of(own: Params, others: Params) -> Tensor:
            kept, shared = ({name: others[name] for name in each} for each in (start.kept, start.shared))
            there = start._replace(kept=kept, shared=shared)
            predicted = predictions(problem, there, own, x, mask, draws=draws, features=features)
            return losses(problem, there, own, predicted, y, mask)

        return of

    along = losses_on(*batch.points())
    hessian = None if batch.hessian is None else losses_on(*batch.hessian, draws=derivatives != "differences")
    precision = max(torch.finfo(problem.autocast or w.dtype).eps for w in at.values())

    def gradient() -> dict[str, Tensor | None]:
        with explained(problem.model, loop=problem.loops()):
            return inner_gradient(along, hessian, at, start.kept | start.shared, derivatives, precision)

    return problem.vectorization.attempt(problem.parts(), gradient)


def check_cut(
    problem: Problem,
    missing: Sequence[str],
    x: Tree,
    y: Tree,
    mask: Tensor | None = None,
    support: Support | None = None,
) -> None:
    """Refuse parameters that have no gradient although the loss depends on them. The others are merely unused.

    Args:
        problem: the model and loss.
        missing: names of the meta-parameters without a gradient.
        x: inputs ``[T, N, ...]``; the first task is tried.
        y: their targets.
        mask: the points that count.
        support: as for `predictions`.

    Raises:
        ValueError: naming them.
    """
    if is_tracing() or problem.uses.are_unused(missing, _modules(problem)):
        return
    step, (x, y, mask) = Step(), (mapped(lambda each: each[:1], tree) for tree in (x, y, mask))
    if support is not None:
        support = Support(*(mapped(lambda each: each[:1], tree) for tree in support))

    def loss(weights: Params) -> Tensor:
        start = start_of(problem, {name: w.unsqueeze(0) for name, w in weights.items()}, 1)
        with step.tasks(0, 1):
            start = start.at(0)
            predicted = predictions(problem, start, start.own, x, mask, support=support)
            return losses(problem, start, start.own, predicted, y, mask)

    problem.uses.check_cut(missing, _values(problem), loss)


def check_constant(problem: Problem, names: Sequence[str], batch: InnerBatch) -> None:
    """Refuse gradients that have no derivative although they depend on the weights (those of a linear loss do not).

    Args:
        problem: the model and loss.
        names: the adapted parameters that have an inner gradient without a graph.
        batch: an inner batch; the first task is tried.
    """
    if is_tracing() or problem.uses.are_constant(names, _modules(problem)):
        return
    x, y, mask = (mapped(lambda each: each[:1], tree) for tree in batch.points())
    one, step = InnerBatch(x, y, None, mask), Step()

    def gradient(name: str, weights: Params) -> Tensor:
        start = start_of(problem, {name: w.unsqueeze(0) for name, w in weights.items()}, 1)
        with step.tasks(0, 1), torch.enable_grad():
            at = {name: w.detach().requires_grad_() for name, w in start.own.items()}
            found = step_gradient(problem, start.at(0), at, one, keep_graph=False)[name]
        assert found is not None
        return found

    problem.uses.check_constant({name: partial(gradient, name) for name in names}, _values(problem))


def _modules(problem: Problem) -> Iterator[nn.Module]:
    yield from modules_of(problem.model)
    if isinstance(problem.loss_fn, nn.Module):
        yield from modules_of(problem.loss_fn)


def _values(problem: Problem) -> Params:
    """The trainable parameters' values."""
    return {name: w.detach() for name, w in problem.parameters().items()}
