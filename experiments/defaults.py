"""What a recipe may choose from, and what it takes where nothing is given. Needs no torch, so that help is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Task = Literal["sinusoid", "omniglot"]
OptimizerName = Literal["momentum", "sgd", "adam", "rmsprop"]
DtypeName = Literal["float32", "float64", "bfloat16"]
TASKS: tuple[Task, ...] = get_args(Task)
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
DTYPE_NAMES: tuple[DtypeName, ...] = get_args(DtypeName)


@dataclass(frozen=True)
class Defaults:
    """What a recipe takes where nothing is given, by task."""

    shots: int
    queries: int
    inner_lr: float
    lr: float
    meta_batch: int


class Compared(NamedTuple):
    """What a comparison takes where nothing is said: the grid of step sizes, and the target on validation."""

    lrs: tuple[float, ...]
    target: float


ITERATIONS = {"sinusoid": 2000, "omniglot": 1000}
DEFAULTS = {
    "sinusoid": Defaults(shots=10, queries=10, inner_lr=0.01, lr=0.03, meta_batch=8),
    "omniglot": Defaults(shots=1, queries=1, inner_lr=0.4, lr=0.3, meta_batch=16),
}
WAYS = 5  # of Omniglot
ADAPTIVE_LR = 0.001  # of Adam and RMSprop
COMPARED = {"sinusoid": Compared((0.01, 0.03), 1.0), "omniglot": Compared((0.1, 0.3, 1.0), 0.85)}
EPOCHS = {"mnist": 200, "fashion": 300}  # of the paper's experiments
