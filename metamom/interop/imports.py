"""Importing learn2learn where that takes more than `import learn2learn`."""

from __future__ import annotations

import importlib
import shlex
import sys
import warnings
from types import ModuleType

import torch

# Operators of torchvision's compiled part that its Python part registers something for when it is imported.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a library's operators go when the object does


def install_command() -> str:
    """The command that installs learn2learn for this Python."""
    command = f"{shlex.quote(sys.executable)} -m pip install learn2learn==0.2.0"
    if sys.version_info >= (3, 11):  # its C files come from an old Cython and must be generated anew (its issue 413)
        command += ' --config-settings="--build-option=build_ext"'
    return command


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators cannot load.

    A torchvision built for another torch (there is none for some CPU builds) stops at its own operators,
    ``torchvision::nms`` first. Only then, their schemas are declared to torch and the import is tried again: models,
    transforms and data sets work; calling such an operator is an error, as there is nothing behind it.

    Returns:
        The module.

    Raises:
        ImportError: if torchvision is not installed.
        RuntimeError: if the import fails for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if not _is_missing_operator(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what a failed import left half done
    return importlib.import_module("torchvision")


def import_learn2learn() -> ModuleType:
    """Import learn2learn, also where torchvision's compiled operators cannot load (see `import_torchvision`).

    Returns:
        The module.

    Raises:
        ImportError: if it is not installed, with the command that installs it for this Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gym's and its own, about their age: nothing a caller can mend
            import_torchvision()
            return importlib.import_module("learn2learn")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this needs learn2learn, but there is no module {error.name}. Install it with: {install_command()}"
        ) from error


def _is_missing_operator(error: RuntimeError) -> bool:
    text = str(error)
    return any(f"operator torchvision::{schema.partition('(')[0]} does not exist" in text for schema in _SCHEMAS)
