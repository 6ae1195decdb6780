"""metamom: meta-learners trained by composite momentum under biased gradients."""

from metamom.accumulator import BiasedAccumulator
from metamom.batch import Sampler, TaskBatch
from metamom.bias import Clip, Identity, TopK
from metamom.evaluation import Evaluation, evaluate
from metamom.maml import MAML
from metamom.optim import CompositeMomentum, LambdaBeta, momentum_update
from metamom.training import DivergedError, TrainResult, train

__all__ = [
    "MAML",
    "BiasedAccumulator",
    "Clip",
    "CompositeMomentum",
    "DivergedError",
    "Evaluation",
    "Identity",
    "LambdaBeta",
    "Sampler",
    "TaskBatch",
    "TopK",
    "TrainResult",
    "evaluate",
    "momentum_update",
    "train",
]
