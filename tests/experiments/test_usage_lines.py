"""The help of every experiment names the command that runs it, however it was started."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import metamom.experiments

FOLDER = Path(metamom.experiments.__file__).parent
SCRIPTS = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if "ArgumentParser(" in path.read_text()
)


def test_there_are_scripts() -> None:
    assert {"omniglot_accuracy", "speed.__main__", "published.ship"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_command(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"metamom.experiments.{script}")
    monkeypatch.setattr(sys, "argv", ["somewhere/__main__.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        module.main()
    assert exit.value.code == 0
    command = f"python -m metamom.experiments.{script.removesuffix('.__main__')} "
    assert " ".join(capsys.readouterr().out.split()).startswith(f"usage: {command}")
