"""Small models, data and settings for the paper's experiments."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metamom.experiments.paper import protocol, run
from metamom.tasks.images import LabelledImages

MNIST, FASHION = protocol.PROTOCOLS["mnist"], protocol.PROTOCOLS["fashion"]


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 10))


def made(count: int, seed: int, dtype: torch.dtype = torch.float64) -> LabelledImages:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 4, generator=generator, dtype=dtype)
    return LabelledImages(images, torch.randint(10, (count,), generator=generator))


SMALL = replace(MNIST, model=small_mlp)


class SmallProtocol(protocol.Protocol):
    """MNIST's on a small problem."""

    def data(self, part, root):
        return made(24, 1, torch.float32) if part == "train" else made(10, 2, torch.float32)


def small_mnist() -> SmallProtocol:
    return SmallProtocol(**{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__})


KEYS = {"nodes": 6, "lr": 0.1, "beta": 0.5, "bias": "topk:20", "epochs": 6}


def run_until_killed(folder: Path, save_after: float, at: int) -> None:
    """A run that saves every ``save_after`` seconds and kills its process once it has logged epoch ``at``."""
    protocol.PROTOCOLS["mnist"] = small_mnist()
    run.SAVE_AFTER = save_after
    log = run.RunDirectory.log

    def killed(self: run.RunDirectory, line: dict[str, Any]) -> None:
        log(self, line)
        if line["step"] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    run.RunDirectory.log = killed  # type: ignore[method-assign]
    run.reproduce("mnist", run_dir=folder, **KEYS)
