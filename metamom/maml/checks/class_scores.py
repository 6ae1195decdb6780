"""How a loss function interprets predictions, found by watching how it uses them.

Shapes alone do not determine it. ``[N, 3]`` with ``[N]`` whole numbers may be scores of 3 classes, distances to them,
quantiles of a count, or an embedding. ``[N, 5, 5]`` may be scores of 5 classes along either axis. Predictions are taken
as class scores if the loss passes them to one of torch's classification losses, normalises them by a softmax and
indexes them by the labels, or compares them with one-hot labels.

Legend: N points of one task, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.nn import functional as F

OF_CLASSES = (F.cross_entropy, F.nll_loss, F.multi_margin_loss)
OF_LOGITS = (F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss)
BINARY = (*OF_LOGITS, F.binary_cross_entropy)
DISTANCES = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
DIFFERENCES = ("sub", "subtract", "__sub__", "__rsub__", "rsub")
# Functions that keep each entry's meaning and position, and functions that keep its meaning if no entry is lost.
SOFTMAX = ("log_softmax", "softmax")
IN_PLACE = ("float", "double", "half", "bfloat16", "to", "type_as", "contiguous", "clone", *SOFTMAX)
SCALING = ("div", "true_divide", "__truediv__", "mul", "__mul__", "__rmul__")  # by a positive number: a temperature
SHIFTING = ("sub", "subtract", "__sub__", "add", "__add__", "__radd__")
OF_LABELS = ("long", "int", "clamp", "clamp_min", "masked_fill", "expand", "expand_as", "broadcast_to")
RESHAPING = (
    "squeeze", "unsqueeze", "view", "view_as", "reshape", "reshape_as", "flatten", "ravel", "__getitem__", "select",
    "transpose", "permute", "movedim", "moveaxis", "swapaxes", "t", "__get__",
)  # fmt: skip
PICKING = ("gather", "take_along_dim", "take", "index_select", "__getitem__")
FOLLOWED = frozenset((*IN_PLACE, *RESHAPING))
FOLLOWED_LABELS = frozenset((*FOLLOWED, *OF_LABELS, "broadcast_tensors"))
NORMALISING = frozenset((*SOFTMAX, "logsumexp"))
WITHOUT_VALUES = ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_full", "size")


class Reading(NamedTuple):
    """How a loss function interprets its arguments.

    Attributes:
        kind: ``"classes"`` for class scores; ``"logit"`` or ``"probability"`` for one number a target, that of class 1;
            ``"unknown"`` for anything else.
        axis: the class axis of one task's predictions ``[N, ...]``.
        ignored: a label that the loss ignores.
    """

    kind: Literal["classes", "logit", "probability", "unknown"]
    axis: int = 1
    ignored: int | None = None


UNKNOWN = Reading("unknown")


def class_axes(predictions: Sequence[int], targets: Sequence[int]) -> list[int]:
    """The possible class axes of one task's predictions: the second (torch's convention), the last, or both.

    Example:
        >>> class_axes((5, 3), (5,)), class_axes((5, 3, 7, 7), (5, 7, 7)), class_axes((5, 7, 3), (5, 7))
        ([1], [1], [2])
        >>> class_axes((5, 7, 7), (5, 7)), class_axes((5, 1), (5, 1))
        ([1, 2], [])
    """
    last = len(predictions) - 1
    may = [1] if last == 1 else [1, last] if last > 1 else []
    return [axis for axis in may if (*predictions[:axis], *predictions[axis + 1 :]) == tuple(targets)]


class ClassScores:
    """Follows one task's predictions and targets through a loss function to find how it interprets them.

    Args:
        predictions: ``[N, ...]``.
        targets: ``[N, ...]``.
    """

    def __init__(self, predictions: Tensor, targets: Tensor) -> None:
        self.predictions, self.targets = predictions, targets
        self._scores = {id(predictions): True}  # the value: whether the entries are still in place
        self._shifted: set[int] = set()  # scores that keep only their order, not a threshold
        self._probabilities: set[int] = set()  # of logits
        self._exponentials: set[int] = set()  # of scores
        self._labels = {id(targets)}
        self._one_hot: set[int] = set()  # labels as vectors with the largest entry at the label
        self._units: set[int] = set()  # rows of the unit matrix
        self._of_scores, self._of_labels = {id(predictions)}, {id(targets)}  # everything computed from them
        self._kept: list[Any] = [predictions, targets]  # kept alive, so that ids are not reused
        self._found: list[Reading] = []  # from torch's own losses
        self._normalised: set[int | None] = set()  # the class axes of softmaxes
        self._picked = False  # whether labels have indexed something computed from scores

    def reading(self) -> Reading:
        """The interpretation, if everything seen agrees on one."""
        if self._found:
            return self._found[0] if len(set(self._found)) == 1 else UNKNOWN
        axis = next(iter(self._normalised)) if len(self._normalised) == 1 else None
        return Reading("classes", axis) if axis is not None and self._picked else UNKNOWN

    def see(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: Sequence[Tensor],
        out: Any,
    ) -> None:
        """Observe one call.

        Args:
            func: the function that was called.
            args: its arguments; the first two are always positional here.
            kwargs: its other arguments.
            tensors: all tensors among them, also those in lists.
            out: the result.
        """
        name = getattr(func, "__name__", "")
        a, b = args[:2] if len(args) > 1 else (args[0] if args else None, None)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            self._compare(func, name, a, b, args, kwargs)
        if isinstance(a, Tensor):
            self._normalise(name, a, b if isinstance(b, int) else kwargs.get("dim"))
        self._pick(name, tensors)
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self._derive(name, tensors, x)
                self._follow(name, a, b, args, x)

    # what is seen

    def _compare(
        self, func: Any, name: str, a: Tensor, b: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Observe a function of two tensors that may be scores and labels."""
        one_hot = a if id(a) in self._one_hot else b if id(b) in self._one_hot else None
        if one_hot is not None and (func in (F.cross_entropy, *BINARY, *DISTANCES) or name in DIFFERENCES):
            scores = b if one_hot is a else a
            known = id(scores) in self._scores or id(scores) in self._probabilities
            if known and scores.shape == one_hot.shape:
                axes = self._axes()
                self._found.append(Reading("classes", axes[0]) if len(axes) == 1 else UNKNOWN)
        elif func in OF_CLASSES:
            at = 4 if func is not F.multi_margin_loss else None  # the position of ignore_index
            positional = args[at] if at is not None and len(args) > at else None
            self._classes(a, b, kwargs.get("ignore_index", positional))
        elif func in BINARY:
            self._binary(a, b, probabilities=func is F.binary_cross_entropy)

    def _classes(self, scores: Tensor, labels: Tensor, ignored: int | None) -> None:
        if labels.is_floating_point():  # probabilities of the classes
            return
        axis = self._axis(scores, 1 if scores.dim() > 1 else 0) if id(labels) in self._labels else None
        self._found.append(UNKNOWN if axis is None else Reading("classes", axis, ignored))

    def _binary(self, scores: Tensor, labels: Tensor, probabilities: bool) -> None:
        logits = id(scores) in (self._probabilities if probabilities else self._scores)
        if id(labels) not in self._labels or not (logits or id(scores) in self._scores):
            return
        one_each = [n for n in self.predictions.shape if n != 1] == [n for n in self.targets.shape if n != 1]
        if not one_each or id(scores) in self._shifted:
            self._found.append(UNKNOWN)
        else:
            self._found.append(Reading("logit") if logits else Reading("probability"))

    def _normalise(self, name: str, x: Tensor, dim: Any) -> None:
        """Observe a softmax of scores along their class axis, or its denominator."""
        of_scores = name in NORMALISING and id(x) in self._scores
        if not of_scores and not (name == "sum" and id(x) in self._exponentials):
            return
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        self._normalised.add(self._axis(x, dim % x.dim()) if isinstance(dim, int) and x.dim() else None)

    def _pick(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Observe labels that select entries of something computed from scores, as indices or one-hot vectors."""
        size = self.predictions.numel()
        scores = [x for x in tensors if id(x) in self._of_scores and id(x) not in self._of_labels]
        if name in PICKING:
            whole = bool(tensors) and id(tensors[0]) in self._of_scores and tensors[0].numel() == size
            self._picked |= whole and any(id(y) in self._labels for y in tensors[1:])
        elif any(x.numel() == size for x in scores):
            labels = [y for y in tensors if id(y) in self._of_labels and id(y) not in self._of_scores]
            self._picked |= any(y.numel() == size for y in labels)

    def _axis(self, scores: Tensor, dim: int) -> int | None:
        """The axis of the predictions behind an axis of derived scores; ``None`` if it cannot be the class axis."""
        placed, shape = self._scores.get(id(scores)), self.predictions.shape
        if id(scores) in self._exponentials:
            placed = True
        if placed is None or scores.dim() < 2:
            return None
        if placed and scores.shape == shape:
            fits = dim > 0 and self.predictions.numel() == shape[dim] * self.targets.numel()
            return dim if fits else None
        axes = [axis for axis in self._axes() if shape[axis] == scores.shape[dim]]
        return axes[0] if len(axes) == 1 else None

    def _axes(self) -> list[int]:
        return class_axes(self.predictions.shape, self.targets.shape)

    # what is followed

    def _derive(self, name: str, tensors: Sequence[Tensor], out: Tensor) -> None:
        if name in WITHOUT_VALUES:
            return
        for of in (self._of_scores, self._of_labels):
            if any(id(x) in of for x in tensors):
                of.add(id(out))
                self._kept.append(out)

    def _follow(self, name: str, a: Any, b: Any, args: Sequence[Any], out: Tensor) -> None:
        self._follow_labels(name, a, b, args, out)
        if not isinstance(a, Tensor) or out.numel() != a.numel():
            return
        scaled = name in SCALING and isinstance(b, (int, float)) and b > 0
        name = "clone" if scaled else name
        placed = self._scores.get(id(a))
        if placed is not None and name in FOLLOWED:
            self._scores[id(out)] = placed and name in IN_PLACE
        if placed is not None and (name in SOFTMAX or id(a) in self._shifted):
            self._shifted.add(id(out))
        if placed is not None and isinstance(b, Tensor) and name in SHIFTING and self._same_for_classes(a, b):
            self._scores[id(out)] = placed
            self._shifted.add(id(out))
        if placed is not None and name == "exp":
            self._exponentials.add(id(out))
        if (name == "sigmoid" and placed is not None) or (name in RESHAPING and id(a) in self._probabilities):
            self._probabilities.add(id(out))
        self._kept.append(out)

    def _follow_labels(self, name: str, a: Any, b: Any, args: Sequence[Any], out: Tensor) -> None:
        labels = id(a) in self._labels
        if labels and name in FOLLOWED_LABELS:
            self._labels.add(id(out))
        if name == "where" and len(args) > 2 and any(id(y) in self._labels for y in args[1:3]):
            self._labels.add(id(out))
        if name == "broadcast_tensors" and any(id(y) in self._labels for y in args) and not out.is_floating_point():
            self._labels.add(id(out))
        if name == "eye" or (name in IN_PLACE and id(a) in self._units):
            self._units.add(id(out))
        made = (labels and name == "one_hot") or (
            id(a) in self._units and name == "__getitem__" and id(b) in self._labels
        )
        if name in ("scatter", "scatter_") and len(args) > 3 and id(args[2]) in self._labels:
            made = isinstance(args[3], (int, float)) and args[3] > 0
        if id(a) in self._one_hot:
            number = isinstance(b, (int, float))
            made = name in FOLLOWED or (number and (b > 0 if name in SCALING else name in SHIFTING))
        if made:
            self._one_hot.add(id(out))
            self._of_labels.add(id(out))
        self._kept.append(out)

    def _same_for_classes(self, scores: Tensor, shift: Tensor) -> bool:
        """Whether a shift added to scores is the same for all classes, and so keeps their order."""
        if scores.dim() != shift.dim():
            return False
        sizes = zip(shift.shape, scores.shape, strict=True)
        axes = [axis for axis, (one, n) in enumerate(sizes) if one == 1 and n > 1]
        return len(axes) == 1 and self._axis(scores, axes[0]) is not None


def tensors_among(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among arguments, also those in lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [x for x in value if isinstance(x, Tensor)]
    return found
