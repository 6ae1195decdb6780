"""Keys of caches that compare objects by identity."""

from __future__ import annotations

from collections.abc import Hashable
from types import MethodType


class Same:
    """Equal to another one of the same object, which stays alive."""

    __slots__ = ("thing",)

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def by_identity(thing: object) -> Hashable:
    """A key for an object of any class; a dataclass has no hash, or one of its fields, which may change.

    Most objects are their own keys, which Python compares faster.
    """
    kind = type(thing)
    return thing if kind.__eq__ is object.__eq__ or kind is MethodType else Same(thing)
