"""What ``import metamom`` gives, and what it leaves until it is named."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

import metamom

LAZY = ["bias", "diagnostics", "distributed", "experiments", "interop", "nets", "tasks", "theory"]

SCRIPT = """
import sys
import metamom
from metamom import *

late = {"matplotlib", "scipy.stats", "learn2learn", "torchvision"} | {
    f"metamom.{name}" for name in ("tasks", "experiments", "interop")
}
assert not late & set(sys.modules), late & set(sys.modules)
assert callable(metamom.tasks.Sinusoid)
assert callable(metamom.nets.Conv4)
assert callable(metamom.theory.max_step)
assert callable(metamom.interop.learn2learn.from_maml)
assert metamom.experiments.__name__ == "metamom.experiments"
assert not {"matplotlib", "learn2learn", "torchvision"} & set(sys.modules)
"""


def test_sub_packages_are_imported_when_they_are_named() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_they_are_listed() -> None:
    assert {*LAZY, "__version__", "MAML", "train"} <= set(dir(metamom))
    assert [getattr(metamom, name).__name__ for name in LAZY] == [f"metamom.{name}" for name in LAZY]
    assert "learn2learn" in dir(metamom.interop)


def test_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metamom.__version__ == metadata.version("metamom")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert metamom.__version__ == "unknown"


def test_other_names_are_refused_as_by_any_module() -> None:
    for module, name in ((metamom, "network"), (metamom.interop, "higher")):
        with pytest.raises(AttributeError, match=f"module {module.__name__!r} has no attribute {name!r}"):
            getattr(module, name)
