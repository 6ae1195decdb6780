"""Describe the contents of user functions as JSON values, to distinguish functions of the same name."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metamom.distributed import digest

_LONGEST = 200  # characters of a text, or entries of a list, to include verbatim
_DEEPEST = 10  # nesting of objects


class Contents:
    """The values in a function, and a hash of the code of its unnamed parts.

    A module-level function is identified by its name, so its code may be improved. A lambda or nested function is
    identified by its code, wherever it is defined. The contents include defaults and closures of both, all arguments of
    partial functions, and the attributes of other callables and dataclasses. For modules they include children, buffers
    and options, but not parameters, which are trained.

    Attributes:
        values: JSON values.
        code: a short hash of the code; ``None`` if all parts have names. It is only valid for one version of Python.
    """

    def __init__(self, *things: Any) -> None:
        self._code: list[str] = []
        self._open: set[int] = set()  # objects being described, to stop at cycles
        self.values = [self._of(thing) for thing in things]
        self.code = _letters(" ".join(self._code)) if self._code else None

    def _of(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, str):
            return value if len(value) <= _LONGEST else f"{len(value)} letters, {_letters(value)}"
        if isinstance(value, nn.Parameter):
            return f"parameter of shape {tuple(value.shape)}"
        if isinstance(value, Tensor):
            return f"{value.dtype} of shape {tuple(value.shape)}, {_of_tensor(value)}"
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return f"{value.dtype} of shape {value.shape}, {_letters(value.tobytes())}"
        if isinstance(value, np.generic):
            return self._of(value.item())
        if isinstance(value, type):
            return value.__qualname__
        if id(value) in self._open:
            return "itself"
        self._open.add(id(value))
        try:
            return self._of_parts(value)
        finally:
            self._open.remove(id(value))

    def _of_parts(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            found = [self._of(each) for each in value]
            return found if len(found) <= _LONGEST else f"{len(found)} entries, {_letters(repr(found))}"
        if isinstance(value, (set, frozenset)):
            return sorted((self._of(each) for each in value), key=repr)
        if isinstance(value, Mapping):
            return {str(key): self._of(each) for key, each in value.items()}
        if isinstance(value, functools.partial):
            return {
                "function": self._of(value.func),
                **{str(number): self._of(each) for number, each in enumerate(value.args)},
                **{name: self._of(each) for name, each in sorted(value.keywords.items())},
            }
        if isinstance(value, MethodType):
            return {"method": self._of(value.__func__), "self": self._of(value.__self__)}
        if isinstance(value, FunctionType):
            return self._of_function(value)
        if isinstance(value, nn.Module):
            options = {name: each for name, each in vars(value).items() if not name.startswith("_")}
            parts = {
                **options,
                **dict(value.named_parameters(recurse=False)),
                **dict(value.named_buffers(recurse=False)),
            }
            parts |= dict(value.named_children())
            del parts["training"]
            return {"kind": type(value).__qualname__, **{name: self._of(each) for name, each in parts.items()}}
        if isinstance(value, (BuiltinFunctionType, ModuleType)):
            return value.__name__
        # attributes of other objects (loggers, generators, open files) depend on the surrounding program
        by_contents = callable(value) or is_dataclass(value) or isinstance(value, SimpleNamespace)
        attributes = getattr(value, "__dict__", {}) if by_contents and len(self._open) <= _DEEPEST else {}
        return {"kind": type(value).__qualname__, **{name: self._of(each) for name, each in attributes.items()}}

    def _of_function(self, function: FunctionType) -> dict[str, Any]:
        nested = "<locals>" in function.__qualname__ or function.__name__ == "<lambda>"
        found = {"function": function.__name__ if nested else function.__qualname__}
        if nested:
            self._code.append(_letters(repr(_of_code(function.__code__))))
        elif function.__module__.partition(".")[0] in ("torch", "metamom"):
            return found  # their arguments change between versions
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(function, follow_wrapped=False).parameters.items()
            if parameter.default is not parameter.empty
        }
        closure = {}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                closure[name] = cell.cell_contents
            except ValueError:  # the name is not bound yet
                continue
        for name, part in (("defaults", defaults), ("closure", closure)):
            if part:
                found[name] = self._of(part)
        return found


def _of_code(code: CodeType) -> tuple[Any, ...]:
    """The code itself, without its location."""
    consts = [_of_const(const) for const in code.co_consts]
    return code.co_code, consts, code.co_names, code.co_freevars, code.co_varnames[: code.co_argcount]


def _of_const(const: Any) -> Any:
    if isinstance(const, CodeType):
        return _of_code(const)
    # drop the location 'f.<locals>.<lambda>', and sort sets
    if isinstance(const, str) and "<locals>" in const:
        return None
    return sorted(map(repr, const)) if isinstance(const, frozenset) else (type(const).__name__, const)


def _of_tensor(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_meta:
        return str(tensor.layout)
    return digest([tensor.resolve_conj().resolve_neg()])


def _letters(value: str | bytes) -> str:
    """A short hash of the value."""
    return hashlib.blake2b(
        value.encode(errors="replace") if isinstance(value, str) else value, digest_size=8
    ).hexdigest()
