"""SPECs of bias operators: the parser, its errors and the help, derived from the operators' own records."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple, TypeVar

from metamom.bias.base import BiasOperator
from metamom.bias.checks import check_seed
from metamom.bias.spelling import AROUND, JOINED, SPELLINGS, Around, Spelling, load_all, single_spellings
from metamom.common.did_you_mean import did_you_mean
from metamom.common.numbers import real, shown, whole
from metamom.common.spec_table import around_spelling, spec_table
from metamom.common.spec_table import single_spellings as spellings_of

N = TypeVar("N", int, float)

LONGEST = 3000  # characters of a SPEC
MOST = 20  # operators in a composition; both limits are far beyond any real use


class Option(NamedTuple):
    """An option that may follow an operator after a colon: its keyword, value and meaning.

    If the value is a number, the operator, or ``check``, refuses values out of range.
    """

    keyword: str
    value: bool | str | type[int] | type[float]
    meaning: str
    check: Callable[[Any], None] | None = None

    @property
    def number(self) -> type[int] | type[float] | None:
        """The type of its value after an equals sign, if it has one."""
        return self.value if isinstance(self.value, type) else None


OPTIONS: dict[str, Option] = {
    "tensor": Option("per_tensor", True, "act on each parameter tensor separately"),
    "all": Option("ties", "all", "keep all entries equal to the K-th largest, not the first alone"),
    "scaled": Option("scaled", True, "multiply kept entries by d/K, which makes it unbiased"),
    "shared": Option("shared", True, "the same entries for all workers"),
    "geometric": Option("geometric", float, "levels with probabilities N, N^2, ... instead of adaptive ones"),
    "bits": Option("bits", int, "bits of the finest level (8 unless given)"),
    "eta": Option("eta", float, "weight of a new gradient in the workers' momentum"),
    "server": Option("server", float, "weight of a message in the server's estimates (1 unless given)"),
    "noise": Option("noise", float, "standard deviation of Gaussian noise on each entry"),
    "nearest": Option("nearest", True, "round to the nearest power of two, without draws"),
    "clip": Option("clip", float, "first limit entries to N times their root mean square (2.5 in the paper)"),
    "block": Option("block", int, "entries of a block (2048 unless given)"),
    "dynamic": Option("dynamic", True, "codes of seven decades, instead of evenly spaced ones"),
    "random": Option("random", True, "round at random, which makes it unbiased"),
    "fresh": Option("fresh", True, "start at a new random matrix each time, keeping nothing"),
    "seed": Option("seed", int, "seed of the draws (0 unless given)", check_seed),
}
_AROUND = re.compile(r"(?P<name>[a-z0-9-]+)(?:\((?P<argument>[^)]*)\))?:(?P<inner>.*)")


def parse(spec: str) -> BiasOperator:
    """Parse a SPEC into an operator.

    ``+`` composes, with the left operator applied first. Error feedback wraps everything after it. Options follow after
    colons; `spec_help` lists everything.

    Args:
        spec: printable ASCII, at most 3,000 characters and 20 operators. Spaces around operators are ignored.

    Returns:
        A new operator; its own ``spec`` parses to an equal one.

    Raises:
        ValueError: for an unknown or malformed SPEC, naming the part that is wrong.

    Example:
        >>> parse("clip:1+topk:5%")
        Compose(Clip(max_norm=1.0), TopK(ratio=0.05))
        >>> parse("ef21-sgdm(0.1):topk:1%")
        EF21SGDM(TopK(ratio=0.01), eta=0.1)
    """
    load_all()
    try:
        return _any(_plain(spec).strip(" "))
    except (ValueError, TypeError) as error:
        raise ValueError(f"bias operator {shown(spec)}: {error}") from error


def spellings() -> list[str]:
    """Every spelling without its options, such as ``topk:K``."""
    singles = [text for each in single_spellings() for text in _spelled(each)]
    return [*singles, *(each.spelling for each in JOINED.values()), *map(_around, AROUND.values())]


def spec_help() -> str:
    """A table of operators and options, at most 100 columns wide."""
    rows = [("  ".join(_spelled(each)), each.meaning, _options(each.options)) for each in single_spellings()]
    rows += [(each.spelling, each.meaning, "") for each in JOINED.values()]
    rows += [(_around(each), each.meaning, "") for _, each in sorted(AROUND.items())]
    return spec_table(rows, [(_options((name,)), option.meaning) for name, option in OPTIONS.items()])


def _spelled(each: Spelling) -> list[str]:
    return spellings_of(each.name, each.argument, each.share)


def _around(each: Around) -> str:
    return around_spelling(each.name, each.argument)


def _options(names: tuple[str, ...]) -> str:
    return " ".join(f":{name}" + "=N" * (OPTIONS[name].number is not None) for name in names)


def _plain(spec: str) -> str:
    """Check that a SPEC is short enough and has only visible characters."""
    if len(spec) > LONGEST:
        raise ValueError(f"a SPEC has at most {LONGEST} characters; got {len(spec)}.")
    odd = next((i for i, c in enumerate(spec) if not " " <= c <= "~"), None)
    if odd is not None:
        raise ValueError(f"a SPEC is printable ASCII; got {spec[odd]!a} as its character {odd + 1}.")
    return spec


def _any(text: str) -> BiasOperator:
    around = _match_around(text)
    inner = text if around is None else around["inner"]
    parts = re.split(r"(?<!\d[eE])\+", inner)  # at every + that is not an exponent's sign
    if len(parts) > MOST:
        raise ValueError(f"a SPEC composes at most {MOST} operators; got {len(parts)}.")
    operators = [_single(part.strip(" ")) for part in parts]
    operator = operators[0] if len(operators) == 1 else JOINED["+"].make(*operators)
    if around is None:
        return operator
    each = AROUND[around["name"]]
    if not each.argument:
        return each.make(operator)
    return each.make(operator, *_numbers(each, around["argument"]))


def _numbers(each: Around, text: str) -> list[float]:
    """The numbers in the brackets of an operator that wraps others."""
    names, given = each.argument.split(","), text.split(",")
    if not (each.least or len(names)) <= len(given) <= len(names):
        raise ValueError(f"{each.name} takes the numbers ({each.argument}); got ({text}).")
    return [_number(float, value, f"{each.name}'s {name}") for name, value in zip(names, given, strict=False)]


def _match_around(text: str) -> re.Match[str] | None:
    """Match the parts of an operator that wraps others, with its argument if it takes one."""
    found = _AROUND.fullmatch(text)
    each = None if found is None else AROUND.get(found["name"])
    return None if found is None or each is None or bool(each.argument) != (found["argument"] is not None) else found


def _single(text: str) -> BiasOperator:
    if _match_around(text) is not None:
        raise ValueError(f"error feedback may appear once, as the outermost operator; got {shown(text)} within.")
    name, *words = text.split(":")
    if words and f"{name}:{words[0]}" in SPELLINGS:  # such as mlmc:topk
        name = f"{name}:{words.pop(0)}"
    if name not in SPELLINGS:
        near = did_you_mean([name], [*SPELLINGS, *JOINED, *AROUND])
        wanted = f"{near} Wanted" if near else "; wanted"
        raise ValueError(f"unknown operator {shown(text)}{wanted} {', '.join(spellings())}.")
    kind = SPELLINGS[name]
    argument = words.pop(0) if words and kind.number else ""
    options: dict[str, Any] = {}
    for word in words:
        keyword, value = _option(name, word)
        if keyword in options:
            raise ValueError(f"{name} has an option twice: {shown(word)}.")
        options[keyword] = value
    if kind.number is None:
        try:
            return kind.make(**options)
        except ValueError as error:
            raise ValueError(f"{shown(text)} does not fit {name}: {error}") from error
    if not argument:
        raise ValueError(f"{name} needs a number after a colon: {' or '.join(_spelled(kind))}.")
    try:
        if kind.share and argument.endswith("%"):
            share = _number(float, argument[:-1], f"{name}'s percentage")
            if share:  # otherwise the exponent may be too large for Decimal
                share = float(Decimal(argument[:-1]).scaleb(-2))  # in decimal arithmetic: 7 % is 0.07, not 7 * 0.01
            return kind.make(ratio=share, **options)
        return kind.make(_number(kind.number, argument, f"{name}'s {kind.argument}"), **options)
    except ValueError as error:
        raise ValueError(f"{shown(argument)} does not fit {name}: {error}") from error


def _option(name: str, word: str) -> tuple[str, Any]:
    """An option's keyword and value."""
    key, equals, value = word.partition("=")
    if key not in SPELLINGS[name].options or bool(equals) != (OPTIONS[key].number is not None):
        options = _options(SPELLINGS[name].options)
        raise ValueError(
            f"{name} has no option {shown(word)}; " + (f"it has {options}." if options else "it has none.")
        )
    option = OPTIONS[key]
    if option.number is None:
        return option.keyword, option.value
    number = _number(option.number, value, f"{name}'s {key}")
    try:
        if option.check is not None:
            option.check(number)
    except ValueError as error:
        raise ValueError(f"{shown(word)} does not fit {name}: {error}") from error
    return option.keyword, number


def _number(kind: type[N], text: str, what: str) -> N:
    try:
        return kind(whole(text) if kind is int else real(text))
    except ValueError as error:
        raise ValueError(f"{what} must be a {'whole ' * (kind is int)}number; {error}") from None
