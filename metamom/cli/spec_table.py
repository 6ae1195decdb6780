"""The table of bias operators for the help, without importing torch.

An operator's record is next to its class, in a module that needs torch, which takes over a second to import. So the
records are read from the source instead: their arguments are literals. Where torch is imported already, or the source
is not there to be read, the registry answers; a test holds that both give the same table.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from metamom.common.spec_table import around_spelling, joined_spelling, single_spellings
from metamom.common.spec_table import spec_table as table

BIAS = Path(__file__).parents[1] / "bias"
_DECORATORS = ("spelled", "spelled_around", "spelled_between")


class _Record(NamedTuple):
    """A call in the source: ``spelled("topk", ..., argument="K")``."""

    called: str
    words: list[Any]
    keywords: dict[str, Any]


def spec_table() -> str:
    """The operators and their options, at most 100 columns wide: `metamom.bias.spec.spec_help`."""
    if "metamom.bias.spec" in sys.modules or not (BIAS / "spec.py").is_file():
        from metamom.bias.spec import spec_help

        return spec_help()
    return _render([each for file in sorted(BIAS.glob("*.py")) for each in _records(ast.parse(file.read_bytes()))])


def _records(module: ast.Module) -> Iterator[_Record]:
    """The decorators of operators' classes, and the records of options."""
    for statement in module.body:
        calls: list[ast.expr] = []
        if isinstance(statement, ast.ClassDef):
            calls = statement.decorator_list
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            calls = [statement.value]
            if isinstance(statement.value, ast.Dict):  # of options by name
                for name, value in zip(statement.value.keys, statement.value.values, strict=True):
                    if name is not None and isinstance(value, ast.Call) and ast.unparse(value.func) == "Option":
                        yield _Record("Option", [ast.literal_eval(name), *map(_literal, value.args)], {})
        for call in calls:
            if isinstance(call, ast.Call) and ast.unparse(call.func) in _DECORATORS:
                keywords = {each.arg: _literal(each.value) for each in call.keywords if each.arg is not None}
                yield _Record(ast.unparse(call.func), [_literal(each) for each in call.args[:2]], keywords)


def _literal(node: ast.expr) -> Any:
    """A literal's value; anything else, such as ``int``, as its source."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _place(each: _Record) -> tuple[bool, bool, str]:
    """Where a single operator stands in the table."""
    return each.words[0] != "none", not each.keywords.get("argument"), each.words[0]


def _render(records: list[_Record]) -> str:
    """As `metamom.bias.spec.spec_help` has it."""
    options = {each.words[0]: each.words[1:] for each in records if each.called == "Option"}

    def option(name: str) -> str:
        return f":{name}=N" if options[name][1] in ("int", "float") else f":{name}"

    rows = []
    singles = [each for each in records if each.called == "spelled"]
    for _, (name, meaning), more in sorted(singles, key=_place):
        spelling = "  ".join(single_spellings(name, more.get("argument", ""), more.get("share", False)))
        rows.append((spelling, meaning, " ".join(map(option, more.get("options", ())))))
    for _, (sign, meaning), _more in [each for each in records if each.called == "spelled_between"]:
        rows.append((joined_spelling(sign), meaning, ""))
    for _, (name, meaning), more in sorted(
        (each for each in records if each.called == "spelled_around"), key=lambda each: str(each.words[0])
    ):
        rows.append((around_spelling(name, more.get("argument", "")), meaning, ""))
    return table(rows, [(option(name), words[2]) for name, words in options.items()])
