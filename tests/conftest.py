"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch._inductor

# Groups that take longest for their number of tests, the longest first: begun last, one would leave the other processes
# idle. The first two begin together, and only the second needs the kernels, which it builds.
LONG = (
    "processes", "compile", "test_faults", "scaling", "test_images_command", "test_compare_command", "test_speed",
    "test_processes", "test_learning_curves", "ddp", "test_demo", "test_notebooks", "test_python_runs",
    "test_train_command", "test_norm_options", "test_validation_interrupted", "test_floor", "test_fuzz_runs",
    "test_report_page", "test_norm_pretrained", "test_report_command", "test_learner_flags", "test_lightning",
    "test_optim_compiled",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests run in one process, which makes its fixtures once.

    Several processes take the groups in the order of the tests: the long ones first, then those of many tests.
    """
    groups: list[str] = []
    for item in items:
        marker = item.get_closest_marker("xdist_group")
        if marker is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        groups.append(item.path.stem if marker is None else (*marker.args, *marker.kwargs.values())[0])
    if "PYTEST_XDIST_WORKER" in os.environ:
        sizes, places = Counter(groups), {name: place for place, name in enumerate(LONG)}
        order = sorted(range(len(items)), key=lambda i: (places.get(groups[i], len(LONG)), -sizes[groups[i]]))
        items[:] = [items[i] for i in order]


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """While tests are collected next to nothing is garbage; looking for it takes a third of the time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Ten thousand tests stay: a garbage collection, half a second without this, need not look through them again."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory, pytestconfig):
    """Decoded data goes to a folder of the test session, which its processes share, not to the user's.

    The compiled kernels come from pytest's own cache, if a session has built them before.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    kept = pytestconfig.cache.mkdir("kernels") if pytestconfig.pluginmanager.has_plugin("cacheprovider") else cache
    copy_kernels(kept, cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAMOM_CACHE", str(cache))
        yield
    copy_kernels(cache, kept)


def copy_kernels(source: Path, target: Path) -> None:
    """Copy libraries that are not there; their names say what they were built from, and what they contain."""
    for library in source.glob("kernels-*.so"):
        if not (target / library.name).exists():
            partial = target / f"{library.name}.{os.getpid()}"  # another process may look for the whole file
            shutil.copy2(library, partial)
            partial.replace(target / library.name)


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
