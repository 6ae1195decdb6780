"""Runs that several test files compare with or resume; none of them changes one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import directory_runs
import pytest
import training_runs
from training_runs import KINDS, global_seed, momentum

from metamom import cli


@pytest.fixture
def global_state() -> Iterator[None]:
    """Checkpoints hold the state of torch's generator: the same at the start of every test."""
    with global_seed(7):
        yield


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Callable[[str], Path]:
    """The directory of a run of 12 steps of a kind."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp("whole") / "run"
            with global_seed(7):
                training_runs.go(KINDS[kind](), path)
            made[kind] = path
        return made[kind]

    return of


@pytest.fixture(scope="session")
def started(tmp_path_factory) -> Path:
    """A run stopped after 8 of its steps, with checkpoints after 0, 4 and 8; its path has "format" in it."""
    path = tmp_path_factory.mktemp("another-format") / "run"
    with global_seed(7):
        training_runs.go(momentum(), path, iterations=8)
    return path


@pytest.fixture(scope="session")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps by `train`."""
    path = tmp_path_factory.mktemp("ended") / "run"
    directory_runs.go(path)
    return path


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(ended, tmp_path / "run"))


@pytest.fixture(scope="session")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps by the command."""
    path = tmp_path_factory.mktemp("commanded") / "run"
    assert cli.main(["train", "sinusoid", *directory_runs.FLAGS, "--iterations", "4", "--run-dir", str(path)]) == 0
    return path
