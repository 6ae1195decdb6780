"""Tables in Markdown.

These few lines take the place of tabulate, which would pad every cell to the width of its column.
"""

from __future__ import annotations

from collections.abc import Collection


def head(*cells: object, right: Collection[int] = ()) -> list[str]:
    """The first two lines of a table: ``| a | b |`` and ``|---|---|``.

    Args:
        *cells: the names of the columns.
        right: the indices of the columns to align on the right (``|---:``).
    """
    return [row(*cells), "".join("|---:" if i in right else "|---" for i in range(len(cells))) + "|"]


def row(*cells: object) -> str:
    """One line of a table: ``| a | b |``."""
    return f"| {' | '.join(map(str, cells))} |"
