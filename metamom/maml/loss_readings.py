"""What a loss function takes predictions and targets for, seen while it is called.

Legend: N points of one task, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from metamom.maml.class_scores import ClassScores, Reading, tensors_among
from metamom.maml.functions_by_task import by_task
from metamom.maml.pairings import Pairings

LossFn = Callable[[Tensor, Tensor], Tensor]

KEPT = 64  # readings, those used last


class LossReadings:
    """What loss functions were seen to take their arguments for, by the shapes of these; the last ones seen.

    A compiled meta-gradient calls the loss when it is traced, and later goes by what was seen then.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[LossFn, Reading]] = {}
        # that pair predictions and targets as they should, and whether they call what is replaced
        self._fine: dict[Hashable, tuple[LossFn, bool]] = {}

    def watched(self, loss_fn: LossFn) -> LossFn:
        """The same loss function of one task, whose calls are watched.

        With values as targets, the shapes decide what there is to see: once a loss has been watched for some shapes, it
        runs as it is. What it does with labels is looked at in each call.

        Raises:
            ValueError: on calling it, where it would broadcast targets against predictions of another shape.
        """

        def loss(predictions: Any, targets: Tensor) -> Tensor:
            leaves = [x for x in pytree.tree_leaves(predictions) if isinstance(x, Tensor)]
            seen = _seen(loss_fn, leaves, targets)
            fine = self._fine.get(seen)
            if fine is not None and not fine[1] and targets.is_floating_point():
                try:
                    return loss_fn(predictions, targets)
                except RuntimeError:  # it may do something else by now, which is watched below
                    fine = None
            with LossWatch(leaves, targets, pairs=fine is None) as watch:
                value = loss_fn(predictions, targets)
            _remember(self._fine, seen, (loss_fn, watch.replaced))
            if isinstance(predictions, Tensor):
                key = _key(loss_fn, predictions.shape, targets.shape)
                _remember(self._kept, key, (loss_fn, watch.reading()))
            return value

        return loss

    def of(self, loss_fn: LossFn, predictions: Tensor, targets: Tensor) -> Reading:
        """What was seen for ``[T, N, ...]`` of such shapes."""
        found = self._kept.get(_key(loss_fn, predictions.shape[1:], targets.shape[1:]))
        return Reading("unknown") if found is None else found[1]

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks for itself."""
        return {"_kept": {}, "_fine": {}}


class LossWatch(TorchFunctionMode):
    """Watches a loss function of one task, and replaces functions that vmap does otherwise than a loop.

    Args:
        predictions: the tensors that a model returns, ``[N, ...]``.
        targets: ``[N, ...]``.
        pairs: whether to look how they are paired.

    Attributes:
        replaced: whether a call has been replaced.
    """

    def __init__(self, predictions: Sequence[Tensor], targets: Tensor, *, pairs: bool = True) -> None:
        super().__init__()
        self.replaced = False
        self._pairings = Pairings(predictions, targets) if pairs else None
        # a reading is of labels, and of one tensor
        judged = len(predictions) == 1 and not targets.is_floating_point()
        self._scores = ClassScores(predictions[0], targets) if judged else None

    def reading(self) -> Reading:
        """What was seen, if it is one thing."""
        return Reading("unknown") if self._scores is None else self._scores.reading()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = _first_two(args, kwargs)
        tensors = tensors_among([*args, *kwargs.values()])
        if self._pairings is not None:
            self._pairings.check(func, tensors)
        other = by_task(func)
        self.replaced |= other is not None
        out = (other or func)(*args, **kwargs)
        if self._pairings is not None:
            self._pairings.follow(func, first, tensors, out)
        if self._scores is not None:
            self._scores.see(func, first, kwargs, tensors, out)
        return out


def _first_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments by position: of torch's functions the first two often come by name."""
    found = list(args)
    for names in (("input", "self"), ("target", "other", "dim", "index"))[len(args) :]:
        found += [kwargs[name] for name in names if name in kwargs][:1]
    return tuple(found)


def _key(loss_fn: LossFn, predictions: Sequence[int], targets: Sequence[int]) -> Hashable:
    """The number of points may differ from set to set. What is kept holds the function, so that its id is its own."""
    return id(loss_fn), len(predictions), tuple(predictions[1:]), len(targets), tuple(targets[1:])


def _seen(loss_fn: LossFn, predictions: Sequence[Tensor], targets: Tensor) -> Hashable:
    """What decides how a loss function pairs its arguments: with the number of points, for one point pairs anyhow."""
    mode = getattr(loss_fn, "training", None)
    return id(loss_fn), mode, targets.shape, *(p.shape for p in predictions)


def _remember(kept: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    """Keep the values used last."""
    kept.pop(key, None)
    kept[key] = value
    if len(kept) > KEPT:
        kept.pop(next(iter(kept)), None)
