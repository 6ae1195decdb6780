"""A linear head from the mean features of each class.

Legend: T tasks, S support points, D features, C classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metamom.batch import TaskBatch
from metamom.common.kinds import named_type
from metamom.common.trees import Tree
from metamom.compile.tracing import is_tracing
from metamom.maml.estimators import InnerBatch
from metamom.maml.predicting import predictions
from metamom.maml.problem import Problem
from metamom.maml.task_weights import Start


class LinearHead(NamedTuple):
    """Weight ``[T, C, D]`` and bias ``[T, C]`` of a linear layer for each task."""

    weight: Tensor
    bias: Tensor


def nearest_prototype(features: Tensor, labels: Tensor, classes: int, mask: Tensor | None = None) -> LinearHead:
    """The linear layer with the scores ``2 c_k . f - |c_k|^2``, with c_k the mean feature of class k.

    They are ``|f|^2 - |f - c_k|^2``: their softmax is that of minus the squared distances to the prototypes.

    Args:
        features: ``[T, S, D]``.
        labels: ``[T, S]`` class indices; points with another number do not count.
        classes: C.
        mask: the points that count, ``[T, S]``; all by default.

    Example:
        >>> head = nearest_prototype(torch.tensor([[[1.0], [3.0], [4.0]]]), torch.tensor([[0, 0, 1]]), 2)
        >>> head.weight, head.bias
        (tensor([[[4.],
                 [8.]]]), tensor([[ -4., -16.]]))

    Reference:
        Snell, Swersky, Zemel, "Prototypical networks for few-shot learning" (2017), section 2.4.
    """
    of_class = _of_class(labels, classes, mask).to(features.dtype)  # [T, S, C]
    means = of_class.mT @ features / of_class.sum(1).unsqueeze(-1)
    return LinearHead(2 * means, -means.square().sum(-1))


class FromPrototypes(NamedTuple):
    """Starts the head of each task at `nearest_prototype` of its support set, differentiable in the body.

    Attributes:
        head: the name of a linear layer.
        weight: the name of its weight among the model's parameters.
        bias: the name of its bias.
        classes: C, the number of its outputs.
    """

    head: str
    weight: str
    bias: str
    classes: int

    def start(self, problem: Problem, start: Start, first: InnerBatch) -> Start:
        """The start with each task's head, and the other weights as tensors that it does not depend on.

        So a gradient in the body, at a fixed head, does not flow through the prototypes.
        """
        if not is_tracing():
            self._check("support", first.y, first.mask)
        target = InputOf(problem.model, self.head)
        features = predictions(problem, start.at(0), start.own, first.x, first.mask, target=target)
        weight, bias = nearest_prototype(features, first.y, self.classes, first.mask)
        own = {name: w.view_as(w) for name, w in start.own.items()}
        return start._replace(own=own | {self.weight: weight, self.bias: bias})

    def check(self, batch: TaskBatch) -> None:
        """Refuse support sets without labels, or without a point of some class.

        Raises:
            ValueError: saying which task and class.
        """
        self._check("the batch", batch.support_y, batch.support_mask)

    def _check(self, place: str, labels: Tree, mask: Tensor | None) -> None:
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 2:
            got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else named_type(labels)
            raise ValueError(
                f"ProtoMAML makes its head from the classes of the support points: support_y must be class indices "
                f"[T, S], integers; got {got}. Use MAML for other tasks."
            )
        missing = _of_class(labels, self.classes, mask).sum(1) == 0
        if missing.any():
            task, label = missing.nonzero()[0].tolist()
            raise ValueError(
                f"ProtoMAML needs a support point of each of the {self.classes} classes that the head {self.head!r} "
                f"has; task {task} has none of class {label}. Use a model with as many outputs as the tasks have ways."
            )


class InputOf:
    """Calls a model, and returns the features ``[N, D]`` that one of its layers got.

    Args:
        model: the model.
        layer: the name of the layer.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        self.model, self.layer = model, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The features.

        Raises:
            ValueError: unless the model calls the layer once, with one vector a point.
        """
        seen: list[Any] = []
        module = self.model.get_submodule(self.layer)
        had, forward = module.__dict__.get("forward"), module.forward

        def recording(*given: Any, **named: Any) -> Any:
            seen.append(given[0] if len(given) == 1 and not named else None)
            return forward(*given, **named)

        module.__dict__["forward"] = recording
        try:
            self.model(*args, **kwargs)
        finally:
            module.__dict__.pop("forward")
            if had is not None:
                module.__dict__["forward"] = had
        if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].dim() != 2:
            got = [list(each.shape) if isinstance(each, Tensor) else named_type(each) for each in seen]
            raise ValueError(
                f"ProtoMAML needs a model that calls its head {self.layer!r} once, with one vector a point, [N, D]; "
                f"it was called {len(seen)} times, with {got}. Name another layer with head=."
            )
        return seen[0]


def _of_class(labels: Tensor, classes: int, mask: Tensor | None) -> Tensor:
    """Whether each point counts for each class, ``[T, S, C]``."""
    found = labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)
    return found if mask is None else found & mask.unsqueeze(-1)
