"""Tables in Markdown."""

from __future__ import annotations


def head(*cells: object) -> list[str]:
    """The first two lines of a table: ``| a | b |`` and ``|---|---|``."""
    return [row(*cells), "|---" * len(cells) + "|"]


def row(*cells: object) -> str:
    """One line of a table: ``| a | b |``."""
    return f"| {' | '.join(map(str, cells))} |"
