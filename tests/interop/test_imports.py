"""Without a package, the error says what to install."""

from __future__ import annotations

import sys

import pytest

from metamom.interop.imports import import_flower


def test_without_flower(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    for name in [name for name in sys.modules if name.startswith("flwr.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r'this needs Flower 1\.42 or later, .* -m pip install "flwr>=1\.42"'):
        import_flower()
