"""How operators are spelled: each one's record stands beside its class, and parser, help and tables come of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import NamedTuple, TypeVar

from metamom.bias.base import BiasOperator
from metamom.common import tables

Made = TypeVar("Made", bound=type[BiasOperator])


class Row(NamedTuple):
    """A row of the table of operators in the documentation, in Markdown.

    Attributes:
        spec: examples of the spelling.
        python: the calls that make them.
        contraction: alpha_c, or what the operator is instead.
        message: bytes of a worker's message for d entries in float32.
    """

    spec: str
    python: str
    contraction: str
    message: str


class Spelling(NamedTuple):
    """An operator's spelling.

    Attributes:
        name: in front of the first colon.
        make: the operator, from the argument, if any, and the options as keywords.
        meaning: in a few words.
        argument: its name.
        number: what kind it is, ``None`` for none.
        share: whether a percentage may stand in its place, as ``ratio=``.
        options: that may follow, by their names in `metamom.bias.spec.OPTIONS`.
        rows: of the table of operators.
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
    """The spelling of an operator around another, A: ``NAME:A``, or ``NAME(ARGUMENT):A``.

    Attributes:
        name: in front of the colon, or of the bracket.
        make: of the inner operator, and the argument.
        meaning: in a few words.
        argument: the name of a number in brackets, if any.
        rows: of the table of operators.
    """

    name: str
    make: Callable[..., BiasOperator]
    meaning: str
    argument: str = ""
    rows: tuple[Row, ...] = ()


class Joined(NamedTuple):
    """The spelling of a composition, which is no class's own."""

    spelling: str
    meaning: str
    rows: tuple[Row, ...]


JOINED = Joined(
    "A+B",
    "A, then B on what it leaves",
    (Row("`clip:1+topk:5%`", "`Compose(Clip(1), TopK(ratio=0.05))`", "unknown", "the last one's"),),
)
SPELLINGS: dict[str, Spelling] = {}
AROUND: dict[str, Around] = {}


def spelled(
    name: str,
    meaning: str,
    *rows: Row,
    argument: str = "",
    number: type[int] | type[float] | None = None,
    share: bool = False,
    options: tuple[str, ...] = (),
) -> Callable[[Made], Made]:
    """A decorator that gives an operator's class a `Spelling`, whose attributes the arguments are."""

    def register(kind: Made) -> Made:
        SPELLINGS[name] = Spelling(name, kind, meaning, argument, number, share, options, rows)
        return kind

    return register


def spelled_around(name: str, meaning: str, *rows: Row, argument: str = "") -> Callable[[Made], Made]:
    """A decorator that gives the class of an operator around another its `Around`."""

    def register(kind: Made) -> Made:
        AROUND[name] = Around(name, kind, meaning, argument, rows)
        return kind

    return register


@cache
def load_all() -> None:
    """Import every module of operators, so that their spellings are known."""
    package = import_module("metamom.bias")
    for module in iter_modules(package.__path__):
        import_module(f"metamom.bias.{module.name}")


def single_spellings() -> list[Spelling]:
    """Those of operators by themselves, none first, then by name."""
    load_all()
    return sorted(SPELLINGS.values(), key=lambda each: (each.name != "none", each.name))


def operator_table() -> str:
    """The operators in Markdown, as the documentation has them."""
    head = Row("`--bias`", "in Python", "contraction α_c, or what it is instead", "bytes for d float32 entries")
    rows = [row for each in single_spellings() for row in each.rows]
    rows += [JOINED.rows[0], *(row for each in AROUND.values() for row in each.rows)]
    return "\n".join([*tables.head(*head), *(tables.row(*row) for row in rows)])
