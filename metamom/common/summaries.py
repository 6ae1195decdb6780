"""The one-line ``repr`` of samplers and learners."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

LONGEST = 60  # characters of one value, unless it is a summary itself
MOST = 6  # items of a list or tuple


def summary(kind: str, values: Mapping[str, Any], *first: str) -> str:
    """``Kind(first, name=value, ...)``: large values by size; nothing for ``None`` and for private names.

    Example:
        >>> summary("Sinusoid", {"shots": 5, "noise": 0.0, "data": None, "_root": "x"})
        'Sinusoid(shots=5, noise=0.0)'
    """
    shown = [f"{k}={_short(v)}" for k, v in values.items() if v is not None and not k.startswith("_")]
    return f"{kind}({', '.join([*first, *shown])})"


def _short(value: Any) -> str:
    if (shape := getattr(value, "shape", None)) is not None:
        return f"{type(value).__name__} {list(shape)}"
    if isinstance(value, float):
        return min(repr(value), f"{value:.6g}", key=len) if value % 1 else repr(value)
    if type(value) in (tuple, list) and len(value) <= MOST:
        inside = ", ".join(map(_short, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, Sized) and not isinstance(value, (str, bytes)):
        return f"{type(value).__name__} of {len(value)}"
    text = getattr(value, "__qualname__", None) or repr(value)
    return text if len(text) <= LONGEST or text.endswith(")") else f"{text[: LONGEST - 3]}..."
