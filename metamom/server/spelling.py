"""The text form of robust means and attacks: ``NAME:NUMBER:option=NUMBER``. Their records declare it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from metamom.common.did_you_mean import did_you_mean
from metamom.common.numbers import real, short, shown, whole

Made = TypeVar("Made")


class Argument(NamedTuple):
    """A number in the text.

    Attributes:
        keyword: of the record's constructor.
        kind: ``int`` or ``float``.
        shown: its name in the help and in errors.
        needed: whether it must be given.
        named: whether it is written ``keyword=NUMBER``, after the others.
    """

    keyword: str
    kind: type[int] | type[float]
    shown: str
    needed: bool = True
    named: bool = False


@dataclass(frozen=True)
class Kind(Generic[Made]):
    """What a name stands for.

    Attributes:
        make: creates the record from its arguments as keywords; it checks their ranges.
        arguments: in the order in which they are written.
        more: further names for the same.
    """

    make: Callable[..., Made]
    arguments: tuple[Argument, ...]
    more: tuple[str, ...] = ()


def known(kinds: Mapping[str, Kind[Made]]) -> dict[str, Kind[Made]]:
    """The kinds by all of their names."""
    return {**kinds, **{name: kind for kind in kinds.values() for name in kind.more}}


def made(kinds: Mapping[str, Kind[Made]], text: str, what: str) -> Made:
    """Parse ``NAME:NUMBER:option=NUMBER``.

    Args:
        kinds: what there is, by name.
        text: to parse; spaces around it are ignored.
        what: it is, for errors: ``"attack"``.

    Raises:
        ValueError: for an unknown name, and for arguments that are missing, unknown or out of range.
    """
    names = known(kinds)
    name, *words = text.strip(" ").split(":")
    if name not in names:
        raise ValueError(
            f"{what} must be {', '.join(spelled(each, kind) for each, kind in kinds.items())}; got {shown(text)}"
            f"{did_you_mean([name], names) or '.'}"
        )
    kind = names[name]
    try:
        return kind.make(**_arguments(name, kind.arguments, words))
    except ValueError as error:
        raise ValueError(f"{what} {shown(text)}: {error}") from error


def spelled(name: str, kind: Kind[Made]) -> str:
    """The text form with names for numbers, such as ``multi-krum:F[:M]``."""
    parts = []
    for each in kind.arguments:
        part = f":{each.keyword}={each.shown}" if each.named else f":{each.shown}"
        parts.append(part if each.needed else f"[{part}]")
    return name + "".join(parts)


def text(name: str, *numbers: float, **options: float | None) -> str:
    """The text of a record; options that are ``None`` are left out."""
    named = [f"{key}={short(value)}" for key, value in options.items() if value is not None]
    return ":".join([name, *map(short, numbers), *named])


def _arguments(name: str, arguments: Sequence[Argument], words: Sequence[str]) -> dict[str, Any]:
    """The values by keyword."""
    found: dict[str, Any] = {}
    positional = [each for each in arguments if not each.named]
    named = {each.keyword: each for each in arguments if each.named}
    for number, word in enumerate(words):
        key, equals, value = word.partition("=")
        argument = named.get(key.strip(" ")) if equals else next(iter(positional[number : number + 1]), None)
        if argument is None:
            options = ", ".join(f"{each}=N" for each in named) or "no options"
            raise ValueError(f"{name} takes {len(positional)} numbers and {options}; got {shown(word)}.")
        if argument.keyword in found:
            raise ValueError(f"{name} has {argument.keyword} twice.")
        try:
            found[argument.keyword] = argument.kind(
                (whole if argument.kind is int else real)(value if equals else word)
            )
        except ValueError as error:
            raise ValueError(f"{name}'s {argument.shown}: {error}") from None
    missing = [each.shown for each in arguments if each.needed and each.keyword not in found]
    if missing:
        raise ValueError(f"{name} needs {' and '.join(missing)} after a colon.")
    return found
