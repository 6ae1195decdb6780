"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch._inductor


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests run in one process, which makes its fixtures once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish() -> None:
    """Ten thousand tests stay: a garbage collection, half a second without this, need not look through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Decoded data goes to a folder of the test session, which its processes share, not to the user's."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAMOM_CACHE", str(folder / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Shells start background jobs with SIGINT ignored, and children inherit that; the tests need it to arrive."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The real data: ``$METAMOM_DATA``, else ``shared/data`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("METAMOM_DATA") or beside)
    if not (root / "omniglot").is_dir():
        pytest.skip(f"no Omniglot data in {root}; name its folder in $METAMOM_DATA")
    return root


@pytest.fixture
def traced(monkeypatch) -> list[int]:
    """Everything of compiling but TorchInductor: the graph runs as it was traced. One entry a compilation."""
    compilations: list[int] = []

    def as_it_is(graph: Any, inputs: Any, options: Any) -> Any:
        compilations.append(len(inputs))
        return graph

    monkeypatch.setattr(torch._inductor, "compile", as_it_is)
    return compilations
