"""Adaptation: predictions, losses and inner steps as functions of a problem and the tasks' weights.

Legend: T tasks, c copies of each, n workers, N points of a task, J inner steps.

Both the inner and the outer derivative use plain autograd over a forward pass that `torch.func.vmap` batches over
tasks, or that a loop runs for each. (Differentiating from outside vmap over an inner `torch.func.grad` is wrong for
affine normalisation layers in torch 2.13.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metamom.common.choices import Norm
from metamom.common.trees import Tree, count, joined, leaves, mapped
from metamom.compile.tracing import is_tracing
from metamom.maml.draws import Step
from metamom.maml.estimators import ESTIMATORS, Adaptations, Estimator, InnerBatch
from metamom.maml.features import Features
from metamom.maml.finite_differences import Losses, drawing_refused_for
from metamom.maml.inner_lr import StepSizes
from metamom.maml.inner_step import Derivatives, inner_gradient, inner_step, straight_through
from metamom.maml.loss_readings import LossFn, LossReadings
from metamom.maml.misfits import check_loss, targets_explained
from metamom.maml.model_checks import check_hooks
from metamom.maml.modes import out_of_inference
from metamom.maml.padding import cut_off, loops_over_padded, takes_mask
from metamom.maml.perturbed import perturbed_losses
from metamom.maml.plain_autograd import differentiable_twice
from metamom.maml.proximal import Proximal
from metamom.maml.proximal_step import InnerProblem, proximal_step
from metamom.maml.rules import PLAIN, Rule
from metamom.maml.run_by_task import RunByTask, Support
from metamom.maml.solves import Solves
from metamom.maml.step_norms import StepNorms
from metamom.maml.swapping import alone, is_training, named, slots, swapped
from metamom.maml.task_weights import Params, Start, deal
from metamom.maml.tracking import tracked
from metamom.maml.unused import Uses
from metamom.maml.vectorize import Part, Vectorization, map_over_tasks
from metamom.maml.vmap_errors import explained, loss_draws_refused
from metamom.nets.low_rank import plain

LOSS = "loss_fn."  # prefix of the names of a loss module's parameters


class Problem(NamedTuple):
    """Everything that adaptation depends on besides weights and data.

    Attributes:
        model: maps ``[N, ...]`` to predictions ``[N, ...]``.
        loss_fn: ``(predictions [N, ...], targets [N, ...]) -> 0-d loss`` of one task.
        adapted: names of the parameters that inner steps move.
        step_sizes: alpha of each adapted parameter.
        step_norms: the normalisations' scales and offsets by inner step, if they are learned so.
        objective: weights of the query losses after each inner step, ``[J]``; ``None`` for the last one only.
        estimator: decides how inner steps are differentiated.
        autocast: dtype of the model's products, ``None`` for the dtype of the weights.
        norm: what the model's normalisations use, from `metamom.maml.norm.resolved`.
        run: runs the model with separate weights for each task.
        vectorization: whether model and loss run on all tasks at once.
        readings: how the loss was seen to interpret its arguments.
        uses: which parameters the loss was found not to depend on.
        proximal: how the proximal problem is solved, for the estimators that adapt by one.
        solves: how its last solves went.
        rule: where the learner departs from MAML.
    """

    model: nn.Module
    loss_fn: LossFn
    adapted: tuple[str, ...]
    step_sizes: StepSizes
    step_norms: StepNorms | None
    objective: Tensor | None
    estimator: Estimator
    autocast: torch.dtype | None
    norm: Norm | None
    run: RunByTask
    vectorization: Vectorization
    readings: LossReadings
    uses: Uses
    proximal: Proximal
    solves: Solves
    rule: Rule = PLAIN

    def parameters(self) -> Params:
        """The trainable parameters of model and loss, with those that differ between inner steps in place of others."""
        found = trainable(self.model, self.loss_fn, self.rule.replaced)
        if self.step_norms is None:
            return found
        own = {name: p for name, p in found.items() if name not in self.step_norms.names}
        return own | self.step_norms.learned()

    def parts(self) -> tuple[Part, Part]:
        """The model and the loss, in their current modes."""
        training = getattr(self.loss_fn, "training", True)
        return ("model", is_training(self.model)), ("loss_fn", training)

    def loops(self) -> bool:
        """Whether neither runs on all tasks at once."""
        return self.vectorization.loops(*self.parts())


class Episodes(NamedTuple):
    """The results of T·c adaptations.

    Attributes:
        losses: query losses ``[T·c]``, after the last inner step.
        objective: what is differentiated, ``[T·c]``: these, or the weighted sums of those after each step.
        predictions: on the query sets, ``[T·c, Q, ...]``, a tensor or a tree.
        adapted: the adapted weights that made them, ``[T·c, *shape]``.
    """

    losses: Tensor
    objective: Tensor
    predictions: Tree
    adapted: Params


def names_in_loss(model: nn.Module, loss_fn: LossFn) -> dict[str, str]:
    """Map the names of a loss module's parameters to their names among the meta-parameters."""
    if not isinstance(loss_fn, nn.Module):
        return {}
    with alone(model, loss_fn):
        of_model = {id(p): name for name, p in model.named_parameters()}
        return {name: of_model.get(id(p), LOSS + name) for name, p in loss_fn.named_parameters()}


