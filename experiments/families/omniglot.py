"""Omniglot: characters of 50 alphabets, classified with a Conv4."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from metamom.experiments.families.family import (
    ACCURACY,
    SPLITS,
    BiasPlan,
    Classes,
    ComparisonPlan,
    Defaults,
    Family,
    TaskSettings,
    cross_entropy_loss,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from metamom.tasks.family import TaskFamily


def _tasks(wanted: TaskSettings, *, within_alphabet: bool | None) -> TaskFamily:
    from metamom.tasks import Omniglot

    assert wanted.ways is not None
    if within_alphabet and wanted.split == "validation" and not Omniglot.has_alphabets(wanted.split, wanted.ways):
        warnings.warn(
            f"no alphabet has {wanted.ways} of the 100 characters of the validation split: its tasks are drawn from "
            "all alphabets.",
            stacklevel=1,
        )
        within_alphabet = False
    return Omniglot(
        wanted.root,
        split=wanted.split,
        ways=wanted.ways,
        shots=wanted.shots,
        queries=wanted.queries,
        seed=wanted.seed,
        within_alphabet=bool(within_alphabet),
    )


def _model(ways: int | None, generator: torch.Generator, **of_tasks: Any) -> nn.Module:
    from metamom.nets.models import Conv4

    assert ways is not None
    return Conv4(ways, generator=generator)


FAMILY = Family(
    name="omniglot",
    title="Omniglot",
    help="on omniglot tasks",
    defaults=Defaults(shots=1, queries=1, inner_lr=0.4, lr=0.3, meta_batch=16, ways=5),
    iterations=1000,
    metric=ACCURACY,
    comparison=ComparisonPlan(lrs=(0.1, 0.3, 1.0), target=0.85),
    tasks=_tasks,
    model=_model,
    loss=cross_entropy_loss,
    bias=BiasPlan(
        (1, 2, 4), pool=16, queries=4, tasks=60, pairs=8, dtype="float32", reason="which has 20 drawings a class"
    ),
    classes=Classes("characters", seen_in=("train", "background", "evaluation")),
    splits=(*SPLITS, "background", "evaluation"),
    options={"within_alphabet": None},
    data="omniglot",
    train_examples=(
        "metamom train omniglot --ways 5 --shots 1 --lr 0.3 --run-dir runs/omni",
        "metamom train omniglot --iterations 2000 --run-dir runs/omni --resume",
    ),
    compare_examples=(
        "metamom compare omniglot --seeds 3 --lrs 0.1,0.3 --run-dir runs/compare",
        "metamom compare omniglot --iterations 200 --first-steps zero,gradient",
    ),
)
