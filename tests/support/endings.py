"""What runs leave behind, to be compared bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from metamom.training.checkpoints import Checkpoints, load
from metamom.training.directory import read_metrics


def assert_same(a: Any, b: Any, place: str = "state") -> None:
    """Equal bit for bit, through nested containers."""
    assert type(a) is type(b), f"{place}: {type(a)} and {type(b)}"
    if isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, place
        assert torch.equal(a, b), f"{place} differs by up to {(a - b).abs().max()}"
    else:
        assert a == b, f"{place}: {a} and {b}"


def without_seconds(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in metrics]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def newest(run_dir: Path) -> dict[str, Any]:
    kept = Checkpoints(run_dir / "checkpoints")
    return load(kept.path(kept.steps()[-1]))


def assert_same_ending(one: Path, other: Path, *, generators: bool = True) -> None:
    """The same last checkpoints (weights, optimizer, schedulers, generators) and metrics, but for the time taken.

    Torch's generators begin where they like in each process: not to be compared where nobody has seeded them.
    """
    a, b = newest(one), newest(other)
    if not generators:
        del a["rng"], b["rng"]
    assert a.pop("seconds") > 0
    assert b.pop("seconds") > 0
    assert_same(a, b)
    assert without_seconds(read_metrics(one)) == without_seconds(read_metrics(other))
    assert [line["step"] for line in read_metrics(one)] == list(range(a["step"]))
