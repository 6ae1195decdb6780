"""Parse numbers that users write in the digits 0 to 9.

``int`` and ``float`` also accept ``1_000``, digits of other scripts, ``nan``, ``inf`` and line breaks, none of which
make sense in a flag or a SPEC.
"""

from __future__ import annotations

import math
import re

LONGEST = 100  # characters; int() of a million digits takes minutes

_WHOLE = re.compile(r"[+-]?[0-9]+")
_REAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def whole(text: str) -> int:
    """Parse a whole number such as ``-3``; surrounding spaces are ignored.

    Raises:
        ValueError: for any other text, and for more than 100 characters.
    """
    plain = text.strip(" ")
    if len(plain) > LONGEST or _WHOLE.fullmatch(plain) is None:
        raise ValueError(f"wanted a whole number, in the digits 0 to 9; got {shown(text)}.")
    return int(plain)


def real(text: str) -> float:
    """Parse a finite number such as ``5``, ``-0.1`` or ``1e-3``; surrounding spaces are ignored.

    Raises:
        ValueError: for any other text, a number beyond the range of a float, and more than 100 characters.
    """
    plain = text.strip(" ")
    if len(plain) > LONGEST or _REAL.fullmatch(plain) is None or not math.isfinite(float(plain)):
        raise ValueError(f"wanted a number, such as 5, 0.1 or 1e-3, in the digits 0 to 9; got {shown(text)}.")
    return float(plain)


def short(number: float) -> str:
    """The digits of a number in a SPEC, which read back as the same number: ``1`` for 1.0, ``0.1``."""
    return repr(number).removesuffix(".0")


def counted(n: int, one: str, many: str | None = None) -> str:
    """A number of things: ``1 class``, ``2,000 classes``.

    Args:
        n: how many.
        one: the word for one.
        many: for any other number; ``one`` with an s by default.
    """
    return f"{n:,} {plural(n, one, many)}"


def plural(n: int, one: str, many: str | None = None) -> str:
    """The word for ``n`` things, see `counted`."""
    return one if n == 1 else many or f"{one}s"


def shown(text: str, longest: int = 60) -> str:
    """Quote a user's text for an error: invisible characters are escaped, and a long text loses its middle."""
    if len(text) > longest:
        half = longest // 2
        return f"{text[:half]!r}...{text[-half:]!r} ({len(text)} characters)"
    return repr(text)
