"""Detect losses that broadcast predictions against targets of another shape.

If predictions or targets lack an axis, broadcasting pairs each prediction with each target: ``[N, 1] - [N]`` is
``[N, N]``. Such a loss trains without an error but is wrong. Predictions and targets are followed through the loss
function through elementwise operations, column slices and reshapes. Pairing them by broadcasting is an error.

Pairing all with all is accepted if the loss itself adds axes to both, as in ``p[:, None] - y[None]``, or calls
`torch.cdist`.

Legend: N points of one task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, zip_longest
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

# Elementwise functions, which broadcast. These expect equal shapes, but torch only warns if shapes differ.
OF_ONE_SHAPE = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
BY_ENTRY = (
    *OF_ONE_SHAPE,
    F.poisson_nll_loss,
    F.gaussian_nll_loss,
    F.kl_div,
    F.soft_margin_loss,
    F.hinge_embedding_loss,
    F.margin_ranking_loss,
)
# The same for tensor methods, by torch's name for them, with the name to show in an error.
PAIRED = {
    **dict.fromkeys(("sub", "subtract", "rsub", "__sub__", "__rsub__", "sub_"), "the difference between"),
    **dict.fromkeys(("add", "__add__", "__radd__", "add_"), "the sum of"),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__", "mul_"), "the product of"),
    **dict.fromkeys(
        ("div", "divide", "true_divide", "__truediv__", "__rtruediv__", "__rdiv__", "div_"), "the quotient of"
    ),
    **dict.fromkeys(("pow", "__pow__", "__rpow__", "xlogy"), "a power or logarithm of"),
    **dict.fromkeys(("dist", "cosine_similarity", "pairwise_distance"), "the distance or angle between"),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), "the larger or smaller of"),
    **dict.fromkeys(
        ("lt", "le", "gt", "ge", "eq", "ne", "__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"),
        "a comparison of",
    ),
    "where": "a choice between",
    "broadcast_tensors": "one shape for",
}
REPEATING = ("expand", "expand_as", "broadcast_to", "repeat", "tile")
# Functions that only move or select entries.
MOVING = (
    "squeeze", "unsqueeze", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "select",
    "transpose", "permute", "movedim", "moveaxis", "swapaxes", "t", "narrow", "chunk", "split", "unbind",
    "tensor_split", "__get__",
)  # fmt: skip
REDUCING = ("sum", "mean", "norm", "vector_norm", "logsumexp", "amax", "amin", "prod")


class _Entries(NamedTuple):
    """A tensor that holds entries of the predictions or of the targets.

    Attributes:
        tensor: kept alive, so that its id is not reused.
        root: the original predictions or targets.
        predicted: whether the root is predictions.
        shape: its shape, with 1 for the axes that it has been repeated along.
        given: whether the loss has added axes to it.
    """

    tensor: Tensor
    root: Tensor
    predicted: bool
    shape: tuple[int, ...]
    given: bool = False


class Pairings:
    """Follows predictions and targets of one task through a loss function.

    Args:
        predictions: tensors ``[N, ...]``.
        targets: ``[N, ...]``.
    """

    def __init__(self, predictions: Sequence[Tensor], targets: Tensor) -> None:
        self._found: dict[int, _Entries] = {}
        for root in (targets, *predictions):  # predictions that are the targets themselves never pair wrongly
            self._keep(_Entries(root, root, root is not targets, tuple(root.shape)))

    def check(self, func: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        """Refuse a call that pairs predictions and targets wrongly.

        Args:
            func: the function that is called.
            tensors: the tensors among its arguments, in order.

        Raises:
            ValueError: with the shapes that are paired, and what to do.
        """
        by_entry = func in BY_ENTRY
        name = getattr(func, "__name__", "")
        if not by_entry and name not in PAIRED:
            return
        if by_entry and func is not F.margin_ranking_loss:
            tensors = tensors[:2]  # the rest are weights and variances
        entries = [found for x in tensors if (found := self._found.get(id(x))) is not None and x.dim() > 0]
        for a, b in combinations(entries, 2):
            if a.predicted == b.predicted:
                continue
            differ = func in OF_ONE_SHAPE and a.tensor.shape != b.tensor.shape and not (a.given and b.given)
            if differ or _all_pairs(a, b):
                meant = "" if not differ else ", if need be by expand_as"
                raise ValueError(_refusal(f"{name} of" if by_entry else PAIRED[name], a, b, meant))

    def follow(self, func: Callable[..., Any], arguments: Sequence[Any], tensors: Sequence[Tensor], out: Any) -> None:
        """Follow the result of a call.

        Args:
            func: the function that was called.
            arguments: its arguments, with the axes second.
            tensors: the tensors among the arguments, in order.
            out: the result.
        """
        entries = [self._found.get(id(x)) for x in tensors]
        if not any(entries):
            return
        name = getattr(func, "__name__", "")
        if name == "broadcast_tensors":
            for given, x in zip(entries, out, strict=False):
                if given is not None:
                    self._keep(given._replace(tensor=x, shape=_padded(given.shape, x.dim())))
            return
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self._follow_one(name, arguments, entries, x)

    def _follow_one(self, name: str, args: Sequence[Any], entries: Sequence[_Entries | None], out: Tensor) -> None:
        first = entries[0]
        alone = len(entries) == 1 or name.endswith("_as")
        if first is not None and alone and name in REPEATING:
            once = _padded(first.shape, out.dim())
            sizes = zip(once, out.shape, strict=True)
            self._keep(first._replace(tensor=out, shape=tuple(1 if n == 1 else size for n, size in sizes)))
        elif first is not None and alone and self._moves(name, args, first.tensor, out):
            given = _ones(out) > _ones(first.tensor) or (first.given and _ones(out) > 0)
            self._keep(first._replace(tensor=out, shape=tuple(out.shape), given=given))
        else:
            known = [x for x in entries if x is not None]
            same = all(x.predicted == known[0].predicted and x.tensor.shape == out.shape for x in known)
            if same and (len(known) == len(entries) or name in PAIRED):
                shape = tuple(map(max, zip(*(x.shape for x in known), strict=True)))
                self._keep(known[0]._replace(tensor=out, shape=shape, given=any(x.given for x in known)))

    def _moves(self, name: str, args: Sequence[Any], given: Tensor, out: Tensor) -> bool:
        """Whether the result of a call still has entries that belong to single points."""
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in index) and not isinstance(
                index[0], int
            )
        if name == "select":
            return out.shape[:1] == given.shape[:1]
        if name in REDUCING:
            return 0 < out.dim() <= given.dim() and out.shape[0] == given.shape[0] and 0 not in _dims(args, given)
        return name in MOVING

    def _keep(self, entries: _Entries) -> None:
        self._found[id(entries.tensor)] = entries


def _dims(args: Sequence[Any], given: Tensor) -> list[int]:
    """The axes of a reduction; all axes if its arguments do not show them."""
    dims = args[1] if len(args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) for d in dims):
        return list(range(given.dim()))
    return [d % given.dim() for d in dims]


def _padded(shape: Sequence[int], dims: int) -> tuple[int, ...]:
    return (*[1] * (dims - len(shape)), *shape)


def _ones(x: Tensor) -> int:
    return sum(n == 1 for n in x.shape)


def _all_pairs(a: _Entries, b: _Entries) -> bool:
    """Whether broadcasting two tensors exceeds the size of the larger one, without the loss having added axes."""
    sizes = list(zip_longest(reversed(a.shape), reversed(b.shape), fillvalue=0))
    if math.prod(max(pair) for pair in sizes) <= max(math.prod(a.shape), math.prod(b.shape)):
        return False
    lacks = any(0 in pair and max(pair) > 1 for pair in sizes)
    return lacks or not (a.given and b.given)


def _refusal(what: str, a: _Entries, b: _Entries, meant: str) -> str:
    p, y = (tuple(x.root.shape) for x in ((a, b) if a.predicted else (b, a)))
    advice = f"Give both the same shape{meant}"
    if p == (*y, 1):
        advice = "Give targets their last axis, y.unsqueeze(-1), or let the model drop its own, out.squeeze(-1)"
    elif y == (*p, 1):
        advice = "Let the model keep its last axis, out.unsqueeze(-1), or drop the targets', y.squeeze(-1)"
    how = "" if a.tensor is a.root and b.tensor is b.root else _as_paired(a, b)
    return (
        f"the loss takes {what} predictions of shape {list(p)} and targets of shape {list(y)} for each task, which "
        f"broadcasting would pair wrongly{how}. {advice}."
    )


def _as_paired(a: _Entries, b: _Entries) -> str:
    p, y = (list(x.shape) for x in ((a, b) if a.predicted else (b, a)))
    return f", as {p} and {y}"
