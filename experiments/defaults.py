"""What a recipe of any task may choose from. Needs no torch, so that help is fast."""

from __future__ import annotations

from typing import Literal, get_args

OptimizerName = Literal["momentum", "sgd", "adam", "rmsprop"]
DtypeName = Literal["float32", "float64", "bfloat16"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
DTYPE_NAMES: tuple[DtypeName, ...] = get_args(DtypeName)
ADAPTIVE_LR = 0.001  # of Adam and RMSprop
EPOCHS = {"mnist": 200, "fashion": 300}  # of the paper's experiments
