"""What is installed here beside what metamom needs."""

from __future__ import annotations

import importlib.util

import pytest

LEARN2LEARN = importlib.util.find_spec("learn2learn") is not None


def need_learn2learn() -> None:
    """Skip the test, or, where a file is imported, the file, if there is none."""
    if not LEARN2LEARN:
        pytest.skip("learn2learn is not installed: it needs NumPy < 2, so Python < 3.13", allow_module_level=True)


def need(package: str) -> None:
    """Skip the test, or, where a file is imported, the file, without this package."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install {package}", allow_module_level=True)
