"""The composite momentum method: the update rule, the optimizer, and a scheduler for beta."""

from metamom.common.choices import FirstStep, Variant
from metamom.optim.composite import CompositeMomentum
from metamom.optim.schedule import LambdaBeta
from metamom.optim.update import momentum_update, momentum_update_
from metamom.optim.variants import extrapolated, transported_update

__all__ = [
    "CompositeMomentum",
    "FirstStep",
    "LambdaBeta",
    "Variant",
    "extrapolated",
    "momentum_update",
    "momentum_update_",
    "transported_update",
]
