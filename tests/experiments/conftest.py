"""Fixtures of the tests of the paper's experiments."""

from __future__ import annotations

import pytest
from paper_runs import small_mnist

from metamom.experiments.paper import protocol, run


@pytest.fixture
def small(monkeypatch):
    """`reproduce("mnist")` on a small problem."""
    monkeypatch.setitem(protocol.PROTOCOLS, "mnist", small_mnist())
    monkeypatch.setattr(run, "SAVE_AFTER", 0.0)
