"""A section's table of methods as lines of text."""

from __future__ import annotations

from metamom.experiments.report.contents import Section
from metamom.experiments.report.plots import Column
from metamom.experiments.report.views import EXCHANGED, SENT, TO_TARGET, table_columns

WIDTH = 100  # columns of a terminal, at most
LEFT_OUT = ("runs", "iterations", SENT, EXCHANGED)  # the same for all methods of a comparison, or on the page only


def table_lines(section: Section) -> list[str]:
    """The table, in at most `WIDTH` columns where labels allow it: tests in the middle are left out first.

    Args:
        section: its title and text are left out.
    """
    columns = [column for column in table_columns(section) if column.title not in LEFT_OUT]
    while sum(map(_width, columns)) + 2 * (len(columns) - 1) > WIDTH:
        tests = [column for column in columns if column.title.startswith("test, ")]
        spare = tests[1:-1] or tests[:-1] or [column for column in columns[1:-1] if column.title != TO_TARGET]
        if not spare:
            break
        columns.remove(spare[0])
    lines = ["  ".join(_aligned(column, column.title) for column in columns)]
    for row in range(len(section.methods)):
        lines.append("  ".join(_aligned(column, column.cells[row]) for column in columns).rstrip())
    return [line.rstrip() for line in lines]


def _width(column: Column) -> int:
    return max(len(column.title), *map(len, column.cells))


def _aligned(column: Column, text: str) -> str:
    return text.rjust(_width(column)) if column.numeric else text.ljust(_width(column))
