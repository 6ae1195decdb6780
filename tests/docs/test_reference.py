"""The reference has every public name exactly once, and every public name says what it is."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import metamom

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
ENTRIES = Counter(
    name
    for page in sorted(REFERENCE.glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
)
FAMILIES = "metamom.experiments.families"  # which users extend; the other experiments are programs
SHOWN_BY_NAMES = {"metamom.interop.learn2learn"}  # a module whose own public names have entries
NEEDS = {"metamom.interop.flower": "flwr"}  # modules that cannot be imported where this package is not installed


def public_names() -> list[str]:
    """``package.name`` for every name in an ``__all__`` of metamom and the packages below it."""
    packages = ["metamom", *(m.name for m in pkgutil.walk_packages(metamom.__path__, "metamom.") if m.ispkg)]
    packages = [p for p in packages if p == FAMILIES or not p.startswith("metamom.experiments.")]
    modules = [importlib.import_module(name) for name in [*packages, "metamom.interop.learn2learn"]]
    return [f"{module.__name__}.{name}" for module in modules for name in getattr(module, "__all__", ())]


def is_absent(name: str) -> bool:
    """Whether a name is a module whose package is not installed."""
    return name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None


def found(name: str) -> Any:
    """The object of a dotted name, whatever it is an attribute of."""
    module, _, attribute = name.rpartition(".")
    owner = importlib.import_module(module)
    return getattr(owner, attribute) if hasattr(owner, attribute) else importlib.import_module(name)


def definition(module: ModuleType, name: str) -> ast.stmt | None:
    """The statement after the one that assigns a name, in the module that a module has it from."""
    source = Path(inspect.getfile(module))
    stub = source.with_suffix(".pyi")  # of a package that imports on first use
    tree = ast.parse((stub if stub.exists() else source).read_text(encoding="utf-8"))
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            after = tree.body[tree.body.index(statement) + 1 :]
            return after[0] if after else None
        if isinstance(statement, ast.ImportFrom) and name in {alias.name for alias in statement.names}:
            path = "." * statement.level + (statement.module or "")
            return definition(importlib.import_module(path, module.__name__), name)
    return None


def identity(name: str) -> Any:
    """What tells one public thing from another: the object, or for a constant where it is from."""
    if is_absent(name):
        return name
    thing = found(name)
    is_defined = inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)
    return id(thing) if is_defined else name.rpartition(".")[2]


def test_every_public_name_is_in_the_reference_once():
    by_identity: dict[Any, list[str]] = {}
    for name in public_names():
        by_identity.setdefault(identity(name), []).append(name)
    entries = Counter(identity(name) for name in ENTRIES.elements())
    shown = {names[-1]: entries[each] for each, names in by_identity.items() if entries[each] != 1}
    assert {name: n for name, n in shown.items() if name not in SHOWN_BY_NAMES} == {}


def test_entries_are_public_names():
    public = {identity(name) for name in public_names()}
    assert [name for name in ENTRIES if identity(name) not in public] == []


def test_every_public_name_has_a_docstring():
    bare = []
    for name in public_names():
        if is_absent(name):
            spec = importlib.util.find_spec(name)
            assert spec is not None
            assert spec.origin is not None
            assert ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
            continue
        thing = found(name)
        if inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing):
            documented = bool(thing.__doc__) and not str(thing.__doc__).startswith(f"{thing.__name__}(")
        else:
            module, _, attribute = name.rpartition(".")
            after = definition(importlib.import_module(module), attribute)
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if not documented:
            bare.append(name)
    assert bare == []


def test_no_page_is_over_300_lines():
    pages = REFERENCE.parent.rglob("*.md")
    assert {str(page): n for page in pages if (n := page.read_text(encoding="utf-8").count("\n")) > 300} == {}


def test_entries_do_not_mean_a_module_of_the_same_name():
    """The build reads the source, where a module hides what a package has under the module's name."""
    hidden = []
    for name in ENTRIES:
        package, _, last = name.rpartition(".")
        path = getattr(importlib.import_module(package), "__path__", None)
        is_module = path is not None and importlib.machinery.PathFinder.find_spec(last, list(path)) is not None
        if is_module and not is_absent(name) and not inspect.ismodule(found(name)):
            hidden.append(name)
    assert hidden == []
