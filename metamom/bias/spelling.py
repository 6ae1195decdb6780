"""Records of operators' SPECs, declared next to each class. The parser, help and tables are derived from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import NamedTuple, TypeVar

from metamom.bias.base import BiasOperator
from metamom.common import tables
from metamom.common.spec_table import joined_spelling

Made = TypeVar("Made", bound=type[BiasOperator])


class Row(NamedTuple):
    """A row of the table of operators in the documentation, in Markdown.

    Attributes:
        spec: examples of SPECs.
        python: the calls that create the same operators.
        contraction: alpha_c, or a description of an operator without one.
        message: bytes of a worker's message for d entries in float32.
    """

    spec: str
    python: str
    contraction: str
    message: str


class Spelling(NamedTuple):
    """The SPEC of an operator.

    Attributes:
        name: the part before the first colon.
        make: creates the operator from the argument, if any, and the options as keywords.
        meaning: a short description.
        argument: the argument's name.
        number: the argument's type; ``None`` without an argument.
        share: whether a percentage is accepted instead, as ``ratio=``.
        options: the options that may follow, by their names in `metamom.bias.spec.OPTIONS`.
        rows: its rows in the table of operators.
    """

    name: str
    make: Callable[..., BiasOperator]
    meaning: str
    argument: str = ""
    number: type[int] | type[float] | None = None
    share: bool = False
    options: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()


class Around(NamedTuple):
    """The SPEC of an operator that wraps another one, A: ``NAME:A``, or ``NAME(ARGUMENT):A``.

    Attributes:
        name: the part before the colon or bracket.
        make: creates the operator from the inner operator and the argument.
        meaning: a short description.
        argument: the name of the number in brackets, if any, or the names of several, with commas.
        rows: its rows in the table of operators.
        least: how many of these numbers are required, 0 for all.
    """

    name: str
    make: Callable[..., BiasOperator]
    meaning: str
    argument: str = ""
    rows: tuple[Row, ...] = ()
    least: int = 0


class Joined(NamedTuple):
    """The SPEC of operators in a row, A and B.

    Attributes:
        spelling: an example, with names for the operators.
        make: creates the operator from those in the row.
        meaning: a short description.
        rows: its rows in the table of operators.
    """

    spelling: str
    make: Callable[..., BiasOperator]
    meaning: str
    rows: tuple[Row, ...] = ()


SPELLINGS: dict[str, Spelling] = {}
AROUND: dict[str, Around] = {}
JOINED: dict[str, Joined] = {}  # by the sign between the operators


def spelled(
    name: str,
    meaning: str,
    *rows: Row,
    argument: str = "",
    number: type[int] | type[float] | None = None,
    share: bool = False,
    options: tuple[str, ...] = (),
) -> Callable[[Made], Made]:
    """A decorator that gives an operator's class a `Spelling` with these attributes."""

    def register(kind: Made) -> Made:
        SPELLINGS[name] = Spelling(name, kind, meaning, argument, number, share, options, rows)
        return kind

    return register


def spelled_around(name: str, meaning: str, *rows: Row, argument: str = "", least: int = 0) -> Callable[[Made], Made]:
    """A decorator that gives the class of a wrapping operator its `Around`."""

    def register(kind: Made) -> Made:
        AROUND[name] = Around(name, kind, meaning, argument, rows, least)
        return kind

    return register


def spelled_between(sign: str, meaning: str, *rows: Row) -> Callable[[Made], Made]:
    """A decorator that gives the class of operators in a row its `Joined`, with this sign between two of them."""

    def register(kind: Made) -> Made:
        JOINED[sign] = Joined(joined_spelling(sign), kind, meaning, rows)
        return kind

    return register


@cache
def load_all() -> None:
    """Import every module of operators, to register their SPECs."""
    package = import_module("metamom.bias")
    for module in iter_modules(package.__path__):
        import_module(f"metamom.bias.{module.name}")


def single_spellings() -> list[Spelling]:
    """The SPECs of single operators: ``none`` first, then those with an argument, then the others; each by name."""
    load_all()
    return sorted(SPELLINGS.values(), key=lambda each: (each.name != "none", not each.argument, each.name))


def operator_table() -> str:
    """The documentation's table of operators, in Markdown."""
    head = Row("`--bias`", "in Python", "contraction α_c, or what it is instead", "bytes for d float32 entries")
    rows = [row for each in single_spellings() for row in each.rows]
    rows += [row for joined in JOINED.values() for row in joined.rows]
    rows += [row for around in AROUND.values() for row in around.rows]
    return "\n".join([*tables.head(*head), *(tables.row(*row) for row in rows)])
