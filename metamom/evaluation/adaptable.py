"""What evaluation needs of a learner: the methods of any, and the options and weights of those that have them."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from metamom.batch import TaskBatch
from metamom.common.choices import Norm, Normalised
from metamom.common.kinds import named_type
from metamom.common.trees import Tree
from metamom.evaluation.ensemble import Ensemble
from metamom.maml.learner import MAML
from metamom.maml.normalisation.norm import check_norm, statistics_used


class Adaptable(Protocol):
    """A learner that `evaluate` takes: anything with these two methods, such as `metamom.MAML`.

    Both get batches of tasks. If it has a method ``parameters()``, batches are moved to the device of the first
    parameter, and floating-point tensors to its dtype. With an attribute ``loss_fn``, ``"loss"`` can be measured.

    Example:
        >>> class Mean:  # predicts the mean of the support targets
        ...     def adapt(self, support_x, support_y, *, steps):
        ...         return support_y.mean(1, keepdim=True)
        ...     def predict(self, state, x):
        ...         return state.expand(x.shape[0], x.shape[1], -1)
        >>> from metamom import evaluate
        >>> from metamom.tasks import Sinusoid
        >>> evaluate(Mean(), Sinusoid(), tasks=50, steps=(0,), metric="rmse").metric
        'rmse'
    """

    def adapt(self, support_x: Tree, support_y: Tree, *, steps: int) -> Any:
        """What the learner knows about each of T tasks after so many steps, in any form.

        Args:
            support_x: ``[T, S, ...]``, a tensor or a tree.
            support_y: ``[T, S, ...]``, or ``None``.
            steps: of adaptation, >= 0. A learner that does not take steps ignores it.
        """
        ...

    def predict(self, state: Any, x: Tree, /) -> Any:
        """Predictions ``[T, Q, ...]`` for ``x: [T, Q, ...]``, from what `adapt` returned for these tasks."""
        ...


def with_options(learner: Adaptable, norm: Norm | None, inner_lr: float | None) -> Adaptable:
    """The learner with other options for this evaluation.

    Raises:
        TypeError: for a learner that does not have them.
    """
    check_norm(norm)
    given = [name for name, value in (("norm", norm), ("inner_lr", inner_lr)) if value is not None]
    if not given:
        return learner
    if not isinstance(learner, MAML | Ensemble):
        raise TypeError(f"{' and '.join(given)} can be chosen for a metamom.MAML; got {named_type(learner)}.")
    return learner.like(norm=norm, inner_lr=inner_lr)


def statistics_of(learner: Adaptable) -> Normalised | None:
    """What the normalisations of a learner used, if it has any; of an ensemble, if its members used the same."""
    members = learner.learners if isinstance(learner, Ensemble) else [learner]
    used = {statistics_used(each.model, each.norm) if isinstance(each, MAML) else None for each in members}
    return used.pop() if len(used) == 1 else None


def weights_of(learner: Adaptable) -> list[Tensor]:
    """What a learner adapts from, as far as it can be seen."""
    if isinstance(learner, MAML):
        return list(learner.meta_parameters().values())
    parameters = getattr(learner, "parameters", None)
    return [p for p in parameters() if isinstance(p, Tensor)] if callable(parameters) else []


def placed_as_weights(batch: TaskBatch, learner: Adaptable) -> TaskBatch:
    """A batch on the learner's device and in its dtype."""
    like = next((p for p in weights_of(learner) if p.is_floating_point()), None)
    return batch if like is None else batch.to(like.device, like.dtype)