def trainable(model: nn.Module, loss_fn: LossFn, but: Collection[str] = ()) -> Params:
    """The trainable parameters of the model, and those of a loss module that the model does not share.

    Args:
        model: the model.
        loss_fn: the loss.
        but: names of parameters to leave out.

    Raises:
        ValueError: if a name occurs in both.
    """
    weights = named(model)
    own = named(loss_fn) if isinstance(loss_fn, nn.Module) else {}
    for name, meta_name in names_in_loss(model, loss_fn).items():
        if weights.setdefault(meta_name, own[name]) is not own[name]:
            raise ValueError(f"both the model and loss_fn have a parameter {meta_name!r}: rename the model's.")
    return {name: p for name, p in weights.items() if p.requires_grad and name not in but}


def start_of(problem: Problem, rows: Params, num_tasks: int, first: InnerBatch | None = None) -> Start:
    """The weights that T tasks start from, given the workers' meta-parameters ``[n, *shape]``.

    Args:
        problem: the model, and how it adapts.
        rows: the workers' meta-parameters.
        num_tasks: T.
        first: the points of the tasks that a rule may compute some of these weights from.
    """
    start = deal(rows, num_tasks, problem.adapted, problem.step_sizes.learned())
    if first is None or problem.rule.start is None:
        return start
    return problem.rule.start(problem, start.at(0), first)


def predictions(
    problem: Problem,
    start: Start,
    own: Params,
    x: Tree,
    mask: Tensor | None = None,
    *,
    support: Support | None = None,
    draws: bool = True,
    features: Features | None = None,
    target: Callable[..., Any] | None = None,
) -> Tree:
    """Predict ``[T, N, ...]`` from ``x: [T, N, ...]`` with parameters that have moved from ``start`` to ``own``.

    Of points outside ``mask`` [T, N], predictions mean nothing; a loop over the tasks leaves them out. A random model
    draws separately for each task. With ``draws=False``, drawing is an error. With ``norm="support"``, normalisations
    use the statistics of ``support``, or of ``x`` if it is ``None``. ``features`` are those of earlier calls with the
    same weights outside ``own``. A ``target`` is called in place of the model, with its weights in it.
    """
    part, _ = problem.parts()

    def compute(x: Tree, loop: bool) -> Tree:
        return problem.run(
            problem.model,
            start,
            own,
            x,
            mask,
            draws=draws,
            dtype=problem.autocast,
            loop=loop,
            norm=problem.norm,
            support=support,
            features=features,
            target=target,
        )

    def run() -> Tree:
        padded = mask is not None or (support is not None and support.mask is not None)
        loop = problem.vectorization.loops(part)
        if not loop and not padded and problem.vectorization.vectorize == "auto":
            loop = problem.run.prefers_a_loop(problem.model, own, x)
        if padded and not loop:
            must_not = problem.vectorization.vectorize == "vmap"
            kind = problem.norm, mask, must_not
            loop = loops_over_padded(problem.run.mixes, problem.model, partial(compute, loop=False), x, *kind)
        return compute(x, loop)

    out = problem.vectorization.attempt([part], run)
    if problem.autocast is None:
        return out
    wanted = next(each.dtype for each in (*leaves(x), *own.values()) if each.is_floating_point())
    return mapped(lambda each: each.to(wanted) if each.is_floating_point() else each, out)


