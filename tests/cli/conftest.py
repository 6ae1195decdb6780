"""The command, and runs that several test files read; none of them changes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from character_folders import write_characters
from command import SMALL, Answer

from metamom import cli


@pytest.fixture
def metamom(capsys) -> Callable[..., Answer]:
    """Run the command in this process."""

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run of ``metamom train sinusoid``."""
    run = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["--iterations", "6", "--checkpoint-every", "3", *SMALL]
    assert cli.main(["train", "sinusoid", "--run-dir", str(run), *arguments]) == 0
    return run


@pytest.fixture(scope="session")
def trained_omniglot(tmp_path_factory, data_root) -> Path:
    """A run of ``metamom train omniglot`` on the real data."""
    run = tmp_path_factory.mktemp("trained") / "omniglot"
    arguments = ["--ways", "3", "--iterations", "2", "--meta-batch", "2", "--evaluate-tasks", "4", "--seed", "1"]
    root = ["--data-root", str(data_root)]
    assert cli.main(["train", "omniglot", "--run-dir", str(run), *arguments, *root]) == 0
    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory, data_root) -> Path:
    """40 classes of images, 84 x 84."""
    return write_characters(data_root, tmp_path_factory.mktemp("photos") / "photos")
