"""How a loss function interprets predictions and targets, found while it is called.

Legend: N points of one task, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as every_module
from torch.overrides import TorchFunctionMode

from metamom.common.held import held
from metamom.common.trees import Tree, leaves, lone
from metamom.maml.checks.batch_checks import IGNORED
from metamom.maml.checks.class_scores import ClassScores, Reading, tensors_among
from metamom.maml.checks.pairings import Pairings
from metamom.maml.under_vmap.caught_errors import handles_errors, refuse
from metamom.maml.under_vmap.functions_by_task import FINE_IN_A_LOOP, by_task
from metamom.maml.under_vmap.losses_by_task import cross_entropy

LossFn = Callable[..., Tensor]
"""``(predictions, targets) -> loss``, or ``(predictions) -> loss`` for batches without targets."""

KEPT = 64  # the number of most recent readings to keep


class LossReadings:
    """A cache of how loss functions interpret their arguments, by argument shape. It keeps the most recent ones.

    A compiled meta-gradient calls the loss only while it is traced, and later uses the reading from then.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[LossFn, Reading]] = {}
        # losses that pair predictions and targets correctly, and whether to watch them: they call replaced functions,
        # or may catch errors
        self._fine: dict[Hashable, tuple[LossFn, bool]] = {}

    def watched(self, loss_fn: LossFn, once: bool = False) -> LossFn:
        """Wrap a loss function of one task so that its calls are watched.

        If the targets are values, the outcome depends only on shapes: once a loss has been watched for some shapes, it
        runs unwrapped. If they are labels, each call is watched.

        Args:
            loss_fn: the loss of one task.
            once: whether the wrapper is called for tasks of the same shapes one after the other, so that watching the
                first is enough.

        Raises:
            ValueError: when it is called, if it would broadcast targets against predictions of another shape.
        """

        known = False

        def loss(predictions: Any, *given: Tree, **options: Any) -> Tensor:
            nonlocal known
            if known:
                return loss_fn(predictions, *given, **options)
            scores, targets = leaves(held(predictions)), lone(given)
            if targets is None:  # a tree of targets, or none: what the loss makes of it cannot be followed
                with LossWatch(scores, None) as watch:
                    value = loss_fn(predictions, *given, **options)
                watch.refuse_caught()
                return value
            seen = _seen(loss_fn, scores, targets)
            fine = self._fine.get(seen)
            if fine is not None and self._is_known(loss_fn, scores, targets) and not options:
                known = once
                return loss_fn(predictions, *given) if once else _cross_entropy(loss_fn, predictions, targets)
            if fine is not None and not fine[1] and targets.is_floating_point():
                try:
                    return loss_fn(predictions, *given, **options)
                except RuntimeError:  # it may have changed, so watch it again below
                    fine = None
            with LossWatch(scores, targets, pairs=fine is None) as watch:
                value = loss_fn(predictions, *given, **options)
            watch.refuse_caught()
            _remember(self._fine, seen, (loss_fn, watch.replaced or handles_errors(loss_fn)))
            known = once and not watch.changed
            if len(scores) == 1:
                key = _key(loss_fn, scores[0].shape, targets.shape)
                _remember(self._kept, key, (loss_fn, watch.reading()))
            return value

        return loss

    def _is_known(self, loss_fn: LossFn, scores: Sequence[Tensor], targets: Tensor) -> bool:
        """Whether a loss is PyTorch's cross entropy, and was watched for labels of these shapes.

        It depends on nothing else that a call could change.
        """
        if not is_cross_entropy(loss_fn) or targets.is_floating_point() or len(scores) != 1:
            return False
        kept = self._kept.get(_key(loss_fn, scores[0].shape, targets.shape))
        ignored = getattr(loss_fn, "ignore_index", IGNORED)
        return kept is not None and kept[1].kind == "classes" and kept[1].ignored == ignored

    def of(self, loss_fn: LossFn, predictions: Tensor, targets: Tensor) -> Reading:
        """The reading for predictions ``[T, N, ...]`` and targets of these shapes."""
        found = self._kept.get(_key(loss_fn, predictions.shape[1:], targets.shape[1:]))
        return Reading("unknown") if found is None else found[1]

    def __getstate__(self) -> dict[str, Any]:
        """Copies start without any readings."""
        return {"_kept": {}, "_fine": {}}


