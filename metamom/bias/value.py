"""Operators as values: equal if created with equal arguments, and printed as the call that creates them."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import numpy as np
from torch import Tensor


class Value:
    """An object that is defined by its constructor arguments, each stored in the attribute of the same name.

    If one is not stored, the object equals only itself, and prints as ``Name(...)``.
    """

    def _arguments(self) -> dict[str, Any] | None:
        """The constructor's arguments by name; ``None`` if one does not have an attribute of its name."""
        names, kept = _parameters(type(self)), vars(self)
        return {name: kept[name] for name in names} if all(name in kept for name in names) else None

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return False
        mine, others = self._arguments(), other._arguments()
        if mine is None or others is None:
            return self is other
        return all(_equal(value, others[name]) for name, value in mine.items())

    def __hash__(self) -> int:
        arguments = self._arguments()
        if arguments is None:
            return object.__hash__(self)
        plain = tuple(value for value in arguments.values() if not isinstance(value, Tensor))  # tensors hash by id
        try:
            return hash((type(self), plain))
        except TypeError:  # an argument such as a list is not hashable; equal operators still get equal hashes
            return hash(type(self))

    def __repr__(self) -> str:
        kept, given = vars(self), []
        for name, parameter in _parameters(type(self)).items():
            if name not in kept:
                return f"{type(self).__name__}(...)"
            if not _equal(kept[name], parameter.default):
                given.append(_BEFORE.get(parameter.kind, f"{name}=") + repr(kept[name]))
        return f"{type(self).__name__}({', '.join(given)})"


_BEFORE: dict[Any, str] = {Parameter.POSITIONAL_ONLY: "", Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}


def _parameters(kind: type[object]) -> Mapping[str, Parameter]:
    """The constructor's parameters."""
    return signature(kind).parameters


def _equal(a: object, b: object) -> bool:
    """Whether two arguments are equal. Tensors and arrays are compared as a whole, not entry by entry."""
    if isinstance(a, (Tensor, np.ndarray)) or isinstance(b, (Tensor, np.ndarray)):
        return a is b or (type(a) is type(b) and np.array_equal(np.asarray(a), np.asarray(b)))
    return a is b or bool(a == b)
