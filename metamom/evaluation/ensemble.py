"""Several learners as one: the mean of their predictions.

Legend: T tasks, Q query points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metamom.common.choices import Norm
from metamom.common.held import held
from metamom.common.kinds import named_type
from metamom.common.trees import Tree, lone
from metamom.maml.learner import MAML


class Ensemble:
    """Adapts several learners to a task, and predicts the mean of their predictions; for `metamom.evaluate`.

    For class scores (integer labels), it is the logarithm of the mean of the softmax probabilities, so that accuracy
    and cross-entropy are those of that mean.

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

    def adapt(self, support_x: Tree, support_y: Tree, *, steps: int) -> list[Any]:
        """Each learner's adapted weights ``[T, *shape]``, with what `predict` needs."""
        labels = lone(support_y)
        classes = labels is not None and not labels.is_floating_point()
        found: list[Any] = [classes]
        for learner in self.learners:
            *_, adapted = learner.trajectory(support_x, support_y, steps=steps)
            given = {"support_x": support_x} if learner.norm == "support" else {}
            found.append((adapted, given))
        return found

    def predict(self, state: list[Any], x: Tree) -> Tensor:
        """The mean of the predictions, ``[T, Q, ...]``.

        Raises:
            TypeError: for models that return several tensors.
        """
        classes, *members = state
        each = []
        for learner, (adapted, given) in zip(self.learners, members, strict=True):
            predicted = lone(held(learner.predict(adapted, x, **given)))
            if predicted is None:
                raise TypeError("an ensemble averages predictions that are one tensor; these are several.")
            each.append(predicted)
        stacked = torch.stack(each)
        if not classes:
            return stacked.mean(0)
        return torch.logsumexp(stacked.log_softmax(-1), 0) - torch.log(torch.tensor(float(len(each))))
