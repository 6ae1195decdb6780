"""Small runs with a directory, and changes to what they wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from endings import contents
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, train
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Sinusoid
from metamom.training.checkpoints import Checkpoints, load, save

TASKS = Sinusoid(shots=4, queries=4, seed=1)


FLAGS = ["--meta-batch", "2", "--shots", "4", "--queries", "4", "--evaluate-tasks", "4", "--checkpoint-every", "2"]


def learner(loss: Any = F.mse_loss, **options: Any) -> MAML:
    return MAML(SinusoidMLP((4,), generator=torch.Generator().manual_seed(0)), loss, **options)


def go(run_dir: Path | None, made: MAML | None = None, *, iterations: int = 4, **options: Any) -> Any:
    made = learner() if made is None else made
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=0.3)
    steps = [make(optimizer) for make in options.pop("schedulers", ())]
    options = {"meta_batch": 2, "checkpoint_every": 2, **options}
    return train(made, optimizer, TASKS, iterations=iterations, run_dir=run_dir, schedulers=steps, **options)


def refused(run_dir: Path, match: str, call: Callable[[], Any]) -> None:
    """A ValueError, and every file as it was."""
    before = contents(run_dir) if run_dir.exists() else None
    with pytest.raises(ValueError, match=match):
        call()
    assert (contents(run_dir) if run_dir.exists() else None) == before


def edited(run_dir: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Save the newest checkpoint again with other contents."""
    path = Checkpoints(run_dir / "checkpoints").path(4)
    save(path, change(load(path)))


def in_group(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        state["optimizer"]["param_groups"][0].update(values)
        return state

    return change
