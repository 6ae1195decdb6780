"""Several learners as one: the mean of their predictions.

Legend: T tasks, Q query points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom.common.choices import Norm
from metamom.common.held import held, released
from metamom.common.kinds import named_type
from metamom.common.trees import Tree, lone, mapped
from metamom.maml.checks.class_scores import UNKNOWN, Reading
from metamom.maml.learner import MAML
from metamom.maml.task_weights import Params


class EnsembleState(NamedTuple):
    """What an ensemble knows about T tasks.

    Attributes:
        reading: what predictions mean.
        members: each learner's adapted weights ``[T, *shape]``, and the other arguments of its `predict`.
    """

    reading: Reading
    members: list[tuple[Params, dict[str, Any]]]


class Ensemble:
    """Adapts several learners to a task, and predicts the mean of their predictions; for `metamom.evaluate`.

    What predictions mean is seen from how the first learner's loss uses them. For class scores, it is the logarithm of
    the mean of the softmax probabilities, so that accuracy and cross-entropy are those of that mean; for one logit a
    target, the logit of the mean probability. Anything else is averaged as it is.

    Args:
        learners: one or more.

    Raises:
        TypeError: for anything but `metamom.MAML`.
        ValueError: for none.

    Example:
        >>> from torch.nn import functional as F
        >>> from metamom import MAML, evaluate, nets
        >>> from metamom.ensemble import Ensemble
        >>> from metamom.tasks import Sinusoid
        >>> members = [MAML(nets.SinusoidMLP(), F.mse_loss) for _ in range(3)]
        >>> evaluate(Ensemble(members), Sinusoid(), tasks=10, steps=(0, 1), metric="loss").metric
        'loss'

    Reference:
        Antoniou, Edwards, Storkey (2019), "How to train your MAML", section 5: the models of the best validations.
    """

    def __init__(self, learners: Sequence[MAML]) -> None:
        self.learners = list(learners)
        if not self.learners:
            raise ValueError("an ensemble needs at least one learner; got none.")
        for each in self.learners:
            if not isinstance(each, MAML):
                raise TypeError(f"the members of an ensemble are of metamom.MAML; got {named_type(each)}.")

    @property
    def loss_fn(self) -> Any:
        """The loss of the first learner."""
        return self.learners[0].loss_fn

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all learners."""
        for learner in self.learners:
            yield from learner.parameters()

    def like(self, *, norm: Norm | None = None, inner_lr: float | None = None) -> Ensemble:
        """The same with other options, see `metamom.MAML.like`."""
        return Ensemble([learner.like(norm=norm, inner_lr=inner_lr) for learner in self.learners])

    def adapt(self, support_x: Tree, support_y: Tree, *, steps: int) -> EnsembleState:
        """Each learner's adapted weights ``[T, *shape]``, with what `predict` needs."""
        members = []
        for learner in self.learners:
            *_, adapted = learner.trajectory(support_x, support_y, steps=steps)
            given = {"support_x": support_x} if learner.norm == "support" else {}
            members.append((adapted, given))
        return EnsembleState(self._reading(*members[0], support_x, support_y), members)

    def predict(self, state: EnsembleState, x: Tree) -> Any:
        """The mean of the predictions, ``[T, Q, ...]``, in the form that the models return it in.

        Raises:
            TypeError: for models that return several tensors.
        """
        each = []
        predicted: Tree = None
        for learner, (adapted, given) in zip(self.learners, state.members, strict=True):
            predicted = held(learner.predict(adapted, x, **given))
            one = lone(predicted)
            if one is None:
                raise TypeError("an ensemble averages predictions that are one tensor; these are several.")
            each.append(one)
        mean = mean_prediction(torch.stack(each), state.reading)
        return released(mapped(lambda _: mean, predicted))

    def judge(self, state: EnsembleState, predictions: Tree, y: Tree) -> tuple[Tensor, Tensor | None]:
        """The losses and accuracies ``[T]`` of predictions, by the first learner's loss: see `metamom.MAML.judge`."""
        adapted, _ = state.members[0]
        return self.learners[0].judge(adapted, predictions, y)

    def _reading(self, adapted: Params, given: dict[str, Any], x: Tree, y: Tree) -> Reading:
        """How the first learner's loss interprets predictions, from its call on the support set."""
        first = self.learners[0]
        predicted = held(first.predict(adapted, x, **given))
        scores, targets = lone(predicted), lone(y)
        if scores is None or targets is None:
            return UNKNOWN
        first.judge(adapted, predicted, y)
        return first._readings.of(first.loss_fn, scores, targets)


def mean_prediction(each: Tensor, reading: Reading) -> Tensor:
    """The mean of several predictions.

    Args:
        each: of each learner, ``[k, T, Q, ...]``.
        reading: what they mean; its class axis is that of one task's predictions ``[Q, ...]``.

    Returns:
        ``[T, Q, ...]``: normalised log probabilities of classes, the logit of the mean probability, or the mean.

    Example:
        >>> mean_prediction(torch.tensor([[[2.0]], [[-2.0]]]), Reading("logit"))
        tensor([[0.]])
    """
    if reading.kind == "classes":
        return _log_mean(each.log_softmax(reading.axis + 2))
    if reading.kind == "logit":
        return _log_mean(F.logsigmoid(each)) - _log_mean(F.logsigmoid(-each))
    return each.mean(0)


def _log_mean(logarithms: Tensor) -> Tensor:
    """The logarithm of the mean over the first axis."""
    return torch.logsumexp(logarithms, 0) - math.log(len(logarithms))
