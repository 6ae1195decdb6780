"""Find an object by the name that a user gives it on the command line: ``PACKAGE.MODULE:CALLABLE``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from metamom.common.did_you_mean import did_you_mean
from metamom.common.kinds import named_type
from metamom.common.user_code import place_in_user_code

FORM = "PACKAGE.MODULE:CALLABLE"


def named_callable(text: str, what: str = "the model", *, folder: str | None = None) -> Callable[..., Any]:
    """Import the module and return its callable. Modules in the current directory can be imported.

    Args:
        text: such as ``my_models:Net`` or ``torchvision.models:resnet18``; attributes of attributes have dots.
        what: what it stands for, for errors.
        folder: where the module was imported from before, for the error if it is not found now.

    Raises:
        ValueError: for a text of another form, a module that does not exist or raises an error, a name that it does
            not have, and for an object that cannot be called.
    """
    module_name, colon, attribute = text.partition(":")
    if not colon or not all(map(_is_dotted_name, (module_name, attribute))):
        raise ValueError(f"{what} is named as {FORM}, such as my_models:Net; got {text!r:.80}.")
    found: Any = _module(module_name, what, folder)
    for name in attribute.split("."):
        if not hasattr(found, name):
            known = [each for each in dir(found) if not each.startswith("_")]
            raise ValueError(f"{what} {text}: {module_name} has no {name}{did_you_mean([name], known) or '.'}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"{what} {text} must be a class or a function that returns it; got {named_type(found)}.")
    result: Callable[..., Any] = found
    return result


def created(text: str, create: Callable[..., Any], arguments: Mapping[str, Any] | None = None, takes: str = "") -> Any:
    """Create the model by the callable that `named_callable` found.

    Args:
        text: its name.
        create: the callable.
        arguments: passed by name.
        takes: which arguments those are, for the error where it hands on one that is not taken.

    Raises:
        ValueError: for any error of the callable's, with the file and the line that raised it.
    """
    arguments = arguments or {}
    try:
        return create(**arguments)
    except Exception as error:
        given = ", ".join(f"{name}={value!r:.40}" for name, value in arguments.items())
        untaken = isinstance(error, TypeError) and any(f"keyword argument '{name}'" in str(error) for name in arguments)
        advice = f". {takes}" if untaken and takes else ""
        raise ValueError(f"the model {text}({given}) raised {_described(error)}{advice}") from error


def module_folder(text: str) -> str | None:
    """The folder that the module of ``PACKAGE.MODULE:CALLABLE`` was imported from, if it has been imported."""
    name = text.partition(":")[0]
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return None
    path = Path(os.path.abspath(file))
    return str(path.parents[name.count(".") + (path.stem == "__init__")])


def _described(error: BaseException) -> str:
    place = place_in_user_code(error)
    return f"{type(error).__name__}: {error}{'' if place is None else f' ({place})'}"


def _module(name: str, what: str, folder: str | None) -> Any:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:  # as `python -m` has it, unlike an installed command
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(f"{missing}."):
            raise ValueError(
                f"{what}: {name} imports {missing}, which is not installed. Install it in this environment."
            ) from error
        advice = f"Name it as {FORM}, from the folder that holds it."
        if folder is not None:
            advice = f"It was in {folder} before: start from there (cd {folder}), or set PYTHONPATH={folder}."
        raise ValueError(
            f"{what}: there is no module {missing}, here in {here} or among what is installed. {advice}"
        ) from error
    except Exception as error:
        raise ValueError(f"{what}: the import of {name} raised {_described(error)}") from error


def _is_dotted_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))
