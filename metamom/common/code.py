"""The code that an object may run, read without running it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

MOST = 1000  # functions to read, so that a model that calls a large library is read quickly
_LIBRARIES = frozenset({"torch", "metamom", "numpy", "builtins"})


def code_of(owner: object) -> Iterator[CodeType]:
    """The code of an object's methods, and of the Python functions that they name, directly or through others.

    Functions are found as globals, in closures, as attributes of imported modules, and as attributes of the object
    itself. Code of PyTorch, NumPy and metamom is left out.
    """
    yield from _reached_from(type(owner))  # type: ignore[arg-type]  # a class hashes
    for each in vars(owner).values():
        if isinstance(each, (FunctionType, MethodType, partial)):
            yield from _reached_from(_function(each))


def names_one(owner: object, *names: str) -> bool:
    """Whether that code has one of these names.

    Example:
        >>> from json import JSONDecoder  # its errors are of a class that names str.rfind
        >>> names_one(JSONDecoder(), "rfind"), names_one(JSONDecoder(), "batch_norm")
        (True, False)
    """
    return any(name in code.co_names for code in code_of(owner) for name in names)


@cache
def _reached_from(start: object) -> tuple[CodeType, ...]:
    found: dict[CodeType, None] = {}
    seen: set[int] = set()
    todo: list[object] = [start]
    while todo and len(found) < MOST:
        each = _function(todo.pop())
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, type):
            todo += [value for home in each.__mro__ if not _in_library(home) for value in vars(home).values()]
        elif isinstance(each, FunctionType) and not _in_library(each):
            codes = _with_inner(each.__code__)
            found.update(dict.fromkeys(codes))
            todo += _named(each, {name for code in codes for name in code.co_names})
    return tuple(found)


def _function(value: Any) -> Any:
    """What a method, a property, a partial or a wrapped function calls."""
    while True:
        if isinstance(value, (staticmethod, classmethod, MethodType)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, partial):
            value = value.func
        elif isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        else:
            return value


def _in_library(value: Any) -> bool:
    return str(getattr(value, "__module__", None)).partition(".")[0] in _LIBRARIES


def _with_inner(code: CodeType) -> list[CodeType]:
    """A function's code, and that of the functions defined in it."""
    found = [code]
    for each in found:
        found += [const for const in each.co_consts if isinstance(const, CodeType)]
    return found


def _named(function: FunctionType, names: set[str]) -> list[object]:
    """The functions and classes that a function's code can reach by these names."""
    values = [function.__globals__[name] for name in names & function.__globals__.keys()]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    for module in [value for value in values if isinstance(value, ModuleType)]:
        if module.__name__.partition(".")[0] not in _LIBRARIES:
            values += [vars(module)[name] for name in names & vars(module).keys()]
    return [value for value in values if isinstance(value, (FunctionType, MethodType, partial, type))]
