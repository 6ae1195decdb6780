"""A learner that handles one task after the other.

Legend: T tasks, S support points, Q query points, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from metamom.common.choices import Norm
from metamom.common.kinds import named_type
from metamom.common.trees import Tree, count, joined, mapped
from metamom.maml.checks.batch_checks import check_set
from metamom.maml.fitting import copied
from metamom.maml.normalisation.norm import check_norm, resolved
from metamom.maml.normalisation.norm_modes import ByLayer
from metamom.maml.running.swapping import locked
from metamom.nets.models import use_batch_statistics
from metamom.nets.statistics import hide


class PerTask(ABC):
    """A `metamom.evaluation.Adaptable` whose subclasses see one task at a time.

    Subclasses implement `adapt_task` and `predict_task`, and `parameters` if they have any.
    """

    def adapt(self, support_x: Tree, support_y: Tree, *, steps: int = 0) -> list[Any]:
        """Adapt to each of T tasks, ``[T, S, ...]``."""
        check_set("support", support_x, support_y)
        return [self.adapt_task(_of(t, support_x), _of(t, support_y), steps) for t in range(count(support_x))]

    def predict(self, state: list[Any], x: Tree, /) -> Any:
        """Predictions ``[T, Q, ...]`` from what `adapt` returned."""
        return joined(torch.stack, [self.predict_task(own, _of(t, x)) for t, own in enumerate(state)])

    @abstractmethod
    def adapt_task(self, support_x: Tree, support_y: Tree, steps: int) -> Any:
        """What `predict_task` needs to know about one task, ``[S, ...]``."""

    @abstractmethod
    def predict_task(self, state: Any, x: Tree) -> Any:
        """Predictions ``[Q, ...]`` of one task."""

    def parameters(self) -> Iterator[Tensor]:
        """The parameters, whose device and dtype batches are moved to."""
        return iter(())


def _of(t: int, tree: Tree) -> Tree:
    """The part of one task."""
    return mapped(lambda x: x[t], tree)


def frozen_copy(model: nn.Module, norm: Norm | None) -> nn.Module:
    """A copy of a model in ``eval()`` that normalises by the statistics of the current set, or by running ones.

    Args:
        model: stays as it is.
        norm: ``"batch"``, ``"frozen"``, or ``None`` for what the model's mode says.

    Raises:
        TypeError: for anything but a model.
        ValueError: for another choice, or one that the model does not allow.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"wanted a model, a torch.nn.Module; got {named_type(model)}.")
    check_norm(norm)
    if norm == "support":
        raise ValueError('a baseline normalises by norm="batch" or norm="frozen"; got norm="support".')
    with torch.inference_mode(False), locked(model):
        copy = copied(model)
        uses = resolved(model, norm)
        if isinstance(uses, ByLayer):
            for name, module in copy.named_modules():
                if name not in uses.frozen:
                    hide(module)
    return (use_batch_statistics(copy) if uses == "batch" else copy).eval()


def classes_of(labels: Tree) -> int:
    """The number of classes C of a support set.

    Raises:
        TypeError: for targets that are not class indices ``[S]``.
        ValueError: for labels that do not run from 0 to C-1, naming the first class without a point.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
        got = f"{list(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"a classifier needs class indices [S] of each task's support set; got {got}.")
    present = set(labels.tolist())
    missing = sorted(set(range(max(present, default=0) + 1)) - present)
    if missing or min(present, default=-1) < 0:
        raise ValueError(
            f"the labels of a support set must be 0..C-1, with at least one point of each class; got "
            f"{sorted(present)[:10]}."
        )
    return len(present)
