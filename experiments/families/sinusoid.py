"""Sinusoids: regression with an MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metamom.experiments.families.family import (
    MEAN_SQUARED_ERROR,
    ComparisonPlan,
    Defaults,
    Family,
    TaskSettings,
    of_split,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from metamom.maml.checks.loss_readings import LossFn
    from metamom.tasks import Sinusoid
    from metamom.tasks.family import TaskFamily


def _tasks(wanted: TaskSettings) -> TaskFamily:
    from metamom.tasks import Sinusoid

    tasks = Sinusoid(wanted.shots, wanted.queries, seed=wanted.seed, dtype=wanted.dtype)
    return of_split(tasks, wanted.split, FAMILY.title)


def _model(ways: int | None, generator: torch.Generator) -> nn.Module:
    from metamom.nets.models import SinusoidMLP

    return SinusoidMLP(generator=generator)


def _loss() -> LossFn:
    from torch.nn.functional import mse_loss

    return mse_loss


def _curve(tasks: Sinusoid) -> tuple[Tensor, Tensor]:
    import numpy as np
    import torch

    from metamom.rng import DrawCoordinates

    amplitude, phase = (float(value[0]) for value in tasks.parameters(DrawCoordinates("test", 0, np.array([0]))))
    x = torch.linspace(*tasks.x_range, 200, dtype=tasks.dtype)
    return x, amplitude * torch.sin(x + phase)


FAMILY = Family(
    name="sinusoid",
    title="sinusoids",
    help="on sinusoid tasks",
    defaults=Defaults(shots=10, queries=10, inner_lr=0.01, lr=0.03, meta_batch=8),
    iterations=2000,
    metric=MEAN_SQUARED_ERROR,
    comparison=ComparisonPlan(lrs=(0.01, 0.03), target=1.0),
    tasks=_tasks,
    model=_model,
    loss=_loss,
    curve=_curve,
    train_examples=(
        "metamom train sinusoid --iterations 2000 --lr 0.03 --beta 0.1 --run-dir runs/sine",
        "metamom train sinusoid --workers 4 --bias topk:5% --aggregate median",
    ),
    compare_examples=(
        "metamom compare sinusoid --seeds 3 --betas 1,0.1 --lrs 0.01,0.03 --run-dir runs/compare",
        "metamom compare sinusoid --workers 4 --bias clip:1 --jobs 2",
    ),
)
