"""The code that an object may run, read without running it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

MOST = 1000  # functions to read, so that a model that calls a large library is read quickly
_LIBRARIES = frozenset({"torch", "metamom", "numpy", "builtins"})
# what has been read; functions may hold models in their closures, so they are not kept alive
_CODES: WeakKeyDictionary[type | FunctionType, tuple[CodeType, ...]] = WeakKeyDictionary()
_NAMES: WeakKeyDictionary[type | FunctionType, frozenset[str]] = WeakKeyDictionary()


def code_of(owner: object) -> Iterator[CodeType]:
    """The code of an object's methods, and of the Python functions that they name, directly or through others.

    Functions are found as globals, in closures, as attributes of imported modules, and as attributes of the object
    itself. Code of PyTorch, NumPy and metamom is left out.
    """
    for start in _starts(owner):
        yield from _reached_from(start)


def names_one(owner: object, *names: str) -> bool:
    """Whether that code has one of these names.

    Example:
        >>> from json import JSONDecoder  # its errors are of a class that names str.rfind
        >>> names_one(JSONDecoder(), "rfind"), names_one(JSONDecoder(), "batch_norm")
        (True, False)
    """
    return any(not _names_in(start).isdisjoint(names) for start in _starts(owner))


def _starts(owner: object) -> Iterator[type | FunctionType]:
    """An object's class and the functions among its attributes; none of a module of PyTorch with its own forward."""
    kind, attributes = type(owner), vars(owner)
    if kind.__module__.startswith("torch.") and "forward" not in attributes:
        return
    yield kind
    for each in attributes.values():
        if isinstance(each, (FunctionType, MethodType, partial)) and isinstance(found := _function(each), FunctionType):
            yield found


def _names_in(start: type | FunctionType) -> frozenset[str]:
    found = _NAMES.get(start)
    if found is None:
        _NAMES[start] = found = frozenset(name for code in _reached_from(start) for name in code.co_names)
    return found


def _reached_from(start: type | FunctionType) -> tuple[CodeType, ...]:
    known = _CODES.get(start)
    if known is not None:
        return known
    found: dict[CodeType, None] = {}
    seen: set[int] = set()
    todo: list[object] = [start]
    for each in map(_function, todo):  # it grows, so what is nearest is read first
        if id(each) in seen or len(found) >= MOST:
            continue
        seen.add(id(each))
        if isinstance(each, type):
            todo += [value for home in each.__mro__ if not _in_library(home) for value in vars(home).values()]
        elif isinstance(each, FunctionType) and not _in_library(each):
            codes = _with_inner(each.__code__)
            found.update(dict.fromkeys(codes))
            todo += _named(each, {name for code in codes for name in code.co_names})
            if hasattr(each, "__wrapped__"):
                todo.append(each.__wrapped__)
    _CODES[start] = codes_found = tuple(found)
    return codes_found


def _function(value: Any) -> Any:
    """What a method, a property or a partial calls."""
    while True:
        if isinstance(value, (staticmethod, classmethod, MethodType)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, partial):
            value = value.func
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
    """The functions and classes that a function's code can reach by these names.

    Classes of modules are left out, since each module of a model is looked at by itself.
    """
    values = [function.__globals__[name] for name in names & function.__globals__.keys()]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    for module in [value for value in values if isinstance(value, ModuleType)]:
        if module.__name__.partition(".")[0] not in _LIBRARIES:
            values += [vars(module)[name] for name in names & vars(module).keys()]
    kinds = FunctionType, MethodType, partial, type
    return [x for x in values if isinstance(x, kinds) and not (isinstance(x, type) and issubclass(x, nn.Module))]
