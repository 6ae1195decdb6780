"""Task families that the commands train on: a module with a `Family` record each.

Importing them needs no torch, so that help is fast.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from metamom.experiments.families.family import Family

__all__ = ["FAMILIES", "Family"]


def _load_all() -> dict[str, Family]:
    """The records of all modules, by name: families without data first, and those with a folder of their own last."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    records: list[Family] = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    records.sort(key=lambda record: ("root" in record.options, record.data is not None, record.name))
    return {record.name: record for record in records}


FAMILIES = _load_all()
"""The families of tasks by name, each from its module."""
