"""Options of a run with one more than there are, and runs that have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum
from metamom.common.flag_types import long_count
from metamom.common.options import Flag, option, whole
from metamom.distributed import World, as_world, start
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Sinusoid
from metamom.training import loop
from metamom.training.options import Options


@dataclass(frozen=True, kw_only=True)
class LongerOptions(Options):
    """With one more option, declared as the others are."""

    rest: int = option(
        7,
        check=whole(1),
        record="length",
        flag=Flag("run", "iterations to wait", type=long_count, metavar="N", commands=("train",)),
    )


def train_longer(
    learner: MAML, optimizer: Any, sampler: Any, *, world: World | None = None, **keywords: Any
) -> loop.TrainResult:
    """`metamom.train` if ``rest`` were one of its keywords."""
    return loop.run(LongerOptions.of(keywords), learner, optimizer, sampler, as_world(world))


def differ_in_rest() -> None:
    """A run that processes must refuse, since they have different options."""
    torch.manual_seed(0)
    learner = MAML(SinusoidMLP(), F.mse_loss)
    with start(timeout=30) as world:
        try:
            train_longer(
                learner,
                CompositeMomentum(learner.parameters(), lr=0.01),
                Sinusoid(),
                iterations=1,
                meta_batch=2,
                rest=3 + world.rank,
                world=world,
            )
        except ValueError as error:
            print(error)
