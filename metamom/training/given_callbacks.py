"""The argument ``callbacks`` of `metamom.train`: callbacks, and objects that have some of their methods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from metamom.common.kinds import named_type
from metamom.training.callbacks import Callback

EVENTS = ("on_start", "on_step", "on_validation", "on_end")
STATE = ("state_dict", "load_state_dict")


class Borrowed(Callback):
    """A callback with the methods of an object of another class; those that it lacks do nothing.

    Args:
        given: has some of the methods `EVENTS`. Its state is saved if it has both methods of `STATE`.
    """

    def __init__(self, given: Any) -> None:
        self._given = given
        for name in (*EVENTS, *(STATE if all(map(given_methods(given).__contains__, STATE)) else ())):
            if name in given_methods(given):
                setattr(self, name, getattr(given, name))

    @property
    def kind(self) -> type:
        """The class of the object."""
        return type(self._given)


def given_methods(given: object) -> list[str]:
    """The methods of a callback that an object has."""
    return [name for name in (*EVENTS, *STATE) if callable(getattr(given, name, None))]


def as_callbacks(callbacks: object) -> list[Callback]:
    """Convert one callback or several to a list; ``None`` is none.

    Raises:
        TypeError: for a class, and for an object without any of a callback's methods.
    """
    if callbacks is None:
        return []
    if _is_callback(callbacks):
        return [_callback(callbacks)]
    wanted = "callbacks are one or a list of metamom.training.Callback, such as EarlyStopping(patience=5)"
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"{wanted}, or objects with a method {_or(EVENTS)}; got {callbacks!r:.80}.")
    found = list(callbacks)
    for each in found:
        if not _is_callback(each):
            kind = named_type(each)
            raise TypeError(f"{wanted}, or objects with a method {_or(EVENTS)}; got {kind}.")
    return [_callback(each) for each in found]


def _is_callback(given: object) -> bool:
    return not isinstance(given, type) and any(name in EVENTS for name in given_methods(given))


def _callback(given: Any) -> Callback:
    return given if isinstance(given, Callback) else Borrowed(given)


def _or(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"
