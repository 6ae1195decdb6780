"""Fixtures of the tests of the paper's experiments and of the published recipes."""

from __future__ import annotations

import pytest
from paper_runs import small_mnist

from metamom.experiments.paper import protocol, run
from metamom.experiments.published import run as published_run


@pytest.fixture
def small(monkeypatch):
    """`reproduce("mnist")` on a small problem."""
    monkeypatch.setitem(protocol.PROTOCOLS, "mnist", small_mnist())
    monkeypatch.setattr(run, "SAVE_AFTER", 0.0)


@pytest.fixture(scope="module")
def few_validation_tasks():
    """Runs of published recipes are validated on 4 tasks, and not on 200."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published_run, "VALIDATION_TASKS", 4)
        yield
