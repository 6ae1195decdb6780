"""Import learn2learn, Lightning and Flower, where a plain import fails or does not say what to install."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
import warnings
from types import ModuleType

import torch

# Compiled operators of torchvision that its Python part refers to when it is imported.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # kept alive, since operators disappear with their library object


def install_command() -> str:
    """The command that installs learn2learn for this Python."""
    command = f"{shlex.quote(sys.executable)} -m pip install learn2learn==0.2.0"
    if sys.version_info >= (3, 11):  # its C files come from an old Cython and must be regenerated (its issue 413)
        command += ' --config-settings="--build-option=build_ext"'
    return command


def import_torchvision() -> ModuleType:
    """Import torchvision even if its compiled operators cannot load.

    A torchvision built for another torch (some CPU builds have no matching one) fails at its own operators,
    ``torchvision::nms`` first. In this case their schemas are declared to torch and the import is repeated. Models,
    transforms and data sets then work, but calling such an operator is an error.

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
        del sys.modules[name]  # left over from the failed import
    return importlib.import_module("torchvision")


def import_learn2learn() -> ModuleType:
    """Import learn2learn even if torchvision's compiled operators cannot load (see `import_torchvision`).

    Returns:
        The module.

    Raises:
        ImportError: if it is not installed, with the command that installs it for this Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations in gym and learn2learn, which a caller cannot fix
            import_torchvision()
            return importlib.import_module("learn2learn")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this needs learn2learn, but the module {error.name} is not installed. Install it with: "
            f"{install_command()}"
        ) from error


def import_lightning() -> ModuleType:
    """Import Lightning even if torchvision, which it imports where there is one, cannot load its operators.

    Returns:
        The module ``lightning.pytorch``, or ``pytorch_lightning`` where only that is installed.

    Raises:
        ImportError: if neither is installed.
    """
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    for name in ("lightning", "pytorch_lightning"):
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module("lightning.pytorch" if name == "lightning" else name)
    raise ImportError(f"this needs Lightning. Install it with: {shlex.quote(sys.executable)} -m pip install lightning")


def import_flower() -> ModuleType:
    """Import Flower's apps and strategies.

    Returns:
        The module ``flwr``, with ``app``, ``clientapp`` and ``serverapp``.

    Raises:
        ImportError: if Flower is not installed, or is older than these.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # in packages that it imports
            for name in ("flwr.app", "flwr.clientapp", "flwr.serverapp.strategy"):
                importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this needs Flower 1.42 or later, but the module {error.name} is not installed. Install it with: "
            f'{shlex.quote(sys.executable)} -m pip install "flwr>=1.42"'
        ) from error
    return importlib.import_module("flwr")


def _is_missing_operator(error: RuntimeError) -> bool:
    text = str(error)
    return any(f"operator torchvision::{schema.partition('(')[0]} does not exist" in text for schema in _SCHEMAS)
