"""metamom: train meta-learners with composite momentum under biased gradients.

Names and sub-packages are imported on first use.
"""

from importlib import import_module, metadata
from pkgutil import iter_modules
from typing import Any

import lazy_loader

from metamom import moved

_named, _listed, _all = lazy_loader.attach_stub(__name__, __file__)
_MODULES = {module.name for module in iter_modules(__path__)}
__all__ = [name for name in _all if name not in _MODULES]
moved.install()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version("metamom")
        except metadata.PackageNotFoundError:  # a checkout on the path that is not installed
            return "unknown"
    if name in _MODULES or f"metamom.{name}" in moved.MOVED:
        return import_module(f"metamom.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'metamom' has no attribute {name!r}")
    return _named(name)


def __dir__() -> list[str]:
    return sorted({*_listed(), "__version__"})
