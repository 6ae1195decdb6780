"""metamom: meta-learners trained by composite momentum under biased gradients."""

from metamom.accumulator import BiasedAccumulator
from metamom.batch import Sampler, TaskBatch
from metamom.bias import (
    EF14,
    EF21,
    EF21SGDM,
    QSGD,
    Clip,
    Clip21,
    ClipValue,
    Compose,
    Identity,
    Normalize,
    RandK,
    Sign,
    TopK,
)
from metamom.evaluation import Evaluation, evaluate
from metamom.maml import MAML
from metamom.optim import CompositeMomentum, LambdaBeta, momentum_update
from metamom.progress import DivergedError
from metamom.training import TrainResult, train

__all__ = [
    "EF14",
    "EF21",
    "EF21SGDM",
    "MAML",
    "QSGD",
    "BiasedAccumulator",
    "Clip",
    "Clip21",
    "ClipValue",
    "Compose",
    "CompositeMomentum",
    "DivergedError",
    "Evaluation",
    "Identity",
    "LambdaBeta",
    "Normalize",
    "RandK",
    "Sampler",
    "Sign",
    "TaskBatch",
    "TopK",
    "TrainResult",
    "evaluate",
    "momentum_update",
    "train",
]
