"""The table of SPECs, for help texts. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Iterable


def spec_table(operators: Iterable[tuple[str, str, str]], options: Iterable[tuple[str, str]]) -> str:
    """Format the table, at most 100 columns wide.

    Args:
        operators: spelling, meaning and options of each.
        options: spelling and meaning of each.
    """
    lines = ["SPEC, an operator on each worker's gradient, and its options:"]
    lines += [f"  {spelling:<20} {meaning:<35} {own}".rstrip() for spelling, meaning, own in operators]
    lines += ["options, any number of them after the operator, as in topk:5%:tensor:all:"]
    return "\n".join(lines + [f"  {spelling:<20} {meaning}" for spelling, meaning in options])


def single_spellings(name: str, argument: str = "", share: bool = False) -> list[str]:
    """``name:ARGUMENT``, and ``name:P%`` where a share may take its place."""
    return [name + (f":{argument}" if argument else "")] + [f"{name}:P%"] * share


def joined_spelling(sign: str) -> str:
    """The SPEC of operators in a row, with this sign between them, such as ``A+B``."""
    return f"A{sign}B"


def around_spelling(name: str, argument: str = "") -> str:
    """``name:A``, or ``name(ARGUMENT):A``."""
    return name + (f"({argument})" if argument else "") + ":A"
