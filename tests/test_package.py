"""What ``import metamom`` gives, and what it leaves until it is named."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import metamom
from metamom.diagnostics.bias_meter import measure
from metamom.interop.learn2learn import seeded
from metamom.moved import MOVED
from metamom.tasks import Sinusoid

CHECKOUT = Path(__file__).parents[1]

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


def test_modules_are_the_same_under_their_earlier_names() -> None:
    for earlier, name in MOVED.items():
        assert import_module(earlier) is import_module(name)
        assert import_module(name).__spec__.name == name


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
        with pytest.raises(AttributeError, match=f"{module.__name__}.* attribute .*{name}"):
            getattr(module, name)


def test_the_wheel_has_every_package() -> None:
    project = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)
    assert listed is not None
    tops = {"metamom": CHECKOUT / "metamom", "metamom.tasks": CHECKOUT / "tasks"}
    tops["metamom.experiments"] = CHECKOUT / "experiments"
    found = {
        ".".join((name, *init.parent.relative_to(top).parts))
        for name, top in tops.items()
        for init in top.rglob("__init__.py")
    }
    assert set(re.findall(r'"([^"]+)"', listed[1])) == found


# the generators of others


def test_nothing_seeds_the_generators_of_every_device() -> None:
    """`torch.manual_seed` moves those of all GPUs, which `fork_rng` and `set_rng_state` do not put back."""
    files = [path for part in ("metamom", "tasks", "experiments") for path in (CHECKOUT / part).rglob("*.py")]
    assert len(files) > 200
    seeding = {"torch.manual_seed", "torch.random.manual_seed", "torch.seed"}
    offenders = [
        f"{path.relative_to(CHECKOUT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in seeding
    ]
    assert not offenders


@pytest.mark.parametrize("what", ["measure", "seeded"])
def test_gpus_generators_stay(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", moved.append)
    before = torch.get_rng_state()
    if what == "measure":
        learner = metamom.MAML(metamom.nets.SinusoidMLP(), F.mse_loss)
        before = torch.get_rng_state()
        measure(learner, Sinusoid(shots=4), inner_batches=(1,), draws=3)
    else:
        with seeded("a place"):
            first = torch.rand(3)
        with seeded("a place"):
            assert torch.equal(torch.rand(3), first)
    assert moved == []
    assert torch.equal(torch.get_rng_state(), before)
