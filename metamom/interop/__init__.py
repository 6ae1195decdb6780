"""metamom beside other libraries. Importing this imports none of them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metamom.interop import learn2learn as learn2learn


def __getattr__(name: str) -> Any:
    if name == "learn2learn":
        return import_module("metamom.interop.learn2learn")
    raise AttributeError(f"module 'metamom.interop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "learn2learn"})
