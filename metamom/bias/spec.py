"""The command line's spelling of bias operators."""

from __future__ import annotations

from metamom.bias.base import BiasOperator, Identity
from metamom.bias.clip import Clip
from metamom.bias.topk import TopK

SPELLINGS = "none, topk:K, topk:P% or clip:TAU"


def parse(spec: str) -> BiasOperator:
    """The operator that a SPEC names: ``none``, ``topk:33500``, ``topk:5%``, ``clip:1.0``.

    Raises:
        ValueError: for an unknown or malformed SPEC, saying which part is wrong.

    Example:
        >>> parse("topk:5%")
        TopK(ratio=0.05)
    """
    name, _, argument = spec.strip().partition(":")
    try:
        if name == "none" and not argument:
            return Identity()
        if name == "topk" and argument.endswith("%"):
            return TopK(ratio=float(f"{argument[:-1]}e-2"))
        if name == "topk":
            return TopK(int(argument))
        if name == "clip":
            return Clip(float(argument))
    except ValueError as error:
        raise ValueError(f"bias operator {spec!r}: {argument!r} does not fit {name}: {error}") from error
    raise ValueError(f"unknown bias operator {spec!r}; wanted {SPELLINGS}.")