def losses(problem: Problem, start: Start, own: Params, predicted: Tree, y: Tree, mask: Tensor | None = None) -> Tensor:
    """Compute the losses ``[T]`` of predictions ``[T, N, ...]``, given the parameters that made them.

    With a ``mask`` [T, N] of the points that count, the loss is called on each task's own points. A loss with a
    parameter ``mask`` is called on all tasks at once.

    If a loss module shares parameters with the model, it gets each task's adapted ones.

    Raises:
        ValueError: for targets that do not fit, or if the loss is not one number a task.
    """
    # torch's losses take bytes as labels, but not under vmap
    y = mapped(lambda each: each.long() if each.dtype == torch.uint8 else each, y)
    _, part = problem.parts()
    once = mask is None and problem.vectorization.loops(part)
    loss_fn, names = problem.readings.watched(problem.loss_fn, once), names_in_loss(problem.model, problem.loss_fn)

    masked = mask is not None and takes_mask(problem.loss_fn)

    def one_task(predicted: Tree, y: tuple[Tree, ...], mask: tuple[Tensor, ...], loop: bool) -> Tensor:
        if mask and loop:
            (predicted, y), mask = cut_off((predicted, y), mask[0]), (mask[0][mask[0]],)
        loss = loss_fn(predicted, *y, **({"mask": mask[0]} if masked else {}))
        check_loss(loss)
        return loss

    module = problem.loss_fn if isinstance(problem.loss_fn, nn.Module) else None
    args = predicted, () if y is None else (y,), () if mask is None else (mask,)

    def run() -> Tensor:
        loop = problem.vectorization.loops(part)
        if mask is not None and not loop and not masked:
            if problem.vectorization.vectorize == "vmap":
                raise ValueError(
                    'loss_fn has no parameter mask, so with vectorize="vmap" it cannot leave out the padding of a '
                    'batch from metamom.pad. Use vectorize="auto", which calls it task by task on the original points.'
                )
            loop = True
        one = partial(one_task, loop=loop)
        if module is not None and (not loop or is_tracing()):
            check_hooks(module, compiling=loop)
        with (
            explained(problem.model, "loss_fn", loop=loop),
            targets_explained(predicted, y),
            differentiable_twice(module) if loop else nullcontext(),
            loss_draws_refused(leaves(predicted)[0].device) if loop and not is_tracing() else nullcontext(),
        ):
            if module is not None and names:
                return _with_parameters(module, one, names, start, own, args, loop)
            of_tasks: Tensor = map_over_tasks(one, loop)(*args)
            return of_tasks

    found = problem.vectorization.attempt([part], run)
    if found.dim() != 1:
        raise ValueError(
            f"loss_fn must return one number per task, as reduction='mean' does; got shape {tuple(found.shape[1:])} "
            "for each."
        )
    return found


def _with_parameters(
    module: nn.Module,
    loss: LossFn,
    names: Mapping[str, str],
    start: Start,
    own: Params,
    args: tuple[Tree, ...],
    loop: bool,
) -> Tensor:
    """Losses from a loss module with parameters; ``names`` maps its parameter names to those of the task weights."""
    with alone(module):
        found = slots(module)

        def one_task(own: Params, kept: Params, *args: Tree) -> Tensor:
            weights = {**start.shared, **kept, **own}
            with swapped(found, {name: weights[meta] for name, meta in names.items() if meta in weights}):
                return loss(*args)

        of_tasks: Tensor = map_over_tasks(one_task, loop)(own, start.kept, *args)
    return of_tasks


