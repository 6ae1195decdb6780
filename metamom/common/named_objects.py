"""Find an object by the name that a user gives it on the command line: ``PACKAGE.MODULE:CALLABLE``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from metamom.common.did_you_mean import did_you_mean

FORM = "PACKAGE.MODULE:CALLABLE"


def named_callable(text: str, what: str = "the model") -> Callable[..., Any]:
    """Import the module and return its callable. Modules in the current directory can be imported.

    Args:
        text: such as ``my_models:Net`` or ``torchvision.models:resnet18``; attributes of attributes have dots.
        what: what it stands for, for errors.

    Raises:
        ValueError: for a text of another form, a module that does not exist, a name that it does not have, and for an
            object that cannot be called. Errors of the module itself pass unchanged.
    """
    module_name, colon, attribute = text.partition(":")
    if not colon or not all(map(_is_dotted_name, (module_name, attribute))):
        raise ValueError(f"{what} is named as {FORM}, such as my_models:Net; got {text!r:.80}.")
    found: Any = _module(module_name, what)
    for name in attribute.split("."):
        if not hasattr(found, name):
            known = [each for each in dir(found) if not each.startswith("_")]
            raise ValueError(f"{what} {text}: {module_name} has no {name}{did_you_mean([name], known) or '.'}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"{what} {text} must be a class or a function that returns it; got a {type(found).__name__}.")
    result: Callable[..., Any] = found
    return result


def _module(name: str, what: str) -> Any:
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
        raise ValueError(
            f"{what}: there is no module {missing}, here in {here} or among what is installed. Name it as {FORM}, "
            "from the folder that holds it."
        ) from error


def _is_dotted_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))
