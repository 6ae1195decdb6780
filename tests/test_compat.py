"""What is said to be supported is what `make compat` runs; and one .venv is not made of two Pythons."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # NamedTuple looks its module up
    spec.loader.exec_module(module)
    return module


compat = load(ROOT / ".ci" / "compat.py")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PINS = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")


def test_every_lower_bound_was_run():
    lower = dict(re.findall(r'"([a-z0-9_]+)>=([0-9.]+)"', PROJECT))
    assert lower.pop("setuptools")  # of building, not of running
    assert lower.pop("learn2learn")  # no other release builds
    assert lower.pop("lightning")  # not of the core tests
    assert lower.pop("accelerate")
    assert lower.pop("flwr")
    (oldest,) = [row for row in compat.ROWS if row.others]
    ran = {"torch": oldest.torch, "numpy": oldest.numpy, **dict(pin.split("==") for pin in oldest.others)}
    for name, bound in lower.items():
        assert re.fullmatch(re.escape(bound) + r"(\.0)*", ran[name]), f"{name}>={bound}, but {ran[name]} was run"


def test_the_pythons_are_those_of_the_classifiers_and_of_every_kind_of_torch():
    pythons = sorted({row.python for row in compat.ROWS})
    assert pythons == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    pinned = re.search(r"^torch==(\S+)", PINS, re.MULTILINE)
    assert pinned is not None
    assert pinned[1] in {row.torch for row in compat.ROWS}
    assert len({row.torch for row in compat.ROWS}) >= 3
    assert {row.numpy.split(".")[0] for row in compat.ROWS} == {"1", "2"}


def test_the_core_tests_are_there():
    assert all(path.is_file() for path in compat.core())


def test_no_class_needs_a_newer_python():
    """A NamedTuple or TypedDict with a second base is a TypeError on Python 3.10, when its module is imported."""
    files = [path for top in ("metamom", "tasks", "experiments") for path in (ROOT / top).rglob("*.py")]
    assert len(files) > 400
    derived = re.compile(r"^ *class (\w+)\((?=[^)]*\b(?:NamedTuple|TypedDict)\b)[^)]*,", re.MULTILINE)
    found = {str(path): names for path in files if (names := derived.findall(path.read_text(encoding="utf-8")))}
    assert found == {}


def test_what_pytest_counts_is_distinguished(tmp_path):
    junit = tmp_path / "junit.xml"
    junit.write_text('<testsuites><testsuite tests="10" failures="1" errors="2" skipped="3"/></testsuites>')
    result = compat.counted(junit, "")
    assert result[:3] == (4, 3, 3)
    assert not result.good
    assert compat.Result(5, 0, 1).good
    assert not compat.Result(5, 0, 1, "hung").good
    assert not compat.Result(0, 0, 9).good


def test_the_table_fits_a_terminal():
    results = dict.fromkeys(compat.ROWS, compat.Result(12_345, 0, 123))
    lines = compat.table(results).splitlines()
    assert len(lines) == 2 + len(compat.ROWS)
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= 80


def test_a_python_is_found_by_its_version():
    found = compat.find_python(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0
    with pytest.raises(ValueError, match=r"no Python 3\.99 on the path"):
        compat.find_python("3.99")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Of the Makefile and what it reads, with Pythons that only say which they are."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    for name in ("Makefile", "pyproject.toml", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for place, version in (("old", "3.10"), ("new", "3.13"), (".venv/bin/python", "3.10")):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho {version}\n")
        path.chmod(0o755)
    (tmp_path / ".venv" / ".up-to-date").touch()
    return tmp_path


def planned(checkout: Path, *words: str) -> str:
    done = subprocess.run(
        ["make", "--dry-run", "setup", *words], cwd=checkout, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_venv_is_kept_until_another_python_is_named(checkout):
    assert "pip" not in planned(checkout)
    assert "pip" not in planned(checkout, "PYTHON=./old")
    assert "./new -m venv --clear .venv\n" in planned(checkout, "PYTHON=./new")


def test_a_venv_is_brought_up_to_date_with_its_own_python(checkout):
    (checkout / ".venv" / ".up-to-date").unlink()
    said = planned(checkout)
    assert "-m venv" not in said
    assert ".venv/bin/python -m pip" in said


def test_a_venv_whose_python_is_gone_is_made_again(checkout):
    (checkout / ".venv" / "bin" / "python").unlink()
    assert "./old -m venv --clear .venv\n" in planned(checkout, "PYTHON=./old")
    assert "python3 -m venv --clear .venv\n" in planned(checkout)


@pytest.mark.xdist_group("one")
def test_the_groups_of_tests_are_kept_together(request):
    """Otherwise every process sets up the fixtures of a group, which takes up to a minute."""
    if request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith("@one"), "pytest-xdist ignores groups with this pytest. Run `make setup`."
