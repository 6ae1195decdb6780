"""The composite momentum method: the update rule, the optimizer, and a scheduler for beta."""

from metamom.optim.composite import CompositeMomentum, FirstStep
from metamom.optim.schedule import LambdaBeta
from metamom.optim.update import momentum_update, momentum_update_

__all__ = ["CompositeMomentum", "FirstStep", "LambdaBeta", "momentum_update", "momentum_update_"]
