"""What a recipe of any task may choose from. Needs no torch, so that help is fast."""

from __future__ import annotations

from typing import Literal, get_args

DtypeName = Literal["float32", "float64", "bfloat16"]
DTYPE_NAMES: tuple[DtypeName, ...] = get_args(DtypeName)
STEP_SIZES = {  # of torch's optimizers but SGD: their own defaults, except RMSprop's
    "adadelta": 1.0,
    "adafactor": 0.01,
    "adagrad": 0.01,
    "adam": 0.001,
    "adamax": 0.002,
    "adamw": 0.001,
    "asgd": 0.01,
    "muon": 0.001,
    "nadam": 0.002,
    "radam": 0.001,
    "rmsprop": 0.001,
    "rprop": 0.01,
}
OPTIMIZERS = ("momentum", "sgd", *STEP_SIZES)
WEIGHT_DECAYS = {"adamw": 0.01, "muon": 0.1}  # those that are not 0
PLATEAU = (0.1, 10)  # the factor, and the validations to wait
EPOCHS = {"mnist": 200, "fashion": 300}  # of the paper's experiments
