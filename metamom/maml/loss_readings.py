"""What a loss function takes predictions and targets for, seen while it is called.

Shapes alone do not say it: ``[Q, 5, 5]`` may be scores of 5 classes along either axis, one number a point a logit, a
probability or a value, and a label one to ignore. So torch's own losses are watched where a loss function calls them.

Legend: N points of one task, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metamom.maml.functions_by_task import one_hot

LossFn = Callable[[Tensor, Tensor], Tensor]

# By entries: torch broadcasts what differs in shape, and at most warns.
BY_ENTRY = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.poisson_nll_loss,
    F.kl_div,
    F.soft_margin_loss,
    F.hinge_embedding_loss,
)
DIFFERENCE = "the difference between"
# The same of two tensors, by the names that torch calls them by, and what each is called in an error.
PAIRED = {
    **dict.fromkeys(("sub", "subtract", "rsub", "__sub__", "__rsub__", "sub_"), DIFFERENCE),
    **dict.fromkeys(("add", "__add__", "__radd__", "add_"), "the sum of"),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__", "mul_"), "the product of"),
    **dict.fromkeys(
        ("div", "divide", "true_divide", "__truediv__", "__rtruediv__", "__rdiv__", "div_"), "the quotient of"
    ),
    **dict.fromkeys(("dist", "cosine_similarity", "pairwise_distance"), "the distance or angle between"),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), "the larger or smaller of"),
}
# What leaves each entry's meaning and place, and what leaves its meaning alone, as long as no entry is lost.
IN_PLACE = ("float", "double", "half", "bfloat16", "to", "type_as", "contiguous", "clone", "log_softmax", "softmax")
SCALING = ("div", "true_divide", "__truediv__", "mul", "__mul__", "__rmul__")  # by a positive number: a temperature
OF_LABELS = ("long", "int")
RESHAPING = (
    "squeeze", "unsqueeze", "view", "view_as", "reshape", "reshape_as", "flatten", "ravel", "__getitem__", "select",
    "transpose", "permute", "movedim", "moveaxis", "swapaxes",
)  # fmt: skip
KEPT = 16  # readings, those used last


class Reading(NamedTuple):
    """What a loss function takes its arguments for.

    Attributes:
        kind: ``"classes"``, scores of classes; ``"logit"`` or ``"probability"`` of class 1, one a target;
            ``"unknown"``, class scores of another kind.
        axis: the class axis of one task's predictions ``[N, ...]``.
        ignored: a label that does not count.
    """

    kind: Literal["classes", "logit", "probability", "unknown"]
    axis: int = 1
    ignored: int | None = None


class LossReadings:
    """What loss functions were seen to take their arguments for, by the shapes of these; the last ones seen.

    A compiled meta-gradient calls the loss when it is traced, and later goes by what was seen then.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[LossFn, Reading | None]] = {}

    def watched(self, loss_fn: LossFn) -> LossFn:
        """The same loss function of one task, whose calls are watched where there is something to see.

        Raises:
            ValueError: on calling it, where it would broadcast targets against predictions of another shape.
        """

        def loss(predictions: Tensor, targets: Tensor) -> Tensor:
            tensors = isinstance(predictions, Tensor) and isinstance(targets, Tensor)
            if not tensors or (predictions.shape == targets.shape and targets.is_floating_point()):
                return loss_fn(predictions, targets)
            with _Watch(predictions, targets) as watch:
                value = loss_fn(predictions, targets)
            key = _key(loss_fn, predictions.shape, targets.shape)
            self._kept.pop(key, None)
            self._kept[key] = loss_fn, watch.reading()
            if len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
            return value

        return loss

    def of(self, loss_fn: LossFn, predictions: Tensor, targets: Tensor) -> Reading | None:
        """What was seen for ``[T, N, ...]`` of such shapes; ``None`` where torch's losses told nothing."""
        found = self._kept.get(_key(loss_fn, predictions.shape[1:], targets.shape[1:]))
        return None if found is None else found[1]

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks for itself."""
        return {"_kept": {}}


def class_axes(predictions: Sequence[int], targets: Sequence[int]) -> list[int]:
    """Which axes of one task's predictions may be their class axis: the second, torch's own, or the last.

    Example:
        >>> class_axes((5, 3), (5,)), class_axes((5, 3, 7, 7), (5, 7, 7)), class_axes((5, 7, 3), (5, 7))
        ([1], [1], [2])
        >>> class_axes((5, 7, 7), (5, 7)), class_axes((5, 1), (5, 1))
        ([1, 2], [])
    """
    last = len(predictions) - 1
    may = [1] if last == 1 else [1, last] if last > 1 else []
    return [axis for axis in may if (*predictions[:axis], *predictions[axis + 1 :]) == tuple(targets)]


def _key(loss_fn: LossFn, predictions: Sequence[int], targets: Sequence[int]) -> Hashable:
    """The number of points may differ from set to set. What is kept holds the function, so that its id is its own."""
    return id(loss_fn), len(predictions), tuple(predictions[1:]), len(targets), tuple(targets[1:])


class _Watch(TorchFunctionMode):
    """Follows one task's predictions and targets through a loss function, and sees torch's losses called."""

    def __init__(self, predictions: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.predictions = predictions
        self.targets = targets
        self.scores = [(predictions, True)]  # and whether the entries are where they were
        self.labels = [targets]
        self.probabilities: list[Tensor] = []  # of logits
        self.found: list[Reading] = []
        # what was computed of one of them entry by entry, themselves among it
        self.of_predictions = [predictions]
        self.of_targets = [] if targets is predictions else [targets]

    def reading(self) -> Reading | None:
        """What was seen, if it is one thing."""
        return next(iter(self.found), None) if len(set(self.found)) < 2 else Reading("unknown")

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        a, b = args[:2] if len(args) > 1 else (None, None)
        pair = isinstance(a, Tensor) and isinstance(b, Tensor)
        if pair and func in BY_ENTRY and _grows(a, b) and self._of_both(a, b):
            raise ValueError(self._broadcast(f"{func.__name__} of"))
        out = (one_hot if func is F.one_hot else func)(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if pair and func in (F.cross_entropy, F.nll_loss):
            self._classes(a, b, kwargs.get("ignore_index"))
        elif pair and func in (F.binary_cross_entropy_with_logits, F.binary_cross_entropy):
            self._binary(a, b, probabilities=func is F.binary_cross_entropy)
        elif pair and name in PAIRED and _grows(a, b):
            reshaped = PAIRED[name] == DIFFERENCE and self._of_both(a, b)
            if reshaped or self._made_of_both(a, b):
                raise ValueError(self._broadcast(PAIRED[name]))
        if isinstance(out, Tensor):
            self._derive(out, [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)])
        if isinstance(out, Tensor) and args and isinstance(args[0], Tensor) and out.numel() == args[0].numel():
            scaled = name in SCALING and isinstance(b, (int, float)) and b > 0
            self._follow("clone" if scaled else name, args[0], out)
        return out

    def _follow(self, name: str, given: Tensor, out: Tensor) -> None:
        placed = self._placed(given)
        if placed is not None and name in (*IN_PLACE, *RESHAPING):
            self.scores.append((out, placed and name in IN_PLACE))
        if name in (*IN_PLACE, *OF_LABELS, *RESHAPING) and _among(given, self.labels):
            self.labels.append(out)
        if (name == "sigmoid" and placed is not None) or (name in RESHAPING and _among(given, self.probabilities)):
            self.probabilities.append(out)

    def _placed(self, x: Tensor) -> bool | None:
        """Whether the entries of predictions are where they were; ``None`` for other tensors."""
        return next((placed for scores, placed in self.scores if scores is x), None)

    def _of_both(self, a: Tensor, b: Tensor) -> bool:
        """Whether one is the predictions and the other the targets, with an axis at least."""
        one_of_each = any(
            self._placed(p) is not None and _among(y, self.labels) and y.dim() > 0 for p, y in ((a, b), (b, a))
        )
        return one_of_each and self.predictions is not self.targets

    def _derive(self, out: Tensor, given: Sequence[Tensor]) -> None:
        """Follow what is computed entry by entry of predictions alone, or of targets alone."""
        for of in (self.of_predictions, self.of_targets):
            if given and all(_among(x, of) and x.shape == out.shape for x in given):
                of.append(out)
                return

    def _made_of_both(self, a: Tensor, b: Tensor) -> bool:
        """Whether one was computed of the predictions and the other of the targets, with an axis at least."""
        p, y = self.of_predictions, self.of_targets
        return (_among(a, p) and _among(b, y) and b.dim() > 0) or (_among(b, p) and _among(a, y) and a.dim() > 0)

    def _classes(self, scores: Tensor, labels: Tensor, ignored: int | None) -> None:
        if labels.is_floating_point():  # probabilities of the classes
            return
        placed = self._placed(scores)
        axis: int | None = None
        if not _among(labels, self.labels):
            pass
        elif placed and scores.shape == self.predictions.shape:
            axis = 1 if scores.dim() > 1 else None
        elif placed is not None and scores.dim() > 1:
            axes = class_axes(self.predictions.shape, self.targets.shape)
            axes = [axis for axis in axes if self.predictions.shape[axis] == scores.shape[1]]
            axis = axes[0] if len(axes) == 1 else None
        self.found.append(Reading("unknown") if axis is None else Reading("classes", axis, ignored))

    def _binary(self, scores: Tensor, labels: Tensor, probabilities: bool) -> None:
        logits = _among(scores, self.probabilities) if probabilities else self._placed(scores) is not None
        if not _among(labels, self.labels) or not (logits or self._placed(scores) is not None):
            return
        one_each = [n for n in self.predictions.shape if n != 1] == [n for n in self.targets.shape if n != 1]
        self.found.append(Reading("logit" if logits else "probability") if one_each else Reading("unknown"))

    def _broadcast(self, what: str) -> str:
        p, y = tuple(self.predictions.shape), tuple(self.targets.shape)
        cure = "Give both one shape"
        if p == (*y, 1):
            cure = "Give targets their last axis, y.unsqueeze(-1), or let the model drop its own, out.squeeze(-1)"
        elif y == (*p, 1):
            cure = "Let the model keep its last axis, out.unsqueeze(-1), or drop the targets', y.squeeze(-1)"
        return (
            f"the loss takes {what} predictions of shape {list(p)} and targets of shape {list(y)} for each task, which "
            f"broadcasting would pair wrongly. {cure}."
        )


def _grows(a: Tensor, b: Tensor) -> bool:
    """Whether broadcasting would make more of two tensors than the larger one has: pairs that nobody meant."""
    sizes = zip_longest(reversed(a.shape), reversed(b.shape), fillvalue=1)
    return math.prod(max(pair) for pair in sizes) > max(a.numel(), b.numel())


def _among(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    return any(x is y for y in tensors)
