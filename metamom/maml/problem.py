"""What adaptation depends on besides weights and data, and the weights that it starts from.

Legend: T tasks, n workers, J inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metamom.batch import TaskBatch
from metamom.common.modules import named_parameters_of
from metamom.maml.checks.loss_readings import LossFn, LossReadings
from metamom.maml.checks.unused import Uses
from metamom.maml.estimators import Estimator, InnerBatch
from metamom.maml.implicit.proximal import Proximal
from metamom.maml.implicit.solves import Solves
from metamom.maml.inner_lr import StepSizes
from metamom.maml.inner_optimizer import InnerOptimizer, InnerSGD
from metamom.maml.joined_sets import together
from metamom.maml.normalisation.norm_modes import AnyNorm
from metamom.maml.normalisation.step_norms import StepNorms
from metamom.maml.running.run_by_task import RunByTask
from metamom.maml.running.swapping import is_training, locked, named
from metamom.maml.running.vectorize import Part, Vectorization
from metamom.maml.task_weights import Params, Start, deal

LOSS = "loss_fn."  # prefix of the names of a loss module's parameters


class Rule(NamedTuple):
    """Where a learner departs from MAML: how a task starts, what it trains on, and what its meta-gradient is.

    By default nowhere. `metamom.maml.learners.reptile` and `metamom.maml.learners.protomaml` are learners with rules of
    their own.

    Attributes:
        replaced: names of the parameters that ``start`` computes for each task. They get no meta-gradient.
        start: adds those, given the problem, the tasks' start ``[T, *shape]``, and an inner batch.
        check: refuses a batch that ``start`` cannot take, before anything is computed.
        outer: given the weights before and after adaptation, ``[T, *shape]``, and the query losses ``[T]``: losses
            with the same values and other derivatives. The adaptation then keeps no graph.
        joins: whether meta-gradients adapt on support and query set together.
    """

    replaced: tuple[str, ...] = ()
    start: Callable[[Problem, Start, InnerBatch], Start] | None = None
    check: Callable[[TaskBatch], None] | None = None
    outer: Callable[[Params, Params, Tensor], Tensor] | None = None
    joins: bool = False

    def adapted_on(self, batch: TaskBatch) -> TaskBatch:
        """The batch with the support sets that meta-gradients adapt on."""
        return together(batch) if self.joins else batch


PLAIN = Rule()


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
        norm: what the model's normalisations use, from `metamom.maml.normalisation.norm.resolved`.
        run: runs the model with separate weights for each task.
        vectorization: whether model and loss run on all tasks at once.
        readings: how the loss was seen to interpret its arguments.
        uses: which parameters the loss was found not to depend on.
        proximal: how the proximal problem is solved, for the estimators that adapt by one.
        solves: how its last solves went.
        rule: where the learner departs from MAML.
        inner_optimizer: what inner steps follow.
    """

    model: nn.Module
    loss_fn: LossFn
    adapted: tuple[str, ...]
    step_sizes: StepSizes
    step_norms: StepNorms | None
    objective: Tensor | None
    estimator: Estimator
    autocast: torch.dtype | None
    norm: AnyNorm | None
    run: RunByTask
    vectorization: Vectorization
    readings: LossReadings
    uses: Uses
    proximal: Proximal
    solves: Solves
    rule: Rule = PLAIN
    inner_optimizer: InnerOptimizer = InnerSGD()

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


def names_in_loss(model: nn.Module, loss_fn: LossFn) -> dict[str, str]:
    """Map the names of a loss module's parameters to their names among the meta-parameters."""
    if not isinstance(loss_fn, nn.Module):
        return {}
    with locked(model, loss_fn):
        of_model = {id(p): name for name, p in named_parameters_of(model).items()}
        return {name: of_model.get(id(p), LOSS + name) for name, p in named_parameters_of(loss_fn).items()}


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
    if problem.step_norms is not None and (fixed := problem.step_norms.fixed()):
        each = {name: rows.expand(num_tasks, *rows.shape) for name, rows in fixed.items()}
        start = start._replace(norms={**start.norms, **each})
    if first is None or problem.rule.start is None:
        return start
    return problem.rule.start(problem, start.at(0), first)