class LossWatch(TorchFunctionMode):
    """Watches a loss function of one task, and replaces functions that vmap computes differently from a loop.

    Args:
        predictions: the tensors that a model returns, ``[N, ...]``.
        targets: ``[N, ...]``; ``None`` only replaces functions.
        pairs: whether to check how they are paired.

    Attributes:
        replaced: whether a call has been replaced.
        changed: whether one has that differs in a loop over the tasks too.
    """

    def __init__(self, predictions: Sequence[Tensor], targets: Tensor | None, *, pairs: bool = True) -> None:
        super().__init__()
        self.replaced = self.changed = False
        self._raised: Exception | None = None
        self._pairings = Pairings(predictions, targets) if pairs and targets is not None else None
        # a reading needs labels and a single tensor of predictions
        judged = len(predictions) == 1 and targets is not None and not targets.is_floating_point()
        self._scores = ClassScores(predictions[0], targets) if judged and targets is not None else None

    def reading(self) -> Reading:
        """The interpretation, if everything seen agrees on one."""
        return Reading("unknown") if self._scores is None else self._scores.reading()

    def refuse_caught(self) -> None:
        """Refuse an error that the loss has caught on all tasks at once.

        Raises:
            VmapError: naming it.
        """
        if torch._C._functorch.peek_interpreter_stack() is not None:
            refuse("the loss", self._raised)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        try:
            return self._called(func, args, kwargs or {})
        except Exception as error:
            self._raised = error
            raise

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        first = _first_two(args, kwargs)
        tensors = tensors_among([*args, *kwargs.values()])
        if self._pairings is not None:
            self._pairings.check(func, tensors)
        other = by_task(func)
        self.replaced |= other is not None
        self.changed |= other is not None and func not in FINE_IN_A_LOOP
        out = (other or func)(*args, **kwargs)
        if self._pairings is not None:
            self._pairings.follow(func, first, tensors, out)
        if self._scores is not None:
            self._scores.see(func, first, kwargs, tensors, out)
        return out


def is_cross_entropy(loss_fn: LossFn) -> bool:
    """Whether a loss is `torch.nn.functional.cross_entropy`, or PyTorch's module without hooks."""
    if not isinstance(loss_fn, nn.Module):
        return loss_fn is F.cross_entropy
    hooks = every_module._global_forward_hooks, every_module._global_forward_pre_hooks
    own = loss_fn._forward_hooks, loss_fn._forward_pre_hooks
    return type(loss_fn) is nn.CrossEntropyLoss and "forward" not in vars(loss_fn) and not any((*hooks, *own))


def _cross_entropy(loss_fn: LossFn, predictions: Tensor, targets: Tensor) -> Tensor:
    """What such a loss returns under vmap, called without the mode that watches it."""
    if not isinstance(loss_fn, nn.CrossEntropyLoss):
        return cross_entropy(predictions, targets)
    return cross_entropy(
        predictions,
        targets,
        weight=loss_fn.weight,
        ignore_index=loss_fn.ignore_index,
        reduction=loss_fn.reduction,
        label_smoothing=loss_fn.label_smoothing,
    )


def _first_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments with the first two by position, which calls of torch's functions often pass by name."""
    found = list(args)
    for names in (("input", "self"), ("target", "other", "dim", "index"))[len(args) :]:
        found += [kwargs[name] for name in names if name in kwargs][:1]
    return tuple(found)


def _key(loss_fn: LossFn, predictions: Sequence[int], targets: Sequence[int]) -> Hashable:
    """The key of a reading, without the number of points, which may vary. Stored functions stay alive for their ids."""
    return id(loss_fn), len(predictions), tuple(predictions[1:]), len(targets), tuple(targets[1:])


def _seen(loss_fn: LossFn, predictions: Sequence[Tensor], targets: Tensor) -> Hashable:
    """The key of a pairing check. It includes the number of points, since a single point can be paired either way."""
    mode = getattr(loss_fn, "training", None)
    return id(loss_fn), mode, targets.shape, *(p.shape for p in predictions)


def _remember(kept: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    """Store a value, and drop the oldest one if the cache is full."""
    kept.pop(key, None)
    kept[key] = value
    if len(kept) > KEPT:
        kept.pop(next(iter(kept)), None)
