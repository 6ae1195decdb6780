"""The identity operator, operators from functions, and conversion of ``bias=`` arguments to operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.coordinates import Coordinates
from metamom.bias.spec import parse
from metamom.bias.spelling import Row, spelled


@spelled("none", "no bias", Row("`none`", "`Identity()`", "1", "4d"))
class Identity(BiasOperator):
    """``C(g) = g``: no bias."""

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        return rows

    def _contraction(self, d: int) -> float | None:
        return 1.0

    @property
    def spec(self) -> str:
        """``none``."""
        return "none"


class Function(BiasOperator):
    """An operator from a user's function of one gradient.

    Args:
        function: ``[d] -> [d]``; called separately for each worker's gradient.

    Raises:
        TypeError: if it is not callable; when called, if the function does not return a tensor.
        ValueError: when called, if the function returns another shape.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        if not callable(function):
            raise TypeError(
                'a bias is an operator, a SPEC such as "topk:5%", or a function Tensor[d] -> Tensor[d]; got '
                f"{function!r}."
            )
        self.function = function

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        return torch.stack([self._one(g) for g in rows])

    def _one(self, gradient: Tensor) -> Tensor:
        out = self.function(gradient.clone())  # the function may change it in place
        if not isinstance(out, Tensor):
            raise TypeError(f"{self.spec} must return a tensor; got {type(out).__name__}.")
        if out.shape != gradient.shape:
            raise ValueError(f"{self.spec} must keep the shape {tuple(gradient.shape)}; got {tuple(out.shape)}.")
        return out

    @property
    def spec(self) -> str:
        """The function's name."""
        return function_name(self.function)


def function_name(function: object) -> str:
    """The name of a function, or of a callable object's class. For a lambda it does not include where it is defined."""
    name = str(getattr(function, "__qualname__", type(function).__qualname__))
    return "<lambda>" if name.endswith(".<lambda>") else name


Bias = BiasOperator | Callable[[Tensor], Tensor] | str | None
"""What ``bias=`` takes: an operator, a function ``[d] -> [d]``, a SPEC such as ``"topk:5%"``, or nothing."""


def as_operator(bias: Bias) -> BiasOperator | None:
    """Convert ``bias`` to an operator: an operator itself, a SPEC such as ``"topk:5%"``, a function, or ``None``.

    A SPEC creates a new operator each time.

    Raises:
        TypeError: if it is none of these.
        ValueError: for a SPEC that `metamom.bias.parse` refuses.
    """
    if isinstance(bias, type):
        raise TypeError(f"a bias is an operator, such as {bias.__name__}(...); got the class {bias.__name__} itself.")
    if isinstance(bias, str):
        return parse(bias)
    return bias if bias is None or isinstance(bias, BiasOperator) else Function(bias)


def inner_operator(operator: BiasOperator | str, wanted: str, *, starts: bool = False) -> BiasOperator:
    """Convert an operator or SPEC to one that another operator can wrap, also one that keeps ``starts`` (PowerSGD).

    Raises:
        TypeError: for anything but an operator, and for one with error feedback, with what is ``wanted``.
        ValueError: as `as_operator`.
    """
    made = as_operator(operator) if isinstance(operator, str) else operator
    if not isinstance(made, BiasOperator) or (made.feeds_back and not (starts and made.keeps_start)):
        start = made if isinstance(made, BiasOperator) and made.keeps_start else None
        instead = f" Take it with fresh=True, to keep nothing: {start.spec}:fresh." if start is not None else ""
        raise TypeError(f"{wanted}; got {operator!r}.{instead}")
    return made


def without_state(bias: Bias) -> BiasOperator | None:
    """`as_operator` for a single step. A SPEC must not name an operator that keeps state for the next step.

    Raises:
        TypeError: as `as_operator`.
        ValueError: as `as_operator`, and for such a SPEC.
    """
    operator = as_operator(bias)
    if isinstance(bias, str) and operator is not None and operator.state_dict():
        raise ValueError(
            f"bias={bias!r} would be a new operator at each step, but it carries a state from step to step (errors, or "
            f"a count of draws): make it once, operator = metamom.bias.parse({bias!r}), and pass bias=operator."
        )
    return operator
