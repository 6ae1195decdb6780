"""No function and no class grows too large to be read at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("metamom", "tasks", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]
LINES = {ast.FunctionDef: 60, ast.ClassDef: 250}  # without docstrings
ARGUMENTS = 12
# Their arguments and docstrings are the documentation of users. `train` has 24 keywords, callbacks and clip_grad among
# them, since a run is one call: its options are one record inside, `metamom.training.options.Options`.
PUBLIC = {"CompositeMomentum.__init__", "Configured.__init__", "ImageFolder.__init__", "Training.backward", "train"}


def definitions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield inside + node.name, node
            yield from definitions(node, f"{inside}{node.name}.")


def lines(node: ast.FunctionDef | ast.ClassDef) -> int:
    """The length without docstrings."""
    assert node.end_lineno is not None
    total = node.end_lineno - node.lineno + 1
    for each in ast.walk(node):
        if isinstance(each, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(each) is not None:
            text = each.body[0]
            assert text.end_lineno is not None
            total -= text.end_lineno - text.lineno + 1
    return total


def test_sizes():
    assert len(SOURCES) > 200
    large = []
    for path in SOURCES:
        for name, node in definitions(ast.parse(path.read_text())):
            most = LINES[type(node)]
            if lines(node) > most:
                large.append(f"{path.relative_to(ROOT)}: {name} has {lines(node)} lines, more than {most}")
            if isinstance(node, ast.FunctionDef) and name not in PUBLIC:
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = len([each for each in given if each.arg not in ("self", "cls")])
                if count > ARGUMENTS:
                    large.append(f"{path.relative_to(ROOT)}: {name} has {count} arguments, more than {ARGUMENTS}")
    assert not large, "\n".join(large)


@pytest.mark.parametrize(
    ("source", "count"),
    [('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n', 2), ("class C:\n    x = 1\n\n    y = 2\n", 4)],
)
def test_docstrings_do_not_count(source, count):
    ((_, node),) = definitions(ast.parse(source))
    assert lines(node) == count