def trajectory(
    problem: Problem, start: Start, steps: Iterable[InnerBatch], keep_graph: bool, *, thin: bool = False
) -> Iterator[Params]:
    """Yield the adapted parameters after 0, 1, ..., J inner steps, ``[T, *shape]``.

    ``u_0 = w, u_{j+1} = u_j - alpha * grad L_j(u_j)``, with the derivatives that the estimator asks for. They are plain
    tensors, unless they may be thin factors (`metamom.nets.low_rank`).
    """
    if ESTIMATORS[problem.estimator].proximal:
        yield from _proximal_trajectory(problem, start, steps, keep_graph)
        return
    steps, own = list(steps), start.own
    features = _features(problem, steps, keep_graph)
    yield own
    for number, batch in enumerate(steps):
        with out_of_inference(), torch.enable_grad():
            at = own if keep_graph else {name: w.detach().requires_grad_() for name, w in own.items()}
            grads = _gradient(problem, start.at(number), at, batch, keep_graph, features)
            check_cut(problem, [name for name, grad in grads.items() if grad is None], *batch.points())
            if keep_graph and ESTIMATORS[problem.estimator].derivatives != "none":
                flat = [name for name, grad in grads.items() if grad is not None and not grad.requires_grad]
                _check_constant(problem, flat, batch)
            own = {
                name: w
                if (grad := grads[name]) is None
                else inner_step(w, _alpha(problem, name, start, w, number), grad)
                for name, w in at.items()
            }
        if not thin:
            own = {name: plain(w) for name, w in own.items()}
        if not keep_graph:
            own = {name: w.detach() for name, w in own.items()}
        yield own


def episodes(problem: Problem, rows: Params, term: Adaptations, memory: Params, *, thin: bool = True) -> Episodes:
    """Adapt from the workers' parameters ``[n, *shape]`` and compute the query losses.

    Args:
        problem: the model and loss.
        rows: the workers' meta-parameters.
        term: the inner batches and the query sets.
        memory: the moving averages of a tracked estimator; empty for other estimators.
        thin: see `trajectory`; for graphs that are differentiated before anything else changes the weights.
    """
    start, outer = start_of(problem, rows, count(term.query_x), term.steps[0]), problem.rule.outer
    if ESTIMATORS[problem.estimator].perturbs and torch.is_grad_enabled():
        return _perturbed_episodes(problem, start, term)
    keep_graph, given = torch.is_grad_enabled() and outer is None, support_of(problem, term)

    def queried(adapted: Params, steps: int) -> tuple[Tensor, Tree]:
        there = start.at(steps)
        predicted = predictions(problem, there, adapted, term.query_x, term.query_mask, support=given)
        return losses(problem, there, adapted, predicted, *term.query()[1:]), predicted

    _, *before, adapted = trajectory(problem, start, term.steps, keep_graph, thin=thin)
    if memory:
        adapted = tracked(memory, adapted, lambda weights: _step_from(problem, weights, term.steps[0]))
    with nullcontext() if outer is None else torch.no_grad():
        last, predicted = queried(adapted, len(term.steps))
    objective = last if outer is None else outer(start.own, adapted, last)
    if problem.objective is not None:
        each = [queried(weights, number)[0] for number, weights in enumerate(before, 1)]
        objective = torch.stack([*each, last], 1) @ problem.objective.to(last)
    return Episodes(last, objective, predicted, adapted)


def _perturbed_episodes(problem: Problem, start: Start, term: Adaptations) -> Episodes:
    """`episodes` at the solutions of the proximal problem, with the derivatives of perturbed solutions."""
    with torch.no_grad():
        *_, adapted = trajectory(problem, start, term.steps, keep_graph=False)
        given = support_of(problem, term)
        predicted = predictions(problem, start, adapted, term.query_x, term.query_mask, support=given)
        values = losses(problem, start, adapted, predicted, *term.query()[1:])
    inner = _inner_problem(problem, start, term.steps[0])
    query = _losses_of(problem, start, term.query(), given)
    surrogate = perturbed_losses(inner, query, start.own, start.kept | start.shared, adapted)
    return Episodes(values, straight_through(values, surrogate), predicted, adapted)


def _proximal_trajectory(
    problem: Problem, start: Start, steps: Iterable[InnerBatch], keep_graph: bool
) -> Iterator[Params]:
    """`trajectory`, in which each step is a solution of the proximal problem around the weights before it."""
    own = start.own
    yield own
    for batch in steps:
        with out_of_inference(), torch.enable_grad():
            inner = _inner_problem(problem, start, batch)
            own = proximal_step(inner, own, start.kept | start.shared, keep_graph)
        yield own


