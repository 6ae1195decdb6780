"""Range checks that several theorems share, and their error messages.

Every public function of `metamom.theory` is decorated with `as_stated`: it raises ValueError for numbers out of range,
TypeError for anything but a number, and no other error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache, wraps
from inspect import signature
from math import inf, isnan
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from metamom.common.kinds import with_article

P = ParamSpec("P")
R = TypeVar("R")


def as_stated(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function: check its arguments against their annotations, and raise only the documented errors.

    Whole numbers given as floats become integers. Overflow during the computation, or a NaN result, is a ValueError.
    """
    parameters = signature(function)

    @cache
    def hints() -> dict[str, Any]:
        return get_type_hints(function)

    @wraps(function)
    def stated(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = parameters.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in hints():
                bound.arguments[name] = _argument(name, value, hints()[name])
        try:
            result = function(*bound.args, **bound.kwargs)
        except (OverflowError, ZeroDivisionError) as error:
            raise ValueError(_out_of_floats(function, str(error))) from error
        numbers = result if isinstance(result, tuple) else (result,)
        if any(isinstance(number, float) and isnan(number) for number in numbers):
            raise ValueError(_out_of_floats(function, "the result is NaN"))
        return result

    return stated


def _out_of_floats(function: Callable[..., Any], what: str) -> str:
    return (
        f"{function.__name__} leaves the floating-point range with these arguments ({what}). Change the units, so "
        "that the arguments are closer to 1."
    )


def _argument(name: str, value: Any, hint: Any) -> Any:
    """Return an argument if its type matches the annotation."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if choices:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")
        return value
    if not any(_is_a(value, kind) for kind in kinds):
        wanted = " or ".join(_WORDS.get(kind) or with_article(kind.__name__) for kind in kinds)
        raise TypeError(f"{name} must be {wanted}; got {value!r}.")
    if int in kinds and (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        return int(value)
    return value


_WORDS: dict[Any, str] = {float: "a number", int: "a whole number", NoneType: "None"}


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is accepted for an annotation of this type."""
    if kind in (int, float):
        return isinstance(value, (Real, Tensor))
    if get_origin(kind) is not None:  # a generic of numbers, or of values that are checked where they are used
        return isinstance(value, Collection) and not isinstance(value, (str, Mapping))
    return isinstance(value, kind)


def positive(**numbers: float) -> None:
    """Refuse numbers that are not > 0 and finite."""
    for name, value in numbers.items():
        if not 0 < value < inf:
            raise ValueError(f"{name} must be > 0 and finite; got {value!r}.")


def not_negative(**numbers: float) -> None:
    """Refuse numbers that are not >= 0 and finite."""
    for name, value in numbers.items():
        if not 0 <= value < inf:
            raise ValueError(f"{name} must be >= 0 and finite; got {value!r}.")


def weight(**numbers: float) -> None:
    """Refuse numbers outside (0, 1]: momentum weights and contractions."""
    for name, value in numbers.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1]; got {value!r}. 1 means no memory, or no compression.")


def share(**numbers: float) -> None:
    """Refuse numbers outside (0, 1)."""
    for name, value in numbers.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must be in (0, 1), ends excluded; got {value!r}.")


def counts(**numbers: int) -> None:
    """Refuse anything but whole numbers >= 1."""
    for name, value in numbers.items():
        if not 1 <= value <= 2**53 or value != int(value):
            raise ValueError(f"{name} must be a whole number, 1 <= {name} <= 2^53; got {value!r}.")


def finite(**numbers: Any) -> None:
    """Refuse infinities and NaN."""
    for name, value in numbers.items():
        if not _is_a(value, float):
            raise TypeError(f"{name} must be a number; got {value!r}.")
        if not -inf < value < inf:
            raise ValueError(f"{name} must be finite; got {value!r}.")


def horizon(K: float) -> None:
    """Refuse anything but a number of steps; infinity is allowed."""
    if not K >= 1:
        raise ValueError(f"K must be a number of steps >= 1, or math.inf for the limit; got {K!r}.")


def step(gamma: float, limit: float, why: str) -> None:
    """Refuse a step size outside (0, limit]. The limit itself is accepted, whatever its rounding."""
    if not 0 < gamma <= limit * (1 + 1e-12):
        raise ValueError(
            f"{why} needs 0 < gamma <= {limit:.6g}; got gamma={gamma!r}. Choose a step size in that range."
        )


def room(left: float, used: str, advice: str) -> float:
    """Return the denominator ``1 - used`` of a bound; refuse one that is not positive."""
    if not left > 0:
        raise ValueError(f"the bound needs {used} < 1; got {1 - left:.6g}, so nothing is guaranteed. {advice}")
    return left
