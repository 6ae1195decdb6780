"""The command line's spelling of bias operators."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, TypeVar

from metamom.bias.base import BiasOperator, Identity
from metamom.bias.clip import Clip, ClipValue
from metamom.bias.compose import Compose
from metamom.bias.feedback import EF14, EF21, EF21SGDM, Clip21
from metamom.bias.normalize import Normalize, Sign
from metamom.bias.random import QSGD, RandK
from metamom.bias.topk import TopK

N = TypeVar("N", int, float)

SPELLINGS = (
    "none, topk:K, topk:P%, randk:K, randk:P%, clip:TAU, clipvalue:C, normalize, sign, qsgd:LEVELS, "
    "A+B, ef14:A, ef21:A, ef21-sgdm(ETA):A or clip21:TAU"
)


def parse(spec: str) -> BiasOperator:
    """The operator that a SPEC names.

    ``+`` composes, the left one first; error feedback goes around all that stands behind it. Options follow after
    colons: ``:tensor`` (topk, randk, clip, normalize, sign, qsgd) acts on each parameter tensor by itself, ``:all``
    (topk) keeps ties, ``:scaled`` and ``:shared`` are randk's, ``:seed=N`` is of those that draw.

    Raises:
        ValueError: for an unknown or malformed SPEC, saying which part is wrong.

    Example:
        >>> parse("clip:1+topk:5%")
        Compose(Clip(max_norm=1.0), TopK(ratio=0.05))
        >>> parse("ef21-sgdm(0.1):topk:1%")
        EF21SGDM(TopK(ratio=0.01), eta=0.1)
    """
    try:
        return _any(spec.strip())
    except (ValueError, TypeError) as error:
        raise ValueError(f"bias operator {spec!r}: {error}") from error


def _any(text: str) -> BiasOperator:
    around = re.fullmatch(r"(ef14|ef21|ef21-sgdm\(([^)]*)\)):(.*)", text)
    if around is not None:
        name, eta, inner = around.groups()
        operator = _any(inner)
        if name == "ef14":
            return EF14(operator)
        return EF21(operator) if name == "ef21" else EF21SGDM(operator, _number(float, eta, "ef21-sgdm's ETA"))
    parts = [part.strip() for part in re.split(r"(?<!\d[eE])\+", text)]  # at every + that is no exponent's sign
    return _single(text) if len(parts) == 1 else Compose(*map(_any, parts))


def _single(text: str) -> BiasOperator:
    name, *words = text.split(":")
    argument = words.pop(0) if words and name in WITH_ARGUMENT else None
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in OPTIONS.get(name, ()) or bool(equals) != (key == "seed"):
            raise ValueError(f"{name} has no option {word!r}.") if name in KINDS else _unknown(text)
        options[{"tensor": "per_tensor", "all": "ties"}.get(key, key)] = (
            "all" if key == "all" else _number(int, value, f"{name}'s seed") if key == "seed" else True
        )
    if name not in KINDS:
        raise _unknown(text)
    if name not in WITH_ARGUMENT:
        return KINDS[name](**options)
    if not argument:
        raise ValueError(f"{name} needs a number behind a colon.")
    try:
        if name in ("topk", "randk"):
            if argument.endswith("%"):
                _number(float, argument[:-1], f"{name}'s percentage")
                share = float(Decimal(argument[:-1]).scaleb(-2))  # in decimals: 7 % is 0.07, not 7 * 0.01
                return KINDS[name](ratio=share, **options)
            return KINDS[name](_number(int, argument, f"{name}'s K"), **options)
        return KINDS[name](_number(int if name == "qsgd" else float, argument, f"{name}'s argument"), **options)
    except ValueError as error:
        raise ValueError(f"{argument!r} does not fit {name}: {error}") from error


def _number(kind: type[N], text: str, what: str) -> N:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{what} must be a {'whole ' * (kind is int)}number; got {text!r}.") from None


def _unknown(text: str) -> ValueError:
    return ValueError(f"unknown operator {text!r}; wanted {SPELLINGS}.")


KINDS: dict[str, Callable[..., BiasOperator]] = {
    "none": Identity,
    "topk": TopK,
    "randk": RandK,
    "clip": Clip,
    "clipvalue": ClipValue,
    "normalize": Normalize,
    "sign": Sign,
    "qsgd": QSGD,
    "clip21": Clip21,
}
WITH_ARGUMENT = ("topk", "randk", "clip", "clipvalue", "qsgd", "clip21")
OPTIONS = {
    "topk": ("tensor", "all"),
    "randk": ("scaled", "shared", "tensor", "seed"),
    "clip": ("tensor",),
    "normalize": ("tensor",),
    "sign": ("tensor",),
    "qsgd": ("tensor", "seed"),
}
