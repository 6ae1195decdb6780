"""Imports point down only: a room knows those beneath it, and none above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
FLOORS = [  # from the ground up: rooms, and modules that stand by themselves, as they are named after "metamom."
    ["common", "rng", "moved"],
    ["batch", "optim", "weights"],
    ["distributed"],
    ["bias"],
    ["server", "nets", "theory"],
    ["compile", "decentral"],
    ["maml"],
    ["task_metrics"],
    ["judging", "baselines"],
    ["evaluation", "diagnostics", "interop"],
    ["training"],
    ["tasks"],
    ["experiments"],
    ["loading"],
    ["comparing", "ensemble"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its name."""
    for path in sorted(CHECKOUT.glob("metamom/**/*.py")):
        parts = path.relative_to(CHECKOUT / "metamom").with_suffix("").parts
        if parts[0] not in ("tasks", "experiments") and parts != ("__init__",):
            yield ".".join(("metamom", *(p for p in parts if p != "__init__"))), path
    for top in ("tasks", "experiments"):
        for path in sorted((CHECKOUT / top).rglob("*.py")):
            yield ".".join(("metamom", *path.relative_to(CHECKOUT).with_suffix("").parts)), path


def imported(path: Path, *, at_once: bool = False) -> set[str]:
    """What a file imports of metamom, anywhere in it or when it is imported itself."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide what is imported"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("metamom.")}


def room(name: str) -> str:
    return name.split(".")[1]


MODULES = dict(modules())
ROOMS = sorted({room(name) for name in MODULES})


def test_every_room_has_a_floor():
    assert set(ROOMS) == set(FLOOR)


def test_imports_point_down():
    up = {
        (module, other)
        for module, path in MODULES.items()
        for other in imported(path)
        if room(other) in FLOOR and room(other) != room(module) and FLOOR[room(other)] >= FLOOR[room(module)]
    }
    assert not up


def test_modules_do_not_import_each_other_in_circles():
    names = sorted(MODULES, key=len, reverse=True)
    below = {
        module: {
            next((n for n in names if other == n or other.startswith(f"{n}.")), module)
            for other in imported(path, at_once=True)
        }
        - {module}
        for module, path in MODULES.items()
        if not path.name.startswith("__")
    }
    while leaves := [module for module, others in below.items() if not others & set(below)]:
        for module in leaves:
            del below[module]
    assert not below