def _inner_problem(problem: Problem, start: Start, batch: InnerBatch) -> InnerProblem:
    """The proximal problem with the losses of an inner batch."""

    def attempt(compute: Callable[[], Any]) -> Any:
        with explained(problem.model, loop=problem.loops()), drawing_refused_for(problem.estimator):
            return compute()

    eps = max(torch.finfo(problem.autocast or w.dtype).eps for w in start.own.values())
    return InnerProblem(
        _losses_of(problem, start, batch.points()),
        lambda compute: problem.vectorization.attempt(problem.parts(), lambda: attempt(compute)),
        lambda missing: check_cut(problem, missing, *batch.points()),
        lambda names: _check_constant(problem, names, batch),
        problem.proximal,
        problem.proximal.tolerance_of(problem.estimator, eps),
        problem.solves,
        eps,
    )


def _losses_of(
    problem: Problem, start: Start, points: tuple[Tree, Tree, Tensor | None], support: Support | None = None
) -> Callable[[Tensor | None, bool], Losses]:
    """Losses without random draws, for `metamom.maml.proximal_step.InnerProblem`."""

    def of(some: Tensor | None, constant: bool) -> Losses:
        def chosen(tree: Tree) -> Tree:
            return tree if some is None else mapped(lambda each: each[some], tree)

        x, y, mask = map(chosen, points)
        given = None if support is None else Support(*map(chosen, support))
        features = Features([x, x], graph=False) if constant else None

        def losses_at(own: Params, others: Params) -> Tensor:
            kept, shared = ({name: others[name] for name in each} for each in (start.kept, start.shared))
            there = start._replace(kept=kept if some is None else {n: w[some] for n, w in kept.items()}, shared=shared)
            predicted = predictions(problem, there, own, x, mask, support=given, draws=False, features=features)
            return losses(problem, there, own, predicted, y, mask)

        return losses_at

    return of


def support_of(problem: Problem, term: Adaptations) -> Support | None:
    """The points that the inner steps take their gradients from, if normalisations use their statistics."""
    if problem.norm != "support":
        return None
    distinct = list({id(step.x): step for step in term.steps}.values())
    if len(distinct) == 1:
        return Support(distinct[0].x, distinct[0].mask)
    return Support(joined(partial(torch.cat, dim=1), [step.x for step in distinct]), None)  # a split set has no mask


def _step_from(problem: Problem, weights: Params, batch: InnerBatch) -> Params:
    """One inner step from each task's own weights ``[T, *shape]``, without a graph."""
    own = {name: w for name, w in weights.items() if name in problem.adapted}
    kept = {name: w for name, w in weights.items() if name not in own}
    *_, adapted = trajectory(problem, Start(own, kept, {}, {}), [batch], keep_graph=False)
    return adapted


def _alpha(problem: Problem, name: str, start: Start, weight: Tensor, step: int) -> float | Tensor:
    return problem.step_sizes.of(name, start.step_sizes, weight.dim(), step)


def _features(problem: Problem, steps: Sequence[InnerBatch], keep_graph: bool) -> Features | None:
    """Where the inner steps of one adaptation keep their features; none if steps differ in more than weights."""
    derivatives = ESTIMATORS[problem.estimator].derivatives if keep_graph else "none"
    if derivatives == "differences" or problem.step_norms is not None:
        return None
    sets = [x for step in steps for x in (step.x, *(() if step.hessian is None else step.hessian[:1]))]
    return Features(sets, graph=derivatives != "none")


def _gradient(
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


def _check_constant(problem: Problem, names: Sequence[str], batch: InnerBatch) -> None:
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
            found = _gradient(problem, start.at(0), at, one, keep_graph=False)[name]
        assert found is not None
        return found

    problem.uses.check_constant({name: partial(gradient, name) for name in names}, _values(problem))


def _modules(problem: Problem) -> Iterator[nn.Module]:
    yield from problem.model.modules()
    if isinstance(problem.loss_fn, nn.Module):
        yield from problem.loss_fn.modules()


def _values(problem: Problem) -> Params:
    """The trainable parameters' values."""
    return {name: w.detach() for name, w in problem.parameters().items()}
